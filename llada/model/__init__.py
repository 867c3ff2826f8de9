"""The mask predictor: a bidirectional Llama-style Transformer and the checkpoint layouts it reads and writes."""
