"""The endpoint behind the command `serve`: OpenAI's protocol, the gateway that speaks it, the replicas that denoise.

A dialect is one file in dialects/ and one row in routes.py; the gateway's side (all but replica.py,
multiplexed.py, prompts.py and checkpoint.py) runs without torch. May import pipelines.stage and llada; knows no command.
"""
