"""The request and reply formats of the endpoint, one file each.

A further one is a file (a body with `prompts`, a writer) and a row of DIALECTS in pipelines/serving/routes.py.
May import pipelines.serving.errors, pipelines.serving.events and what of llada needs no torch.
"""
