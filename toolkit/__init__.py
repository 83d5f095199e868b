"""The frame: kinds of part, registry, guards, model, loop and commands. It knows no part by name."""


def load(run: str, imports: tuple[str, ...] = ()):
    """(model, tokenizer) of a run or a checkpoint in one, the model in evaluation mode: for notebooks. ``imports`` are
    modules or files with parts that the run does not keep itself."""
    from toolkit.compose import open_run

    opened = open_run(run, imports=imports)
    return opened.model, opened.tokenizer


def __getattr__(name: str):
    """``from toolkit import register``, without importing the registry for those who don't: --help stays fast."""
    if name == "register":
        from toolkit.registry import register

        return register
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
