"""Where the toolkit's own files are."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent  # holds toolkit/ and components/, and in a clone gin/ as well
