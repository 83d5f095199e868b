"""From text files to files of tokens, and from those to batches."""
