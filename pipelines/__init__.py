"""The commands a person can type, one file each with its arguments beside it; cli.py only finds them.

A new command is a file with `main(argv)` and a row in cli.py. What they share stands in stage/, runners/, corpus/ and serving/.
May import all of these and llada, but no other command (quickstart excepted, which runs them all).
"""
