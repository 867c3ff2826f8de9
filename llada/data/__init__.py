"""Documents to tokens: readers, cleaning, packing, shards, chat rendering. Plain Python: no Ray here."""
