"""Read gin files into layers, check them, and merge them into one config."""
