"""The mathematics: noise schedules, noise levels, the forward process with its loss, likelihood estimates.

Pure functions of tensors, settings and integer seeds: no data loading, no collectives, no optimizer. A number that changes
here changes every result: the golden tests (tests/golden) must hold. May import: `llada.model` and the base modules.
"""
