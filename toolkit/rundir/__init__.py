"""A run's folder: what a run writes into it, and what commands show of it."""
