"""GPT: embedding -> position -> blocks -> norm -> head. Gin binds a class to each slot of a layer.

Shapes: B batch, T tokens, C model dim, V vocabulary, D head dim."""

from __future__ import annotations

from typing import Annotated, Any

import torch
import torch.nn.functional as F
from annotated_types import Gt, Interval, Le
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from toolkit.context import Caches, Context
from toolkit.cpu.products import linear
from toolkit.linear import Linear
from toolkit.registry import able, register
from toolkit.seeding import initialize, seeded

Slot = type | list[type]


class Head:
    """The map from hidden states to logits, used by the loss and by generation.

    weight      (V plus padding, C): the rows from ``vocab_size`` on only pad the table
    vocab_size  V, without the padding
    softcap     bound of the logits, or None
    """

    def __init__(self, weight: Tensor, vocab_size: int, softcap: float | None):
        self.weight, self.vocab_size, self.softcap = weight, vocab_size, softcap

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., C) -> (..., V)."""
        logits = linear(hidden, self.weight)[..., : self.vocab_size]
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


@register("model")
class GPT(nn.Module):
    """A decoder-only transformer. A layer slot (block, mixer, position, attention, norm, ffn) takes one class for all
    layers, or a list of classes, which is repeated over the layers. The final norm is the last class in its list.

    dim            C, the width of the residual stream
    n_head         query heads per layer
    n_kv_head      key/value heads per layer; None: as many as query heads
    dropout        probability of dropout on the embedded tokens and on the output of each mixer and ffn
    tie_embeddings True: the embedding table is also the output matrix
    pad_vocab_to   the number of rows of the embedding table is rounded up to a multiple of this, for speed; the extra
                   rows give no logits
    logit_softcap  bounds the logits: softcap * tanh(logits / softcap); None: no bound
    embed_scale    factor of the embedded tokens, but not of the output matrix; None: 1. Gemma has sqrt(C)
    recompute      store only the input of each block, and compute the block again for its gradients (Chen et al. 2016,
                   arXiv:1604.06174). Activations then take about the memory of one layer, and a step takes a third
                   longer
    """

    def __init__(
        self,
        vocab_size: int,
        max_len: int,
        *,
        block: Slot,
        mixer: Slot,
        position: Slot,
        attention: Slot,
        norm: Slot,
        ffn: Slot,
        init: type,
        dim: Annotated[int, Gt(0)] = 768,
        n_layer: Annotated[int, Gt(0), Le(10_000)] = 12,
        n_head: Annotated[int, Gt(0)] = 12,
        n_kv_head: Annotated[int, Gt(0)] | None = None,
        dropout: Annotated[float, Interval(ge=0, lt=1)] = 0.0,
        tie_embeddings: bool = True,
        pad_vocab_to: Annotated[int, Gt(0)] = 128,
        logit_softcap: Annotated[float, Gt(0)] | None = None,
        embed_scale: Annotated[float, Gt(0)] | None = None,
        recompute: bool = False,
    ):
        super().__init__()
        n_kv_head = n_kv_head or n_head
        if dim % n_head:
            raise ValueError(f"GPT.dim = {dim} is not a multiple of GPT.n_head = {n_head}")
        if n_head % n_kv_head:
            raise ValueError(f"GPT.n_head = {n_head} is not a multiple of GPT.n_kv_head = {n_kv_head}")
        self.vocab_size, self.max_len, self.softcap = vocab_size, max_len, logit_softcap
        self.embed_scale: float | None = embed_scale
        self.recompute: bool = recompute
        seed = torch.initial_seed()
        slots = {"block": block, "mixer": mixer, "position": position, "attention": attention, "ffn": ffn, "norm": norm}
        layers = {slot: tile(slot, value, n_layer) for slot, value in slots.items()}

        padding = -vocab_size % pad_vocab_to
        self.padding = padding * dim * (1 if tie_embeddings else 2)  # parameters of the rows that pad the tables
        with seeded(seed, "embed"):
            self.embed = nn.Embedding(vocab_size, dim)
            self.embed.tied = tie_embeddings  # type: ignore[assignment]  # torch declares attributes as tensors
            self.unembed = None if tie_embeddings else Linear(dim, vocab_size, bias=False)
        position_classes = list(dict.fromkeys(layers["position"]))  # without repetitions
        self.positions = nn.ModuleList()
        for i, cls in enumerate(position_classes):
            with seeded(seed, f"positions.{i}"):
                self.positions.append(cls(dim, n_head, dim // n_head, max_len))
        self.blocks = nn.ModuleList()
        self.mixers: list[Any] = []  # a plain list, since the blocks register them as modules
        self.drop = nn.Dropout(dropout) if dropout else nn.Identity()
        for i in range(n_layer):
            classes = {slot: of_layer[i] for slot, of_layer in layers.items()}
            position_index = position_classes.index(classes["position"])
            self._append_layer((i, n_layer), classes, (dim, n_head, n_kv_head), position_index, seed)
        with seeded(seed, "norm"):
            self.norm = (norm[-1] if isinstance(norm, list) else norm)(dim)
        initialize(self, init(n_layer), seed)
        self._append_padding_rows(padding)

    def forward(self, ids: Tensor, context: Context | None = None) -> tuple[Tensor, Head]:
        """ids (B, T) -> hidden (B, T, C), head. With ``context.cache``, the first id of each row is at position
        ``context.start``. Raises ValueError if the last id is past ``max_len``."""
        context = context or Context()
        length = ids.shape[1]
        if context.positions is None:
            offset = 0 if context.start is None else context.start
            context.positions = (offset + torch.arange(length, device=ids.device))[None]  # (1, T)
        self._check_length(length, context)
        x = self.embed(ids)  # (B, T, C)
        x = x if self.embed_scale is None else x * self.embed_scale
        context.position = list(self.positions)
        keys = length if context.cache is None else self.max_len
        for part in context.position:
            if hasattr(part, "embed"):
                x = part.embed(x, context.positions)
            has_bias = hasattr(part, "score_bias")
            context.bias.append(self._score_bias(part, length, keys, context.start, x.device) if has_bias else None)
        x = self.drop(x)
        for block in self.blocks:
            recompute_block = self.recompute and self.training and torch.is_grad_enabled()
            x = _recomputed(block, x, context) if recompute_block else block(x, context)
        if x.ndim != 3:
            raise ValueError(
                f"hidden states have the shape {tuple(x.shape)} after the last block: {type(self.blocks[-1]).__name__} "
                "does not merge the streams that an earlier block added; give every layer of GPT.block the same part"
            )
        weight = self.embed.weight if self.unembed is None else self.unembed.weight
        return self.norm(x), Head(weight, self.vocab_size, self.softcap)

    def init_cache(self, batch: int, length: int | None = None) -> Caches | None:
        """Create ``context.cache`` for decoding, one entry per layer, with room for ``length`` positions (None:
        ``max_len``). Returns None if some mixer has no cache."""
        if any(getattr(mixer, "cache", True) is False for mixer in self.mixers):
            return None
        return [mixer.init_cache(batch, length or self.max_len) for mixer in self.mixers]

    def _append_layer(
        self, depth: tuple[int, int], classes: dict[str, type], widths: tuple[int, int, int], position: int, seed: int
    ) -> None:
        """Build one layer from one class per slot, and append it. Raises ValueError.

        ``depth`` is (index, n_layer), ``widths`` is (dim, n_head, n_kv_head), ``position`` is the index of the layer's
        position part."""
        index, dim = depth[0], widths[0]
        with seeded(seed, f"blocks.{index}.mixer"):
            mixer = classes["mixer"](*widths, position, classes["attention"], depth)
        if getattr(mixer, "cache", True) is not False and not hasattr(mixer, "init_cache"):
            raise ValueError(
                f"{type(mixer).__name__} has no method init_cache(batch, max_len) for decoding; if it keeps no cache, "
                "set its class attribute cache = False"
            )
        with seeded(seed, f"blocks.{index}.ffn"):
            ffn = classes["ffn"](dim)
        with seeded(seed, f"blocks.{index}"):
            self.blocks.append(classes["block"](dim, mixer, ffn, classes["norm"], depth))
        self._check_bias(mixer, self.positions[position])
        self.mixers.append(mixer)
        # Dropout is a hook, so that blocks need no code for it and no parameter changes its name. The hook is a bound
        # method, so that a copy of the model obeys the copy's own training or evaluation mode.
        for part in (mixer, ffn) if isinstance(self.drop, nn.Dropout) else ():
            part.register_forward_hook(self._drop_output)

    def _append_padding_rows(self, rows: int) -> None:
        """Append zero rows to the tables. The weights have been drawn already, so they do not depend on the padding."""
        for weight in [self.embed.weight] + ([] if self.unembed is None else [self.unembed.weight]):
            weight.data = F.pad(weight.data, (0, 0, 0, rows))

    def _drop_output(self, module: nn.Module, args: tuple[object, ...], out: Tensor) -> Tensor:
        """The dropout hook of mixers and ffns: (B, T, C) -> (B, T, C)."""
        return self.drop(out)

    @staticmethod
    def _score_bias(part: Any, length: int, keys: int, start: Tensor | None, device: torch.device) -> Tensor:
        """The score bias (H, length, keys) of a position part, for queries from position ``start`` on (None: 0)."""
        k = torch.arange(keys, device=device)
        q = k[:length] if start is None else start + k[:length]
        return part.score_bias(q, k)

    def _check_length(self, length: int, context: Context) -> None:
        """Raise ValueError if the last token is past ``max_len``."""
        end = context.end
        if end is None:
            end = length + (0 if context.start is None or torch.compiler.is_compiling() else int(context.start))
        if end > self.max_len:
            raise ValueError(f"{end} tokens do not fit into the context of {self.max_len} tokens (seq_len)")

    @staticmethod
    def _check_bias(mixer: nn.Module, position: nn.Module) -> None:
        """Raise ValueError if the position part adds a score bias that the mixer does not support."""
        uses_position = "position" not in getattr(mixer, "ignores", ())
        if uses_position and hasattr(position, "score_bias") and "bias" not in getattr(mixer, "supports", set()):
            part = type(getattr(mixer, "attention", mixer)).__name__
            raise ValueError(
                f"{type(position).__name__} adds a score bias, which {part} does not support; use GPT.attention = "
                f"{able('attention', 'bias')}"
            )


def tile(slot: str, value: Slot, n_layer: int) -> list[type]:
    """Return one class per layer: a list is repeated over the layers. Raises ValueError for a list that is empty or
    longer than ``n_layer``."""
    classes = value if isinstance(value, list) else [value]
    if not 1 <= len(classes) <= n_layer:
        raise ValueError(f"GPT.{slot} lists {len(classes)} parts for GPT.n_layer = {n_layer}; it needs 1 to {n_layer}")
    return [classes[i % len(classes)] for i in range(n_layer)]


def _recomputed(block: nn.Module, x: Tensor, context: Context) -> Tensor:
    """Run a block that keeps only its input, and is computed again for its gradients: then too, it finds in
    ``context.shared`` what the layers before it have put there, and nothing of later layers."""
    if torch.compiler.is_compiling():  # the compiler accepts no assignment to ``context`` here
        return checkpoint(block, x, context, use_reentrant=False)
    shared = dict(context.shared)

    def run(x: Tensor) -> Tensor:
        context.shared = dict(shared)
        return block(x, context)

    return checkpoint(run, x, use_reentrant=False)
