"""The parts of claims.py: rows, runs, comparisons and pages."""
