"""The built-in items of evaluators, made from the grammar of SyntheticStories."""
