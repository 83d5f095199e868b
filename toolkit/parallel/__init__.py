"""Data parallelism: several processes that train one model."""
