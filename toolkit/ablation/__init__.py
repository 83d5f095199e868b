"""From a plan to its jobs."""
