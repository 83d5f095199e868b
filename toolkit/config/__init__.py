"""gin files as layers, and every check of what they say."""
