"""Checkpoints of a run that can go on: sharded (DCP), at any number of workers, on any fsspec URL.

`restore.py` fills a network and its optimizers, `save.py` writes them beside the steps; below those stand `state.py`
(state.json, the mark of a whole one), `tensors.py`, `checksums.py`, `folder.py` (which there are, which are kept) and
`lease.py` (who may write). The noise and the order of the
samples need no place here: they are functions of the step. May import what `llada.training` may.
"""
