"""How well a checkpoint predicts text: rows of a prepared folder (shards.py), texts as MDLM's table has them (texts.py, with corpora,
detokenisers and wrapping), and what it writes itself before an autoregressive judge (generative.py, judge.py).

May import what llada.evals may.
"""
