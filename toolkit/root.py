"""The folder that holds the toolkit's own files."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent  # holds toolkit/ and components/, and in a clone gin/ as well
