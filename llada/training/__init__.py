"""Training: the one visible loop (trainer.py), and beside it batches, validation, optimizers, parallelism, checkpoints.

Runs alike under python, torchrun and Ray; noise, order and learning rate are functions of the step, so the number of
workers or a restart changes nothing. May import: `llada.diffusion`, `llada.model`, `llada.data.tokens`, `llada.hardware`.
"""
