"""The parts of a model by name. ``convert --tier code`` writes a file of this name with the parts of its model."""

from toolkit.context import Context

PARTS: dict[str, type] = {}

__all__ = ["PARTS", "Context"]
