"""The shelf. Importing it registers every part: one file per kind, except that stories and sequences have files of
their own, and that the architectures of transformers have a folder. No file imports another, but for the helpers in its
own folder."""

from components import (  # noqa: F401
    architecture,
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
    probe,
    schedule,
    sequences,
    stories,
    tokenizer,
)
