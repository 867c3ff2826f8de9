"""Global deduplication of documents and lines, and decontamination: plain functions over files, each one task.

steps.py tells the order; the hashes and the exchange format must not change, or indexes of earlier snapshots go blind.
May import read, filters, document, outcomes and batching of llada.data; it knows no work unit.
"""
