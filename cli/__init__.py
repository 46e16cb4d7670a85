"""The command line: words of a shell in, flags that are complete and make sense out.

flags.py is the table, config.py reads `--config`, checks.py refuses what cannot work, resume.py takes the flags of a
run that goes on, plan.py says what a command would do, archs.py which of timm's models it could take, errors.py turns
failures into a line for the user.
"""
