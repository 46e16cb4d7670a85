"""The command line: from `sys.argv` to complete, checked flags.

parse.py does it in one call. config.py reads `--config`, checks.py refuses what cannot work, resume.py takes the flags
of a resumed run from its checkpoint, plan.py predicts what a command would do, archs.py lists timm's models that can be
pruned, errors.py turns failures into a line for the user. The flags themselves are a table in settings/flags.py.
"""
