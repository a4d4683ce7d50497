"""The parts of screening_paired.py and screening_smallest.py: masks, fine-tunes, verdicts and pages."""
