"""Generation: one denoising loop, and small functions that choose which positions to commit."""
