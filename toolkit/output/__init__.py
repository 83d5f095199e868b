"""Prepare text for a terminal or a page."""
