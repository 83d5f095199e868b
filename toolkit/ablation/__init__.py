"""Ablations: read a plan, turn it into jobs, and run the jobs."""
