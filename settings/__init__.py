"""The flags of the command as data: `flags.py` is the table, `flag.py` the record and what follows from it, `effect.py`
the rules on when a flag has an effect. The command line, reports and searches all read this table."""
