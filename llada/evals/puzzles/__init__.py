"""Problems whose answer has to be known as a whole before its first sign can be, drawn by seed, and what solves them: Sudoku and
Countdown. tests/experiments/planning.py teaches and asks them.

May import the standard library and llada.settings.
"""
