"""The mask predictor: a Llama-style Transformer, how it is called, and the checkpoint layouts it is stored in.

It sees both sides; `causal` and `block_length` of `ModelConfig` make it autoregressive or block-causal. The network is
only the network: no loss, mesh, optimizer or memory of earlier forwards (who samples keeps it, and runs each layer on
what is to be run). A layout or adapter is a file beside hf.py. May import: `llada.tokenizer` and the base modules.
"""
