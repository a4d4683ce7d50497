"""The page of `later_attacks.py`."""
