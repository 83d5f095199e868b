"""Probes look inside the model at a few steps: on a copy of it, so that they change nothing in training."""
