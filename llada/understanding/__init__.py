"""Understanding: a classification head on a network's last layer, fine-tuned with all of it on labelled texts, and how its
answers are scored (the GLUE row of MDLM and BERT). Every objective's networks take this one way: masked diffusion, BERT, autoregressive.
Not the training loop of `training`: rows have labels and no noise, and are few. May import model, tokenizer and training of llada.
"""
