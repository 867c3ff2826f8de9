"""The mask predictor: a bidirectional Llama-style Transformer, how it is called, and the checkpoint layouts it is stored in.

The network is only the network: no loss, mesh, optimizer or memory of earlier forwards; a layout or adapter is a file beside hf.py.
May import: `llada.tokenizer` and the base modules.
"""
