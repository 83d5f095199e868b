"""The pieces of the training loop: one step, prefetching, scoring, sampling, spikes, signals, timing and traces."""
