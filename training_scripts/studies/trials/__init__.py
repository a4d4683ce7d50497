"""The parts of analyze_trials.py: the table's columns, rewards, samplers, pruning, page and plot."""
