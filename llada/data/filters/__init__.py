"""Filters of documents: which are kept, and what is rewritten in them. FineWeb's and others, each one class.

A filter is one frozen dataclass (settings, label, reasons, decision) and a row of chain.py, which stands in running order.
May import read, document, outcomes and batching of llada.data; it knows neither work units nor the report.
"""
