"""Training: one visible loop, its optimizers, parallelism, checkpoints and measurements."""
