"""The mask predictor: a bidirectional Llama-style Transformer, how it is called, and the checkpoint layouts it is stored in.

The network is only the network: no loss, mesh or optimizer in it; a further layout or adapter is a file beside hf.py.
May import: `llada.tokenizer` and the base modules.
"""
