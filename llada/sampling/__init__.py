"""Text from a network by unmasking step by step: canvas, rules, the one loop, rounds, and the engine that serves many.

A rule is added in rules.py, a knob in config.py, and nowhere else; plan and commit (sampler.py) never call the network.
Imports diffusion, model and tokenizer, never training or data.
"""
