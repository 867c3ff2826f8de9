"""The papers' benchmarks: what each asks (catalogue), how the papers ran it and what came out (published), answers that are programs
or formulas, the sandbox, and the table of ours beside theirs. run.py is the evaluation task.

Prompts and most rules are lm_eval's, reached through llada/evals/harness.py. May import what llada.evals may.
"""
