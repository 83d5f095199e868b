"""The frame: kinds of part, registry, guards, model, loop and commands. It knows no part by name."""


def load(run: str):
    """(model, tokenizer) of a run or a checkpoint in one, the model in evaluation mode: for notebooks."""
    from toolkit.compose import open_run

    opened = open_run(run)
    return opened.model, opened.tokenizer
