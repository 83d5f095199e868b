"""Comparisons: read run folders, test the arms against the baseline, and write the answer."""
