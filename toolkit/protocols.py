"""The kinds of part, and what a part of each kind must provide. The author of a part needs to read only this file.

A part is a class with the methods of its kind. It need not inherit from anything. Attributes and methods listed under
"Optional" may be left out, and the toolkit reads no others.

The toolkit passes the arguments of ``__init__`` that are listed here, by position; gin can't bind them. Every further
argument of a constructor is a knob: gin may bind it, its value is checked against its annotation (for example
``Annotated[int, Gt(0)]``), and its default is used if nothing binds it. A knob named after a kind is a slot for a part
and has no default. A knob whose name ends in a kind (``qk_norm: type | None = None``) is a slot that may stay empty.
If a part can't do what it is asked for, its constructor raises a ValueError that says what to change.

Shapes: B batch, T queries, S keys, H heads, G key/value heads, D head dim, C model dim, V vocabulary, N = B * T.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor, nn

    from toolkit.context import Context, Mask


class Attention(Protocol):
    """Mixes values over positions: q (B,T,H,D), k (B,S,G,D), v (B,S,G,Dv) -> (B,T,H,Dv), in the same dtype.

    ``mask=None`` means plain causal attention with S = T. Otherwise the mask says what to apply in addition.

    Optional:
    supports        the set of features that the part implements; without it, none. "offset": queries that start at
                    ``mask.start``, as in decoding with a cache. "bias": a score bias, ``mask.bias``. "documents": no
                    attention from one document to another, ``mask.documents``. "gqa": fewer key/value heads than query
                    heads, G < H. A class attribute, so that error messages can list the parts with a feature
    implementation  a method (device type, dtype, batch, length) -> str: which kernel such an input takes, for the facts
                    of a run
    """

    def __init__(self, n_head: int, head_dim: int) -> None: ...

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None = None) -> Tensor: ...


class Position(Protocol):
    """Gives the model the positions of tokens, by any of three methods. A part with none of them gives no positions.

    Optional:
    embed       embed(x (B,T,C), positions (B|1,T)) -> (B,T,C), called once per forward pass on the embedded tokens
    rotate      rotate(q (B,T,H,D), k (B,T,G,D), positions (B|1,T)) -> q, k, called by each mixer. D is that of q, which
                may differ from ``head_dim``
    score_bias  score_bias(q_positions (T,), k_positions (S,)) -> (H,T,S), called once per forward pass. The result is
                added to the attention scores
    """

    def __init__(self, dim: int, n_head: int, head_dim: int, max_len: int) -> None: ...


class Mixer(Protocol):
    """Mixes over positions and owns the projections: x (B,T,C) -> (B,T,C).

    ``position`` is the index of this layer's position part in ``context.position`` and ``context.bias``. ``attention``
    is a class to build with (n_head, head_dim), and ``depth`` is (index, n_layer).

    Optional:
    init_cache  init_cache(batch, max_len) returns the initial ``context.cache[index]`` for decoding: tensors of a fixed
                size on the model's device. The cache may be used again from start 0 for another text
    cache       False for a mixer without a cache, which then needs no ``init_cache``: generation recomputes all tokens
    supports    as for Attention; usually the set of the attention part
    ignores     class attribute: the slots and knobs of GPT that the mixer does not use, such as ("attention",
                "position", "n_kv_head")
    attention   the attention part that the mixer has built. Error messages and the facts of a run name it
    """

    def __init__(
        self, dim: int, n_head: int, n_kv_head: int, position: int, attention: type, depth: tuple[int, int]
    ) -> None: ...

    def forward(self, x: Tensor, context: Context) -> Tensor: ...


class Norm(Protocol):
    """(..., C) -> (..., C). ``torch.nn.LayerNorm`` can be used unchanged."""

    def __init__(self, dim: int) -> None: ...

    def forward(self, x: Tensor) -> Tensor: ...


class Ffn(Protocol):
    """x (B,T,C) -> (B,T,C), each position independently of the others. The knob for the width is called ``hidden``;
    None means the width that gives as many parameters as the plain 4C network. Auxiliary losses go into
    ``context.losses``."""

    def __init__(self, dim: int) -> None: ...

    def forward(self, x: Tensor, context: Context) -> Tensor: ...


class Block(Protocol):
    """The residual connections around a mixer and an ffn: (B,T,C) into the first block, (B,T,C) out of the last.

    ``mixer`` and ``ffn`` are built modules, ``norm`` is a class, ``depth`` is (index, n_layer). Between blocks x may
    have any shape: the first block may add residual streams, and the last block must merge them."""

    def __init__(self, dim: int, mixer: nn.Module, ffn: nn.Module, norm: type, depth: tuple[int, int]) -> None: ...

    def forward(self, x: Tensor, context: Context) -> Tensor: ...


class Module(Protocol):
    """Any module inside a model; not a kind of part. A part of any kind may set these attributes on its layers.

    Optional:
    residual         True for a Linear that projects back into the residual stream: ``linear.residual = True``
    merged           the rows of each matrix that a Linear merges: ``linear.merged = {"q": 64, "k": 32}``, or use
                     toolkit.linear.Merged. Inits and optimizers then treat each matrix separately
    tied             True for an embedding whose weight is also the output matrix
    draw             a method (name, parameter, generator) that fills the module's own parameters, instead of the init
    idle_parameters  how many of the module's parameters one token does not use, as in a mixture of experts
    """


class Init(Protocol):
    """Fills ``parameter`` in place from ``generator``. It is called for the weights and biases of every Linear and
    Embedding; all other parameters keep the values from their constructor.

    ``parameter.residual``, ``parameter.merged`` and ``parameter.tied`` have the values of the parameter's layer (see
    Module); the defaults are False, None and False. On the meta device the init is called too, although nothing is
    drawn.

    Optional:
    parameter.lr_scale  a factor for the parameter's learning rate, which the init may set
    """

    def __init__(self, n_layer: int) -> None: ...

    def __call__(self, name: str, parameter: Tensor, generator: torch.Generator) -> None: ...


class Model(Protocol):
    """ids (B,T) -> hidden (B,T,C), head. Raises ValueError for tokens past ``max_len``, an attribute.

    Optional:
    init_cache  init_cache(batch) returns ``context.cache`` for decoding, or None if some mixer has no cache. Without
                this method, generation recomputes all tokens
    mixers      the mixers of all layers, in order. ``Experiment.mask_documents`` asks each for its ``supports``
    supports    {"documents"} for a model without ``mixers`` in which no token attends to another document
    embed       the embedding, a module. ``components check`` follows gradients to its output
    unembed     the output matrix, a Linear, if it is not the embedding. Optimizers do not treat it as a hidden matrix
    padding     number of parameters in rows that only pad the vocabulary; counts leave them out
    """

    max_len: int

    def __init__(self, vocab_size: int, max_len: int) -> None: ...

    def forward(self, ids: Tensor, context: Context | None = None) -> tuple[Tensor, Head]: ...


class Head(Protocol):
    """The map from hidden states to logits, (..., C) -> (..., V), which a model returns; not a kind of part.

    ``weight`` is (V plus padding, C): rows from ``vocab_size`` on only pad the table and give no logits. ``softcap``
    bounds the logits, softcap * tanh(logits / softcap); None: no bound."""

    weight: Tensor
    vocab_size: int
    softcap: float | None

    def logits(self, hidden: Tensor) -> Tensor: ...


class Loss(Protocol):
    """hidden (N,C), head, targets (N,) -> (objective, nats, count), three scalars. Targets of -100 are ignored.

    ``objective`` is differentiated and ``nats`` is the plain cross-entropy, both summed over the targets that are not
    ignored; ``count`` is the number of these targets. The loop divides by the count of the whole step, so that
    accumulated micro-batches equal one large batch."""

    def __init__(self) -> None: ...

    def forward(self, hidden: Tensor, head: Head, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]: ...


class Optimizer(Protocol):
    """A ``torch.optim.Optimizer`` over ``toolkit.groups.parameter_groups(model, ...)``.

    Optional:
    eval   a method that puts averaged weights into the model; the loop calls it before evaluation, sampling and saving
    train  the method that puts the training weights back; an optimizer has both methods or neither
    """

    def __init__(self, model: nn.Module) -> None: ...

    def step(self) -> object: ...


class Schedule(Protocol):
    """step -> a factor for the peak learning rate, a function of the step alone, defined for 0 <= step < steps."""

    def __init__(self, steps: int) -> None: ...

    def __call__(self, step: int) -> float: ...


class Tokenizer(Protocol):
    """Converts text to ids and back.

    Attributes: ``vocab_size`` (known without I/O), ``eot`` (the id that ends a document), and ``byte_lengths`` ((V,)
    int array: how many UTF-8 bytes each id stands for, 0 for special tokens). ``save`` writes all that ``load`` needs,
    on another machine too, to encode in the same way and with the same ``fingerprint``. The fingerprint covers the
    knobs and what was learnt.

    Optional:
    train           train(texts) learns from text. The data part calls it unless the tokenizer is trained or loaded
    lossy           True if decode(encode(text)) may differ from the text
    pieces          the bytes of each id; with them a vocabulary can be reduced to fewer ids
    encode_batch    encode_batch(texts) -> (ids (N,), counts (len(texts),)), two integer arrays: the ids of all texts
                    one after the other, and the number of ids of each text. A faster way to the ids of ``encode``,
                    called by several threads at a time. The data part compares a sample with ``encode``; if they
                    differ, it encodes everything again with ``encode``. It ignores an inherited ``encode_batch`` in a
                    class that overrides only ``encode``
    implementation  a str: the library that ``encode_batch`` uses, for the manifest of the token files
    """

    vocab_size: int
    eot: int

    @property
    def byte_lengths(self) -> np.ndarray: ...

    def __init__(self) -> None: ...

    def encode(self, text: str) -> Sequence[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def fingerprint(self) -> str: ...

    def save(self, folder: Path) -> None: ...

    def load(self, folder: Path) -> None: ...


class Data(Protocol):
    """Samples of seq_len + 1 tokens, in the splits "train" and "val".

    The constructor does no I/O; ``prepare()`` does all of it, and further calls cost nothing. Sample j of a split
    depends only on (seed, split, j). ``batch`` returns the samples from index * size to index * size + size - 1 as
    (size, seq_len + 1) int64. ``windows(split)`` is the number of distinct samples; each epoch has every sample once.

    Optional:
    encoded_by  a str: the method and library that encoded the text, for the facts of a run
    """

    def __init__(self, tokenizer: Tokenizer, seq_len: int, seed: int) -> None: ...

    def prepare(self) -> None: ...

    def windows(self, split: str) -> int: ...

    def batch(self, split: str, index: int, size: int) -> np.ndarray: ...

    def fingerprint(self) -> str: ...


class Logger(Protocol):
    """Shows what the loop reports. Metrics have their unit in their name: val/loss_nats, time/step_ms.

    ``start_step`` is 0, or the step at which a resumed run continues: entries of later steps that were logged before
    the resumption are invalid. ``run_dir`` contains the run's facts and config before a logger is built.
    ``close(summary)`` is the last call. A logger runs in its own thread, behind a queue, and must draw no random
    numbers from torch.

    Optional:
    flush  a method that writes buffered entries to files. It is called before each checkpoint is saved
    """

    def __init__(self, run_dir: Path, start_step: int) -> None: ...

    def log(self, step: int, metrics: dict[str, float]) -> None: ...

    def text(self, step: int, name: str, text: str) -> None: ...

    def close(self, summary: dict[str, float]) -> None: ...


class Experiment(Protocol):
    """The root of the config: its fields are the whole config. The toolkit has one, in ``toolkit/experiment.py``."""

    def __init__(self) -> None: ...


KINDS: dict[str, type] = {
    "attention": Attention,
    "position": Position,
    "mixer": Mixer,
    "norm": Norm,
    "ffn": Ffn,
    "block": Block,
    "init": Init,
    "model": Model,
    "loss": Loss,
    "optimizer": Optimizer,
    "schedule": Schedule,
    "tokenizer": Tokenizer,
    "data": Data,
    "logger": Logger,
    "experiment": Experiment,
}
