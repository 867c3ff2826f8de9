"""Documents to tokens, in the order of a document's life: read, filters, dedup, tokens; work and report around them.

prepare.py shows the whole way and is what to change for another one; each room is one step of it and can be replaced.
Plain Python that never imports ray; what a room may import is said in its own folder.
"""
