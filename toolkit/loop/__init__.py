"""What the training loop is made of, besides the model."""
