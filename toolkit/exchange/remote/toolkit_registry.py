"""Stands for the catalogue of the toolkit, in which the parts of this folder were registered."""

from collections.abc import Callable


def register(kind: str) -> Callable[[type], type]:
    """Class decorator: returns the class as it is."""
    return lambda cls: cls


def able(kind: str, feature: str) -> str:
    """Words for an error message: a part of a kind that supports ``feature``."""
    return f"a part of kind {kind} that supports {feature}"
