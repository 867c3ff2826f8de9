"""Requests of lm_eval as blocks of work: how they are cut and read (blocks, wishes), what works on a block wherever a checkpoint is
open (worker), and the scores of continuations (scoring).

All of it is JSON on its way. Knows nothing of lm_eval; may import what llada.evals may.
"""
