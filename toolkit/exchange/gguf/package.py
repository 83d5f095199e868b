"""The packages that read and write GGUF files."""

from __future__ import annotations

import importlib.util
from typing import Any


def require() -> Any:
    """Import and return gguf. Raises ValueError, with the command that installs it, if it is missing."""
    if importlib.util.find_spec("gguf") is None:
        raise ValueError(
            'the package gguf is not installed; run python -m pip install "gpt-ablation-toolkit[gguf]" or '
            'python -m pip install "gguf>=0.19"'
        )
    import gguf

    return gguf


def has_llama_cpp() -> bool:
    """Whether llama.cpp can be run here, by the package llama-cpp-python."""
    return importlib.util.find_spec("llama_cpp") is not None
