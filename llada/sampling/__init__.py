"""Text from a network by unmasking step by step: canvas, rules, the one loop, rounds, and the engine that serves many.

A rule is added in rules.py, a knob in config.py; what is kept from one forward to the next (canvas, caches) is kept here.
Imports diffusion, model and tokenizer, never training or data; plan and commit (sampler.py) never call the network.
"""
