"""The three ways Ray is used: tasks and actors by Ray Data, workers by Ray Train. What they run comes from the caller.

A new way to run things is a new file; what travels back as a value and what as an exception is failures.py.
Imports llada and pipelines.stage.
"""
