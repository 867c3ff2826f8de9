"""The barriers of `prepare` on a cluster: inputs, tokenizer, snapshots, duplicates, and how a snapshot is finished.

Each file is one step of pipelines/prepare.py; what happens to a document is said in llada/data/prepare.py.
May import llada, pipelines.runners and pipelines.stage; no other command needs it.
"""
