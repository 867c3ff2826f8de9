"""Documents to tokens, rows and shards, and the loader that training reads rows with: all of `data` it may import.

The format on disk (shards.py, manifest.py) and the order of rows (order.py) are promises to finished folders and runs.
May import document, outcomes and batching of llada.data, and llada.tokenizer; it knows neither files of text nor work units.
"""
