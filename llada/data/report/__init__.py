"""The report of a preparation: one HTML page with what went, why, how fast, and what trillions of tokens would cost.

A section is a function of sections.py and a row of page.py; figures come from the reports of the tasks alone.
May import document, outcomes, filters, dedup and work of llada.data; nothing of a shard depends on it.
"""
