"""Us and the peers, side by side in one run: ``python -m benchmarks.train`` and its siblings. Never a timed test."""
