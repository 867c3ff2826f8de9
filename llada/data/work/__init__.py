"""How the work of a preparation is cut and resumed: units, the job that owns all paths and names, numbered tasks.

Names of units and files hash what they depend on: change them, and every old folder is prepared anew.
May import all of llada.data but report and prepare; it runs without Ray, and nothing below it knows of units.
"""
