"""The bytes that the ids of a tokenizer stand for."""

from __future__ import annotations

import functools

import numpy as np

EOT = "<|endoftext|>"  # how decode shows the end of a document


def byte_table(pieces: dict[int, bytes], size: int) -> list[bytes]:
    """(size,) the bytes of each id; b"" for those that stand for none."""
    return [pieces.get(i, b"") for i in range(size)]


def count_bytes(pieces: list[bytes]) -> np.ndarray:
    """(V,) int64: how many bytes each id stands for."""
    return np.array([len(piece) for piece in pieces], dtype=np.int64)


@functools.cache
def _alphabet() -> dict[str, int]:
    """How byte-level BPE writes each byte: printable ones as themselves, the others from U+0100 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [i for i in range(256) if i not in printable]
    return {chr(i): i for i in printable} | {chr(256 + n): i for n, i in enumerate(others)}


def unspell(piece: str) -> bytes:
    """The bytes that byte-level BPE writes as ``piece``; a piece with other characters stands for itself."""
    alphabet = _alphabet()
    return bytes(alphabet[c] for c in piece) if all(c in alphabet for c in piece) else piece.encode()


@functools.cache
def _spelling() -> list[str]:
    """(256,) the character of each byte."""
    return [character for character, _ in sorted(_alphabet().items(), key=lambda item: item[1])]


def spell(piece: bytes) -> str:
    """How byte-level BPE writes these bytes."""
    return "".join(_spelling()[byte] for byte in piece)
