"""The flags of the command as data: `flags.py` is the table, `flag.py` what follows from a record, `effect.py` when a
flag has an effect. Reports, runs and searches read the same table as the command line."""
