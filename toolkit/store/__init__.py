"""Files that survive a crash, and that prove that they are what was written."""
