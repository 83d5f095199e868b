"""A run's folder: what is written in it, and what is shown of it."""
