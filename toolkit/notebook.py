"""Models in Python: load the model of a run, build one without training, and read a text with it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from toolkit import attention_weights
from toolkit.compose import compose, device_of, folder_of, listed, open_run, try_build
from toolkit.config.layers import BASE
from toolkit.context import Context
from toolkit.evaluation.reader import Reader, reader_of
from toolkit.experiment import Experiment
from toolkit.experiment import build as build_parts
from toolkit.objective import documents
from toolkit.protocols import Model, Tokenizer


def load(
    run: str | Path, imports: str | Path | Iterable[str | Path] = (), device: str | None = None
) -> tuple[nn.Module, Tokenizer]:
    """Load the model of a run, or of one of its checkpoints: (model, tokenizer), with the model in evaluation mode.

    run      folder of a run (its best checkpoint is loaded), or of a checkpoint
    imports  modules or Python files with parts that the run needs but has no copy of
    device   "cpu", "cuda" ...; None: a GPU if there is one

    ``model(ids (B,T))`` returns (hidden (B,T,C), head), and ``head.logits(hidden)`` the logits (B,T,V). Raises
    ValueError."""
    opened = open_run(folder_of("run", run), device=device, imports=listed("imports", imports))
    return _marked(opened.model, opened.experiment), opened.tokenizer


def build(
    overlays: str | Path | Iterable[str | Path] = (),
    bindings: str | Iterable[str] = (),
    *,
    base: str | Path | None = None,
    imports: str | Path | Iterable[str | Path] = (),
    device: str | None = None,
) -> tuple[nn.Module, Tokenizer]:
    """Build the model of a config without training it: (model, tokenizer), with the model in evaluation mode. Its
    weights are those of ``train`` at step 0 with the same arguments.

    overlays  gin files; each overrides ``base`` and the files before it
    bindings  texts such as "GPT.n_layer = 6", which override the files
    base      the file to start from; None: gin/default.gin
    imports   modules or Python files with your own parts. A file that was changed is imported again
    device    "cpu", "cuda" ...; None: a GPU if there is one

    No text is read, except for a tokenizer that learns from the text. Raises ValueError."""
    overlays, bindings, imports = listed("overlays", overlays), listed("bindings", bindings), listed("imports", imports)
    target = device_of(device)
    config, _ = compose(overlays, bindings, folder_of("base", base or BASE), imports)
    experiment, blank = try_build(config)
    if hasattr(blank.tokenizer, "train"):
        blank.data.prepare()
    parts = build_parts(experiment, target, blank.tokenizer, blank.data)
    return _marked(parts.model.eval(), experiment), parts.tokenizer


def reader(run: str | Path, imports: str | Path | Iterable[str | Path] = (), device: str | None = None) -> Reader:
    """Load a run as evaluators see it; the arguments are those of ``load``. The reader has the methods

    nats(texts)                   nats and bytes of each token, for texts of any length
    continuations(pairs)          nats of the second text of each pair after the first
    generate(prompts, max_tokens) continued texts

    and the attributes ``model`` and ``tokenizer``. It computes in float32, unless it is used within
    ``torch.autocast``. Your own evaluator can be tried in this way: ``MyEvaluator().evaluate(reader)``. Raises
    ValueError."""
    opened = open_run(folder_of("run", run), device=device, imports=listed("imports", imports))
    return reader_of(opened.experiment, _marked(opened.model, opened.experiment), opened.tokenizer)


@dataclass(frozen=True)
class Reading:
    """A text of T tokens as a model reads it. The model reads one token more: first the token that ends a document,
    then those of the text. Row i of ``logits`` and ``attention`` belongs to the position from which token i of the text
    is predicted; the last row belongs to the token after the text. All tensors are on the CPU.

    text       the text
    tokens     T pieces of the text; U+FFFD where a token is only a part of a character
    ids        (T,) int64
    logits     (T+1,V) float32
    nats       (T,) float32: -ln of the probability of each token, given those before it
    attention  {name of the kernel's module: (H,T+1,T+1) float32, of each query the weights of all keys}. Key 0 is the
               token before the text, key j is token j-1. None for a kernel that is no weighted sum of its values; {}
               for a model without ``mixers``
    """

    text: str
    tokens: list[str]
    ids: Tensor
    logits: Tensor = field(repr=False)
    nats: Tensor
    attention: dict[str, Tensor | None] = field(repr=False)


def read(model: nn.Module, tokenizer: Tokenizer, text: str) -> Reading:
    """Read a text with a model: its tokens, their logits and nats, and the attention weights of each layer.

    Raises ValueError for a model in training mode, and for a text that does not fit into the model's context."""
    if not isinstance(text, str):
        raise ValueError(f"text: a {type(text).__name__} is no text; read texts one by one")
    if model.training:
        raise ValueError("the model is in training mode, so dropout would change what it reads: call model.eval()")
    ids = torch.tensor([int(i) for i in tokenizer.encode(text)], dtype=torch.int64)
    longest = cast(Model, model).max_len - 1
    if len(ids) > longest:
        raise ValueError(
            f"the text has {len(ids)} tokens; with the token before the text, the model's context "
            f"(Experiment.seq_len) holds {longest}: read a shorter text, or use toolkit.reader(run).nats([text]), "
            "which reads texts of any length"
        )
    device = next(model.parameters()).device
    inputs = torch.cat((torch.tensor([tokenizer.eot]), ids))[None].to(device)  # (1,T+1)
    context = Context(*documents(inputs, tokenizer.eot)) if getattr(model, "mask_documents", False) else None
    with torch.no_grad(), attention_weights.recorded(model) as weights:
        hidden, head = model(inputs, context)
        logits = head.logits(hidden)[0].float().cpu()
    nats = nn.functional.cross_entropy(logits[:-1], ids, reduction="none")
    attention = {name: None if each is None else each[0].cpu() for name, each in weights.items()}
    return Reading(text, [tokenizer.decode([i]) for i in ids.tolist()], ids, logits, nats, attention)


def _marked(model: nn.Module, experiment: Experiment) -> nn.Module:
    """The model, marked with whether its experiment keeps documents apart, which ``read`` does as well."""
    model.mask_documents = experiment.mask_documents  # type: ignore[assignment]  # torch declares attributes as tensors
    return model
