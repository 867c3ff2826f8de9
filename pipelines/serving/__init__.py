"""The endpoint behind the stage `serve`: OpenAI's protocol, the gateway that speaks it, the replicas that denoise."""
