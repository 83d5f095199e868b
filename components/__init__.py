"""The shelf. Importing it registers every part: one file per kind, and no file imports another."""

from components import (  # noqa: F401
    architecture,
    attention,
    block,
    data,
    evaluator,
    ffn,
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
