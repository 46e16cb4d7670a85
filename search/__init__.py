"""The search over flags: a command and the number of trials in, the runs that no other beats in accuracy and cost out.

space.py says what is searched, trials.py keeps the study and follows each trial, which is a run of the command in a
process of its own, front.py writes what no trial dominates, command.py puts them together.
"""
