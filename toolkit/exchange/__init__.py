"""Convert models of ours to the transformers library and back, and prove that they compute the same."""
