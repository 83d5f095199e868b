"""Text on its way to a terminal or a page."""
