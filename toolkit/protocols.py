"""The kinds of part, and what a part of each kind must provide. The author of a part needs to read only this file.

A part is a class with the methods of its kind. It need not inherit from anything. A part may leave out attributes and
methods that are listed under "Optional". The toolkit reads no attributes that this file does not list.

The toolkit passes the arguments of ``__init__`` that this file lists, by position; gin can't bind them. Every further
argument of a constructor is a knob. Gin may bind a knob; otherwise its default is used. The value is checked against
the annotation, for example ``Annotated[int, Gt(0)]``. A knob named after a kind is a slot: it takes the class of a part
and has no default. A knob whose name ends in a kind (``qk_norm: type | None = None``) is a slot that may stay empty.
A constructor raises ValueError for arguments that the part does not support. The message says what to change.

Shapes: B batch, T queries, S keys, H heads, G key/value heads, D head dim, C model dim, V vocabulary, N = B * T.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor, nn

    from toolkit.context import Context, Mask
    from toolkit.measures import Continuation, Score, TokenNats


class Attention(Protocol):
    """Mixes values over positions: q (B,T,H,D), k (B,S,G,D), v (B,S,G,Dv) -> (B,T,H,Dv), in the same dtype.

    ``mask=None`` means plain causal attention with S = T. A mask says what to apply in addition to the causal mask.

    Optional:
    supports        class attribute: the set of features that the part implements (default: none). Error messages list
                    the parts with a feature. "offset": queries that start at ``mask.start``, as in decoding with a
                    cache. "bias": a score bias, ``mask.bias``. "documents": no attention from one document to another,
                    ``mask.documents``. "gqa": fewer key/value heads than query heads, G < H
    implementation  a method (device type, dtype, batch, length) -> str: the name of the kernel that computes such an
                    input. It is written into facts.json, the facts of a run
    """

    def __init__(self, n_head: int, head_dim: int) -> None: ...

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None = None) -> Tensor: ...


class Position(Protocol):
    """Encodes the positions of tokens with one or more of three methods. With none of them, nothing is encoded.

    Optional:
    embed       embed(x (B,T,C), positions (B|1,T)) -> (B,T,C), called once per forward pass on the embedded tokens
    rotate      rotate(q (B,T,H,D), k (B,T,G,D), positions (B|1,T)) -> q, k, called by each mixer. D is the last
                dimension of q; it may differ from ``head_dim``
    score_bias  score_bias(q_positions (T,), k_positions (S,)) -> (H,T,S), called once per forward pass. The result is
                added to the attention scores
    """

    def __init__(self, dim: int, n_head: int, head_dim: int, max_len: int) -> None: ...


class Mixer(Protocol):
    """Mixes over positions, with its own input and output projections: x (B,T,C) -> (B,T,C).

    ``position`` is the index of this layer's position part in ``context.position`` and ``context.bias``. ``attention``
    is a class to build with (n_head, head_dim), and ``depth`` is (index, n_layer).

    Optional:
    init_cache  init_cache(batch, max_len) returns the initial ``context.cache[index]`` for decoding: tensors of a fixed
                size on the model's device, whose first axis is the batch. Generation may use a filled cache again, from
                position 0 on, for other text
    cache       False for a mixer without a cache. It needs no ``init_cache``, and generation recomputes all tokens
    supports    as for Attention; usually the set of the attention part
    ignores     class attribute: the slots and knobs of GPT that the mixer does not use, such as ("attention",
                "position", "n_kv_head")
    attention   the attention part that the mixer has built. Error messages and facts.json name it
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
    """x (B,T,C) -> (B,T,C), each position independently of the others. Auxiliary losses go into ``context.losses``.

    The knob for the width is called ``hidden``. None means the width with which the part has as many parameters as a
    plain network C -> 4C -> C."""

    def __init__(self, dim: int) -> None: ...

    def forward(self, x: Tensor, context: Context) -> Tensor: ...


class Block(Protocol):
    """The residual connections around a mixer and an ffn.

    ``mixer`` and ``ffn`` are built modules, ``norm`` is a class, ``depth`` is (index, n_layer). The first block takes
    (B,T,C) and the last block returns (B,T,C). Between blocks x may have any shape: the first block may add residual
    streams, and the last block must merge them."""

    def __init__(self, dim: int, mixer: nn.Module, ffn: nn.Module, norm: type, depth: tuple[int, int]) -> None: ...

    def forward(self, x: Tensor, context: Context) -> Tensor: ...


class Module(Protocol):
    """Any module inside a model. This is not a kind of part: a part of any kind may set these attributes on its layers.

    Optional:
    residual         True for a Linear that projects back into the residual stream: ``linear.residual = True``
    merged           for a Linear whose weight holds several matrices, the number of rows of each:
                     ``linear.merged = {"q": 64, "k": 32}``. toolkit.linear.Merged sets it. Inits and optimizers then
                     treat each matrix separately
    tied             True for an embedding whose weight is also the output matrix
    draw             a method (name, parameter, generator) that fills the module's own parameters, instead of the init
    idle_parameters  the number of the module's parameters that one token does not use, as in a mixture of experts
    """


class Init(Protocol):
    """Fills ``parameter`` in place from ``generator``. It is called for the weights and biases of every Linear and
    Embedding; all other parameters keep the values from their constructor.

    ``parameter.residual``, ``parameter.merged`` and ``parameter.tied`` are copies of the layer's attributes (see
    Module); the defaults are False, None and False. The init is also called for parameters on the meta device, which
    hold no values.

    Optional:
    parameter.lr_scale  a factor for the parameter's learning rate, which the init may set
    """

    def __init__(self, n_layer: int) -> None: ...

    def __call__(self, name: str, parameter: Tensor, generator: torch.Generator) -> None: ...


class Model(Protocol):
    """ids (B,T) -> hidden (B,T,C), head. ``max_len`` is the longest context in tokens; ``forward`` raises ValueError
    for a token after it.

    Optional:
    init_cache  init_cache(batch) returns ``context.cache`` for decoding, or None if some mixer has no cache. Without
                this method, generation recomputes all tokens. If it takes a second argument ``length``, the positions
                for which there must be room, evaluators use less memory
    mixers      the mixers of all layers, in order. With ``Experiment.mask_documents``, each must support "documents"
    supports    {"documents"} for a model without ``mixers`` in which no token attends to another document
    embed       the embedding, a module. ``components check`` follows gradients to its output
    unembed     the Linear with the output matrix, unless the embedding's weight is used. Optimizers do not treat it as
                a hidden matrix
    padding     number of parameters in rows that only pad the vocabulary; parameter counts leave them out
    mask_documents  ``toolkit.load`` and ``toolkit.build`` set it to the value of Experiment.mask_documents, so that
                    ``toolkit.read`` reads a text as it was read in training
    """

    max_len: int

    def __init__(self, vocab_size: int, max_len: int) -> None: ...

    def forward(self, ids: Tensor, context: Context | None = None) -> tuple[Tensor, Head]: ...


class Head(Protocol):
    """The map from hidden states to logits, (..., C) -> (..., V). A model returns it; it is not a kind of part.

    ``weight`` is (V plus padding, C): rows from ``vocab_size`` on only pad the table and give no logits. ``softcap``
    bounds the logits: softcap * tanh(logits / softcap). None means no bound."""

    weight: Tensor
    vocab_size: int
    softcap: float | None

    def logits(self, hidden: Tensor) -> Tensor: ...


class Loss(Protocol):
    """hidden (N,C), head, targets (N,) -> (objective, nats, count), three scalars. Targets of -100 are ignored.

    ``objective`` is differentiated and ``nats`` is the plain cross-entropy, both summed over the targets that are not
    ignored. ``count`` is the number of these targets. The loop divides by the count of the whole step, so that several
    micro-batches give the same gradient as one large batch."""

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
    """step -> a factor for the peak learning rate, for 0 <= step < steps. It must depend on nothing but the step."""

    def __init__(self, steps: int) -> None: ...

    def __call__(self, step: int) -> float: ...


class Tokenizer(Protocol):
    """Converts text to ids and back.

    Attributes: ``vocab_size`` (known without I/O), ``eot`` (the id that ends a document), and ``byte_lengths`` ((V,)
    int array: how many UTF-8 bytes each id stands for, 0 for special tokens). ``save`` writes all files that ``load``
    needs. After ``load``, on another machine too, the encoding and the ``fingerprint`` must be the same as before. The
    fingerprint covers the knobs and everything that was learnt from text.

    Optional:
    train           train(texts) learns from text. The data part calls it unless the tokenizer is trained or loaded
    lossy           True if decode(encode(text)) may differ from the text
    pieces          a list with the bytes of each id, from which the vocabulary can be reduced to fewer ids
    encode_batch    encode_batch(texts) -> (ids (N,), counts (len(texts),)), two integer arrays: the ids of all texts
                    one after the other, and the number of ids of each text. It must return the same ids as ``encode``,
                    only faster. Several threads may call it at the same time. The data part compares a sample with
                    ``encode``; if they differ, it encodes everything again with ``encode``. In a class that overrides
                    only ``encode``, an inherited ``encode_batch`` is ignored
    implementation  a str: the library that ``encode_batch`` uses. The manifest of the token files contains it
    tokenizer_json  tokenizer_json() returns the content of a file of the tokenizers library that gives the same ids, in
                    which the id ``eot`` is a special token. It raises ValueError with the reason if there can be none.
                    ``convert`` writes the file, and compares the ids
    reads_tokenizer_json
                    class attribute: True for a part that reads such a file from its knob ``path``; its knob ``eot``
                    names the token that ends a document. A model that ``convert`` brings in gets this part
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

    The constructor does no I/O. ``prepare()`` does all I/O, and a second call does nothing. Sample j of a split depends
    only on (seed, split, j). ``batch`` returns the samples from index * size to index * size + size - 1 as
    (size, seq_len + 1) int64. ``windows(split)`` is the number of distinct samples: an epoch contains each of them
    once.

    Optional:
    targets     a method that says which tokens the model must predict: targets(samples (B,T+1)) -> (B,T) int64, the
                next tokens samples[:, 1:] where a loss is computed, and -100 elsewhere. Each sample has a target. It
                must not change ``samples``. Without this method, all next tokens are targets
    encoded_by  a str: the method and library that encoded the text. It is written into facts.json
    """

    def __init__(self, tokenizer: Tokenizer, seq_len: int, seed: int) -> None: ...

    def prepare(self) -> None: ...

    def windows(self, split: str) -> int: ...

    def batch(self, split: str, index: int, size: int) -> np.ndarray: ...

    def fingerprint(self) -> str: ...


class Logger(Protocol):
    """Shows the metrics and texts that the loop reports. Metric names contain the unit: val/loss_nats, time/step_ms.

    ``start_step`` is 0, or the step at which a resumed run continues. If the run logged this step or later ones before
    it was resumed, these entries are invalid. When a logger is built, ``run_dir`` already contains facts.json and
    config.gin. ``close(summary)`` is the last call. A logger runs in its own thread, which receives the calls through a
    queue. It must not draw random numbers with torch.

    Optional:
    flush      a method that writes buffered entries to files. It is called before each checkpoint is saved
    histogram  histogram(step, name, values): shows an array of numbers (N,) of a probe
    """

    def __init__(self, run_dir: Path, start_step: int) -> None: ...

    def log(self, step: int, metrics: dict[str, float]) -> None: ...

    def text(self, step: int, name: str, text: str) -> None: ...

    def close(self, summary: dict[str, float]) -> None: ...


class Reader(Protocol):
    """The trained model that an evaluator gets. ``max_len`` is the model's context in tokens. Texts may have any
    length; results do not depend on the order of the texts, nor, but for rounding, on how they are batched.

    ``nats`` gives the nats of each token of each text, read as a document: after the token ``eot``.
    ``token_nats`` gives the same for sequences of ids: (T,) float64 for T ids. ``token_greedy`` says for each of these
    ids whether it is the likeliest one: (T,) bool.
    ``continuations`` gives the nats of the second text of each pair, after the first.
    ``generate`` continues each prompt by up to ``max_tokens`` tokens, up to the end of the document or the first of the
    texts ``stop``; the result has neither the prompt nor ``stop``. ``temperature`` 0 takes the likeliest token."""

    tokenizer: Tokenizer
    max_len: int

    def nats(self, texts: Sequence[str]) -> list[TokenNats]: ...

    def token_nats(self, sequences: Sequence[Sequence[int]]) -> list[np.ndarray]: ...

    def token_greedy(self, sequences: Sequence[Sequence[int]]) -> list[np.ndarray]: ...

    def continuations(self, pairs: Sequence[tuple[str, str]]) -> list[Continuation]: ...

    def generate(
        self, prompts: Sequence[str], max_tokens: int, stop: Sequence[str] = (), temperature: float = 0.0
    ) -> list[str]: ...


class Evaluator(Protocol):
    """Measures a trained model: reader -> {metric: Score}.

    ``higher_is_better`` says for all its metrics which direction is better. The constructor does no I/O;
    ``prepare()`` reads the items, and raises ValueError with file and line for an item that is not valid.
    ``fingerprint()`` covers the items and the knobs: two runs with the same fingerprint were measured alike.

    ``evaluate`` gets a Reader, with which it reads and continues texts. Its scores depend on nothing but the model's
    weights, the items and the knobs: it draws no random numbers from torch, and does not change the model. Each Score
    (toolkit/measures.py) has a value, a unit and, if the metric is measured item by item, the value of each item.

    Optional:
    lower_is_better  the names of metrics for which lower is better although ``higher_is_better`` is True; ``prepare``
                     may set it
    min_context      the number of tokens that the model's context must hold. A shorter ``Experiment.seq_len`` is
                     refused before anything is read
    """

    higher_is_better: bool

    def __init__(self) -> None: ...

    def prepare(self) -> None: ...

    def fingerprint(self) -> str: ...

    def evaluate(self, reader: Reader) -> dict[str, Score]: ...


class Views(Protocol):
    """What a probe may look at: a copy of the model, in evaluation mode, with the weights before the update of a step,
    and the results of a forward and backward pass over a few validation sequences, always the same ones.

    Mappings have the dotted names of modules or parameters as keys. Modules that did not run are missing; one that runs
    several times in a pass is there as NAME, NAME#2 and so on. A probe must not change what it gets.

    model             the copy
    ids, targets      (B,T), the sequences
    places            {module name: "block", "mixer" or "ffn"}, in the order of the model. A model without registered
                      blocks has "part" for the modules of a block that are neither mixer nor ffn
    weights           each parameter
    activations       the output of each module
    inputs            the first input of each module
    gradients         the gradient of the mean loss for the output of each module
    attention         (B,H,T,S) float32, the attention weights of each kernel of ``model.mixers``; None for a kernel
                      whose output is no weighted sum of its values. They are computed each time one is read
    logits            (B,T,V) float32, computed each time it is read
    weight_gradients  the gradient of the mean loss for each parameter that has one
    updates           what the step has added to each parameter, computed each time one is read
    """

    model: nn.Module
    ids: Tensor
    targets: Tensor

    @property
    def places(self) -> dict[str, str]: ...

    @property
    def weights(self) -> Mapping[str, Tensor]: ...

    @property
    def activations(self) -> Mapping[str, Tensor]: ...

    @property
    def inputs(self) -> Mapping[str, Tensor]: ...

    @property
    def gradients(self) -> Mapping[str, Tensor]: ...

    @property
    def attention(self) -> Mapping[str, Tensor | None]: ...

    @property
    def logits(self) -> Tensor: ...

    @property
    def weight_gradients(self) -> Mapping[str, Tensor]: ...

    @property
    def updates(self) -> Mapping[str, Tensor]: ...


class Probe(Protocol):
    """Looks inside the model at some steps of training: views -> {name: number, array or None}.

    ``needs`` is a class attribute: the set of the views that the probe reads, of activations, inputs, gradients,
    attention, logits, weight_gradients and updates. What no probe needs is not computed.

    A name is STATISTIC, or STATISTIC/MODULE with the dotted name of a module or parameter; in rows it becomes
    ``probe/NAME/STATISTIC/MODULE``. A number (a float or a tensor with one element) goes into the rows, an array of at
    most 100,000 numbers to the loggers that have ``histogram``. None says that the statistic does not apply. What is
    None or not finite is left out of the rows. The result depends on nothing but the views and the knobs.

    Optional:
    statistics  class attribute: the names of the single numbers, STATISTIC, or STATISTIC/MODULE for one that is given
                for several modules: ("rms", "norm/MODULE"). A plan whose metric is none of them is refused
    """

    needs: Set[str]

    def __init__(self) -> None: ...

    def observe(self, views: Views) -> dict[str, float | Tensor | np.ndarray | None]: ...


class Experiment(Protocol):
    """The root of the config. The toolkit has one class of this kind, in ``toolkit/experiment.py``."""

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
    "evaluator": Evaluator,
    "probe": Probe,
    "experiment": Experiment,
}
