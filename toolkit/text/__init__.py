"""Turn text files into token files, and read batches from those."""
