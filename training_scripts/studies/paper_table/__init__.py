"""The parts of reproduce_table.py, in the order of the work: rows, tasks, runs, claims, page and plots."""
