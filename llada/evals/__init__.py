"""What a checkpoint is measured by: one file per task, and the table of them in tasks.py.

A task is a function from an `Evaluation` to figures, over blocks of work that run anywhere; it knows nothing of Ray.
May import sampling, diffusion, model, tokenizer, data.tokens and understanding of llada; never training.
"""
