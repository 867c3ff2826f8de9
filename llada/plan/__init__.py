"""What a run needs before it is started, and what it costs: plain arithmetic, a file for each subject, every formula with
its source. `llada plan` (pipelines/plan.py) puts the answers together; nothing here reads or writes anything but a price list.

    training      FLOPs, days, memory             prices       dollars, and the list that they are from
    published     the runs that it is checked by  failures     goodput, and how often to save
    checkpoints   sizes, times, restarts          corpus       core-hours and storage of the data
    budget        Quokka's law, backwards         serving      replicas for a request rate
    limits        what of our own machinery is busiest at a given size, and what to do about it

May import `llada.config`, `presets`, `hardware`, `model`, `training`, `sampling`, and of `llada.data` `report` and `dedup`.
"""
