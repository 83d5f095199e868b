"""What probes wrote into metrics.jsonl: as a table in the order of the model, and drawn by depth and step."""
