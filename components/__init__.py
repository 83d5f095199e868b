"""The shelf. Importing it registers every part: one file per kind, and no file imports another."""

from components import (  # noqa: F401
    attention,
    block,
    data,
    evaluator,
    ffn,
    harness,
    init,
    logger,
    loss,
    mixer,
    norm,
    optimizer,
    position,
    schedule,
    stories,
    tokenizer,
)
