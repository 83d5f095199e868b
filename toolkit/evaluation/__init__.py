"""Measures a trained model: the reader that evaluators use, their items, and the files of their results."""
