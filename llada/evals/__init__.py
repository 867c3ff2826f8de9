"""What a checkpoint is measured by: the table of tasks in tasks.py, a room for each kind of them, and lm_eval's adapter in harness.py.

A task is a function from an `Evaluation` to figures, over blocks of work that run anywhere; it knows nothing of Ray.
May import sampling, diffusion, model, tokenizer, data.tokens and understanding of llada; never training.
"""
