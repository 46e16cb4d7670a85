"""The search over flags: N trials, each an ordinary run, and the Pareto front of validation accuracy and cost.

space.py has the flags to search, trials.py the study and its trials, front.py the files about the front, command.py the
program.
"""
