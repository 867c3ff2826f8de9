"""Text from a network by unmasking step by step, for one caller or for many at once.

A step goes through three files: sampler.py plans it and commits tokens (canvas.py, rules.py, draw.py, constraints.py),
forward.py runs the network in between (cache.py, blocks.py, prefixes.py, packed.py), on request faster (compiled.py,
graphs.py). Around the loop stand generate.py and rounds.py for callers from Python, and batch.py, on which the endpoint
(engine.py) and batch inference (completions.py) walk many replies together.

A knob is declared in config.py alone, a rule is a row of rules.py, a cache mode one of cache.py. What is kept from one
forward to the next is kept here, by row. Imports diffusion, model and tokenizer, never training or data; plan and commit
never call the network.
"""
