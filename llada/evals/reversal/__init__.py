"""Whether who knows what follows also knows what goes before: LLaDA's poems, the evaluation task "reversal" (task.py, poems.py), and
the facts about invented people that a small network and its twin are taught and asked in both directions (facts.py).

May import what llada.evals may.
"""
