"""Input files to documents: listing, one reader per format, extraction of text from HTML, cleaning.

A format is one file with its `Reader` and a row in formats.py; what a reader cannot use goes to a `Rejects`, never away.
May import document, outcomes and batching of llada.data; it knows no filter, no work unit and no tokenizer.
"""
