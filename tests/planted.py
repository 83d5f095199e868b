"""Parts with one fault each, and parts that look odd but are correct: they test the conformance check.

``@plant(kind, line)`` names the line of the report that must fail. None of these parts is registered."""

import hashlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from components.attention import MathAttention
from components.mixer import SelfAttention
from components.optimizer import AdamW
from components.stories import SyntheticStories
from components.tokenizer import Bytes
from toolkit.context import Context, Mask
from toolkit.evaluation.items import Item, fingerprint, read_items, text_of
from toolkit.groups import parameter_groups
from toolkit.measures import Score, mean
from toolkit.model import Head
from toolkit.protocols import Reader, Tokenizer, Views
from toolkit.registry import Entry, entry_of

Values = dict[str, float | Tensor | np.ndarray | None]  # of a probe
FAULTS: list[tuple[Entry, str]] = []
SOUND: list[Entry] = []


def plant(kind: str, line: str) -> Callable[[type], type]:
    """Class decorator for a broken part: ``line`` is the title of the check that must fail."""

    def add(cls: type) -> type:
        FAULTS.append((entry_of(kind, cls), line))
        return cls

    return add


def sound(kind: str) -> Callable[[type], type]:
    """Class decorator for a correct part: no check may fail."""

    def add(cls: type) -> type:
        SOUND.append(entry_of(kind, cls))
        return cls

    return add


# --- attention kernels


@plant("attention", "causal: later tokens change no output")
class OddMask(nn.Module):
    """Off by one, only where the length is odd and more than 1."""

    def __init__(self, n_head: int, head_dim: int) -> None:
        super().__init__()

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None = None) -> Tensor:
        length = q.shape[1]
        seen = torch.ones(length, length, dtype=torch.bool).tril(1 if length % 2 and length > 1 else 0)
        heads = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(*heads, attn_mask=seen).transpose(1, 2)


@plant("attention", "causal: no gradient from later tokens")
class GradientLeak(nn.Module):
    """Its values are right; its gradient comes from the future too."""

    def __init__(self, n_head: int, head_dim: int) -> None:
        super().__init__()
        self.kernel = MathAttention(n_head, head_dim)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None = None) -> Tensor:
        ahead = v.roll(-1, 1)
        return self.kernel(q, k, v) + ahead - ahead.detach()


class _Math(nn.Module):
    """Plain attention with a mask that a subclass changes."""

    def __init__(self, n_head: int, head_dim: int) -> None:
        super().__init__()
        self.kernel = MathAttention(n_head, head_dim)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None = None) -> Tensor:
        return self.kernel(q, k, v, mask and self.changed(mask))


@plant("attention", "applies or refuses the score bias")
class BiasDropped(_Math):
    supports = {"bias", "offset", "documents", "gqa"}

    def __init__(self, n_head: int, head_dim: int) -> None:
        super().__init__(n_head, head_dim)

    def changed(self, mask: Mask) -> Mask:
        return Mask(mask.start, mask.queries, mask.keys, mask.documents, None)


@plant("attention", "applies or refuses the score bias")
class BiasOfOneHeadForAll(_Math):
    supports = {"bias", "offset", "documents", "gqa"}

    def __init__(self, n_head: int, head_dim: int) -> None:
        super().__init__(n_head, head_dim)

    def changed(self, mask: Mask) -> Mask:
        bias = None if mask.bias is None else mask.bias.mean(0, keepdim=True).expand_as(mask.bias)
        return Mask(mask.start, mask.queries, mask.keys, mask.documents, bias)


@plant("attention", "document mask isolates each document")
class DocumentsDropped(_Math):
    supports = {"bias", "offset", "documents", "gqa"}

    def __init__(self, n_head: int, head_dim: int) -> None:
        super().__init__(n_head, head_dim)

    def changed(self, mask: Mask) -> Mask:
        return Mask(mask.start, mask.queries, mask.keys, None, mask.bias)


@plant("attention", "applies the offset or keeps no cache")
class OffsetDropped(_Math):
    supports = {"bias", "offset", "documents", "gqa"}

    def __init__(self, n_head: int, head_dim: int) -> None:
        super().__init__(n_head, head_dim)

    def changed(self, mask: Mask) -> Mask:
        return Mask(torch.zeros_like(mask.start), mask.queries, mask.keys, mask.documents, mask.bias)


@plant("attention", "grouped heads equal repeated heads")
class HeadsInTheWrongOrder(nn.Module):
    """Repeats the key/value heads as 0101 where 0011 is meant."""

    supports = {"gqa"}

    def __init__(self, n_head: int, head_dim: int) -> None:
        super().__init__()
        self.kernel = MathAttention(n_head, head_dim)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None = None) -> Tensor:
        times = q.shape[2] // k.shape[2]
        return self.kernel(q, k.repeat(1, 1, times, 1), v.repeat(1, 1, times, 1))


@plant("attention", "values may have another width")
class ValuesOfOneWidth(nn.Module):
    def __init__(self, n_head: int, head_dim: int) -> None:
        super().__init__()
        self.kernel, self.head_dim = MathAttention(n_head, head_dim), head_dim

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None = None) -> Tensor:
        return self.kernel(q, k, v[..., : self.head_dim])


@plant("attention", "compiles into one graph")
class GraphBreak(nn.Module):
    """Branches on the values of a tensor."""

    def __init__(self, n_head: int, head_dim: int) -> None:
        super().__init__()
        self.kernel = MathAttention(n_head, head_dim)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None = None) -> Tensor:
        if q.abs().max() > 1e6:
            q = q / 2
        return self.kernel(q, k, v)


# --- mixers


@plant("mixer", "causal: later tokens change no output")
class ConvolutionLeak(nn.Module):
    """A convolution that is centred: it sees one position ahead."""

    cache, ignores = False, ("attention", "position")

    def __init__(
        self, dim: int, n_head: int, n_kv_head: int, position: int, attention: type, depth: tuple[int, int]
    ) -> None:
        super().__init__()
        if n_kv_head != n_head:
            raise ValueError("it has no heads")
        self.taps, self.out = nn.Parameter(torch.randn(dim, 1, 3) / 2), nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        mixed = F.conv1d(x.transpose(1, 2), self.taps.to(x.dtype), padding=1, groups=x.shape[-1])
        return self.out(mixed.transpose(1, 2))


@plant("mixer", "decoding with a cache changes nothing")
class Forgetful(nn.Module):
    """Has a cache and never writes to it."""

    def __init__(
        self, dim: int, n_head: int, n_kv_head: int, position: int, attention: type, depth: tuple[int, int]
    ) -> None:
        super().__init__()
        self.inner = SelfAttention(dim, n_head, n_kv_head, position, attention, depth)
        self.supports = self.inner.supports

    def forward(self, x: Tensor, context: Context) -> Tensor:
        if context.cache is not None:
            context.cache = [tuple(t.clone() for t in layer) for layer in context.cache]
        return self.inner(x, context)

    def init_cache(self, batch: int, max_len: int) -> tuple[Tensor, ...]:
        return self.inner.init_cache(batch, max_len)


@plant("mixer", "uses or refuses n_kv_head")
class GroupsIgnored(nn.Module):
    """Takes n_kv_head and does nothing with it."""

    def __init__(
        self, dim: int, n_head: int, n_kv_head: int, position: int, attention: type, depth: tuple[int, int]
    ) -> None:
        super().__init__()
        self.inner = SelfAttention(dim, n_head, n_head, position, attention, depth)
        self.supports, self.init_cache = self.inner.supports, self.inner.init_cache

    def forward(self, x: Tensor, context: Context) -> Tensor:
        return self.inner(x, context)


@plant("mixer", "uses its slots or declares `ignores`")
class PositionsIgnored(nn.Module):
    """Never turns its queries and keys, and does not say so."""

    cache = False

    def __init__(
        self, dim: int, n_head: int, n_kv_head: int, position: int, attention: type, depth: tuple[int, int]
    ) -> None:
        super().__init__()
        self.n_head, self.attention = n_head, attention(n_head, dim // n_head)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        if n_kv_head != n_head:
            raise ValueError("as many key/value heads as heads")

    def forward(self, x: Tensor, context: Context) -> Tensor:
        return self.attention(*self.qkv(x).unflatten(-1, (3, self.n_head, -1)).unbind(2)).flatten(2)


# --- positions


@plant("position", "decoding with a cache changes nothing")
class OffsetForgotten(nn.Module):
    """Starts at 0 with every call, whatever the positions."""

    def __init__(self, dim: int, n_head: int, head_dim: int, max_len: int) -> None:
        super().__init__()
        self.table = nn.Embedding(max_len, dim)

    def embed(self, x: Tensor, positions: Tensor) -> Tensor:
        return x + self.table(torch.arange(x.shape[1], device=x.device))


@plant("position", "depends on positions only")
class RowsOfTheFirst(nn.Module):
    """Gives every row the positions of the first."""

    def __init__(self, dim: int, n_head: int, head_dim: int, max_len: int) -> None:
        super().__init__()
        self.table = nn.Embedding(max_len, dim)

    def embed(self, x: Tensor, positions: Tensor) -> Tensor:
        return x + self.table(positions[:1])


# --- norms, ffns, blocks


@plant("norm", "every parameter gets a gradient")
class DeadParameter(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gain, self.unused = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.gain)


@plant("norm", "output has the input's dtype")
class Float32Only(nn.Module):
    """Multiplies with a matrix that stays float32."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mean = [torch.eye(dim) - 1 / dim]

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x @ self.mean[0], dim=-1) * x.shape[-1] ** 0.5


@plant("norm", "sequences of a batch are independent")
class OverTheBatch(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x / (x.pow(2).mean((0, -1), keepdim=True) + 1e-6).sqrt()


@plant("norm", "float32 agrees with float64")
class Cancelling(nn.Module):
    """Loses most of its digits in float32: the square of the mean from the mean of the squares."""

    def __init__(self, dim: int) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        large = x + 300
        variance = large.pow(2).mean(-1, keepdim=True) - large.mean(-1, keepdim=True).pow(2)
        return (x - x.mean(-1, keepdim=True)) / (variance + 1e-3).abs().sqrt()


@plant("norm", "parameters and FLOPs can be counted")
class ScalarGain(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:]) * self.gain


@plant("norm", "weights survive saving and loading")
class HiddenTable(nn.Module):
    """Draws numbers that are not in its state dict."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gain = [1 + torch.rand(dim)]

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:]) * self.gain[0].to(x.dtype)


@plant("norm", "equal seeds give equal results")
class UnseededDraw(nn.Module):
    """Draws its gain from NumPy, which torch's seed does not affect."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.from_numpy(np.random.default_rng().uniform(0.5, 1.5, dim)).float())

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.gain)


@plant("ffn", "positions do not affect each other")
class MixesPositions(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, dim)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        return self.up(x - x.mean(1, keepdim=True))


@plant("ffn", "every parameter gets a gradient")
class RootAtZero(nn.Module):
    """torch.where hides the root of negative numbers, but not its gradient."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        up = self.up(x)
        return self.down(torch.where(up > 0, up.sqrt(), 0.0))


@plant("block", "two steps lower the loss")
class Uphill(nn.Module):
    """Turns the gradient round on its way back through the last layer."""

    class Reverse(torch.autograd.Function):
        @staticmethod
        def forward(ctx: FunctionCtx, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: FunctionCtx, gradient: Tensor) -> Tensor:
            return -1000 * gradient

    def __init__(self, dim: int, mixer: nn.Module, ffn: nn.Module, norm: type, depth: tuple[int, int]) -> None:
        super().__init__()
        self.mixer, self.ffn, self.norm, self.last = mixer, ffn, norm(dim), depth[0] == depth[1] - 1

    def forward(self, x: Tensor, context: Context) -> Tensor:
        x = x + self.mixer(self.norm(x), context)
        x = x + self.ffn(self.norm(x), context)
        return self.Reverse.apply(x) if self.last else x


@plant("block", "output has the right shape")
class StreamsLeftOpen(nn.Module):
    """Opens a second stream in the first layer, and never closes it."""

    def __init__(self, dim: int, mixer: nn.Module, ffn: nn.Module, norm: type, depth: tuple[int, int]) -> None:
        super().__init__()
        self.mixer, self.ffn, self.norm, self.first = mixer, ffn, norm(dim), depth[0] == 0

    def forward(self, x: Tensor, context: Context) -> Tensor:
        x = torch.stack((x, x), 2) if self.first else x
        update = self.ffn(self.mixer(self.norm(x[:, :, 0]), context), context)
        return x + update[:, :, None]


# --- inits, losses, optimizers, schedules


@plant("init", "fills every weight from the generator")
class GlobalDraw:
    """Draws from the global generator, so that swapping a part changes every later draw."""

    def __init__(self, n_layer: int) -> None:
        pass

    def __call__(self, name: str, parameter: Tensor, generator: torch.Generator) -> None:
        parameter.normal_(0, 0.02)


class _Summed(nn.Module):
    def forward(self, hidden: Tensor, head: Head, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = head.logits(hidden).float()
        nats = F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
        return self.objective(nats, logits, targets), nats.detach(), (targets != -100).sum()


@plant("loss", "micro-batches add up to the batch")
class MeanForSum(_Summed):
    def __init__(self) -> None:
        super().__init__()

    def objective(self, nats: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
        return nats / (targets != -100).sum().clamp_min(1)


@plant("loss", "ignored targets have no effect")
class PenaltyOnIgnored(_Summed):
    def __init__(self) -> None:
        super().__init__()

    def objective(self, nats: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
        return nats + 1e-2 * logits.logsumexp(-1).pow(2).sum()


@plant("loss", "reports cross-entropy and count")
class ReportsItsObjective(nn.Module):
    def __init__(self) -> None:
        super().__init__()

    def forward(self, hidden: Tensor, head: Head, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        smooth = F.cross_entropy(head.logits(hidden).float(), targets, reduction="sum", label_smoothing=0.1)
        return smooth, smooth.detach(), (targets != -100).sum()


@plant("loss", "padding rows have no effect")
class CountsPadding(nn.Module):
    def __init__(self) -> None:
        super().__init__()

    def forward(self, hidden: Tensor, head: Head, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = F.linear(hidden, head.weight)
        logits = logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)
        nats = F.cross_entropy(logits, targets, reduction="sum")
        return nats, nats.detach(), (targets != -100).sum()


@plant("loss", "gradients match finite differences")
class HalfTheGradient(_Summed):
    def __init__(self) -> None:
        super().__init__()

    def objective(self, nats: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
        return 0.5 * nats + 0.5 * nats.detach()


@plant("optimizer", "a restored optimizer continues exactly")
class StateOutside(AdamW):
    """Keeps a number that its state dict does not contain."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, lr=1e-2)
        self.count = 0

    def step(self) -> None:
        self.count += 1
        for group in self.param_groups:
            group["lr"] = group["peak_lr"] / self.count
        super().step()


@plant("optimizer", "learning rate 0 changes no weight")
class DecaysOnItsOwn(AdamW):
    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)

    def step(self) -> None:
        super().step()
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.mul_(0.999)


@plant("optimizer", "every parameter is in one group")
class ForgetsTheGains(torch.optim.SGD):
    def __init__(self, model: nn.Module) -> None:
        super().__init__(parameter_groups(model, 0.1, 0.0)[:1], lr=0.1)


@plant("schedule", "depends on the step only")
class Counts:
    def __init__(self, steps: int) -> None:
        self.steps, self.calls = steps, 0

    def __call__(self, step: int) -> float:
        self.calls += 1
        return max(0.0, 1 - (self.calls - 1) / self.steps)


@plant("schedule", "factor is finite, from 0 to 1")
class DividesByZero:
    def __init__(self, steps: int) -> None:
        self.steps = steps

    def __call__(self, step: int) -> float:
        left = self.steps - 1 - step
        return 1.0 if left else float("nan")


# --- data, tokenizers, loggers


class _Stories(SyntheticStories):
    def __init__(self, tokenizer: Tokenizer, seq_len: int, seed: int) -> None:
        super().__init__(tokenizer, seq_len, seed, stories=60, val_stories=10)


@plant("data", "samples depend on their index only")
class CallOrder(_Stories):
    """Continues where the last call ended, whatever the index."""

    def __init__(self, tokenizer: Tokenizer, seq_len: int, seed: int) -> None:
        super().__init__(tokenizer, seq_len, seed)
        self.calls = 0

    def batch(self, split: str, index: int, size: int) -> np.ndarray:
        self.calls += 1
        return super().batch(split, self.calls, size)


@plant("data", "samples depend on their index only")
class BatchSized(_Stories):
    """Seeds a batch by its index: another batch size gives other samples."""

    def __init__(self, tokenizer: Tokenizer, seq_len: int, seed: int) -> None:
        super().__init__(tokenizer, seq_len, seed)

    def batch(self, split: str, index: int, size: int) -> np.ndarray:
        rows = np.random.default_rng([7, index]).integers(0, self.windows(split), size)
        return np.concatenate([super(BatchSized, self).batch(split, int(row), 1) for row in rows])


@plant("data", "each epoch has every window once")
class LosesTheLast(_Stories):
    """Counts one window more than it returns, and returns another one twice."""

    def __init__(self, tokenizer: Tokenizer, seq_len: int, seed: int) -> None:
        super().__init__(tokenizer, seq_len, seed)

    def batch(self, split: str, index: int, size: int) -> np.ndarray:
        count = self.windows(split)
        rows = [j if j % count else j + 1 for j in range(index * size, (index + 1) * size)]
        return np.concatenate([super(LosesTheLast, self).batch(split, row, 1) for row in rows])


@plant("data", "train and val do not overlap")
class JudgedOnTraining(_Stories):
    """Its validation windows are training windows."""

    def __init__(self, tokenizer: Tokenizer, seq_len: int, seed: int) -> None:
        super().__init__(tokenizer, seq_len, seed)

    def batch(self, split: str, index: int, size: int) -> np.ndarray:
        return super().batch("train", index, size)

    def windows(self, split: str) -> int:
        return super().windows("train")


@plant("tokenizer", "decoding restores any Unicode text")
class Strips(Bytes):
    def __init__(self) -> None:
        super().__init__()

    def encode(self, text: str) -> list[int]:
        return super().encode(text.strip())


@plant("tokenizer", "byte_lengths add up to the text")
class CountsCharacters(Bytes):
    """Counts the bytes that begin a character only."""

    def __init__(self) -> None:
        super().__init__()
        self.byte_lengths = np.array([int(b < 128 or b >= 192) for b in range(256)] + [0])


@plant("tokenizer", "ids are within the vocabulary")
class EndsInText(Bytes):
    """Takes a literal <|endoftext|> for the end of a document."""

    def __init__(self) -> None:
        super().__init__()

    def encode(self, text: str) -> list[int]:
        head, found, tail = text.partition("<|endoftext|>")
        return super().encode(head) + ([self.eot] if found else []) + super().encode(tail)


@plant("tokenizer", "save() and load() keep the encoding")
class ForgetsWhatItLearnt(Bytes):
    """Learns an order of the bytes that save() leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = 0

    def train(self, texts: list[str]) -> None:
        self.shift = 1

    def encode(self, text: str) -> list[int]:
        return [(i + self.shift) % 256 for i in super().encode(text)]

    def decode(self, ids: list[int]) -> str:
        return super().decode([i if i == self.eot else (i - self.shift) % 256 for i in ids])


@plant("logger", "a full disk does not end the run")
class LeavesTheProcess:
    """Ends the process when it can't write."""

    def __init__(self, run_dir: Path, start_step: int) -> None:
        self.path = run_dir / "log.txt"

    def log(self, step: int, metrics: dict[str, float]) -> None:
        try:
            with open(self.path, "a") as file:
                file.write(f"{step} {metrics}\n")
        except OSError:
            os._exit(9)

    def text(self, step: int, name: str, text: str) -> None:
        pass

    def close(self, summary: dict[str, float]) -> None:
        pass


# --- evaluators


class _Pairs:
    """The share of pairs whose good sentence is likelier than the bad one, and bits per byte of the good ones: the
    sound evaluator that those below break in one place each."""

    higher_is_better = True

    def __init__(self, paths: list[str]) -> None:
        self.paths = paths

    def prepare(self) -> None:
        self.items = read_items("paths", self.paths, ("sentence_good", "sentence_bad", "context", "choices", "answer"))
        for item in self.items:
            text_of(item, "sentence_good"), text_of(item, "sentence_bad"), text_of(item, "context")

    def fingerprint(self) -> str:
        return fingerprint(self.items)

    def evaluate(self, reader: Reader) -> dict[str, Score]:
        good, bad = (
            [self.nats(reader, text_of(i, f"sentence_{which}")) for i in self.items] for which in ("good", "bad")
        )
        right = {item.id: float(g < b) for item, g, b in zip(self.items, good, bad, strict=True)}
        total = sum(len(text_of(item, "sentence_good").encode()) for item in self.items)
        return {
            "accuracy": mean(right, "fraction"),
            "bits_per_byte": Score(sum(good) / total / math.log(2), "bits per byte"),
        }

    def nats(self, reader: Reader, text: str) -> float:
        """The nats of a text."""
        return float(reader.nats([text])[0].nats.sum())


@plant("evaluator", "scores do not depend on the batch size")
class MeanOfMeans(_Pairs):
    """The mean of the means of batches, of which the last one is shorter."""

    def __init__(self, paths: list[str]) -> None:
        super().__init__(paths)

    def evaluate(self, reader: Reader) -> dict[str, Score]:
        texts = sorted(text_of(item, "sentence_good") for item in self.items)
        nats = [self.nats(reader, text) for text in texts]
        size = max(1, min(len(nats) - 1, getattr(reader, "batch_tokens", 4096) // 50))
        means = [np.mean(nats[start : start + size]) for start in range(0, len(nats), size)]
        return {"nats": Score(float(np.mean(means)), "nats")}


@plant("evaluator", "scores do not depend on the item order")
class NumbersItsItems(_Pairs):
    """The id of an item is its place in the file."""

    def __init__(self, paths: list[str]) -> None:
        super().__init__(paths)

    def evaluate(self, reader: Reader) -> dict[str, Score]:
        nats = [self.nats(reader, text_of(item, "sentence_good")) for item in self.items]
        return {"nats": mean({str(number): each for number, each in enumerate(nats)}, "nats")}


@plant("evaluator", "scores do not depend on earlier calls")
class KeepsTheFirst(_Pairs):
    """Keeps the nats of a text for the next call, which may be for another model."""

    def __init__(self, paths: list[str]) -> None:
        super().__init__(paths)
        self.kept: dict[str, float] = {}

    def nats(self, reader: Reader, text: str) -> float:
        if text not in self.kept:
            self.kept[text] = super().nats(reader, text)
        return self.kept[text]


@plant("evaluator", "measuring does not change the model")
class LeavesTrainingMode(_Pairs):
    """Puts the model into training mode at the end, whatever it was in before."""

    def __init__(self, paths: list[str]) -> None:
        super().__init__(paths)

    def evaluate(self, reader: Reader) -> dict[str, Score]:
        scores = super().evaluate(reader)
        if isinstance(model := getattr(reader, "model", None), nn.Module):
            model.train()
        return scores


@plant("evaluator", "measuring does not change the model")
class LeavesAHook(_Pairs):
    """Records activations with a hook that it does not remove."""

    def __init__(self, paths: list[str]) -> None:
        super().__init__(paths)

    def evaluate(self, reader: Reader) -> dict[str, Score]:
        if isinstance(model := getattr(reader, "model", None), nn.Module):
            next(model.children()).register_forward_hook(lambda *_: None)
        return super().evaluate(reader)


@plant("evaluator", "uses no global random generator")
class ShufflesGlobally(_Pairs):
    """Shuffles its items, which changes no score, with torch's own generator."""

    def __init__(self, paths: list[str]) -> None:
        super().__init__(paths)

    def prepare(self) -> None:
        super().prepare()
        self.items = [self.items[place] for place in torch.randperm(len(self.items))]


@plant("evaluator", "scores are finite numbers with a unit")
class NameWithSpaces(_Pairs):
    """The name of its metric can't be typed without quotes."""

    def __init__(self, paths: list[str]) -> None:
        super().__init__(paths)

    def evaluate(self, reader: Reader) -> dict[str, Score]:
        return {"accuracy of pairs": super().evaluate(reader)["accuracy"]}


@plant("evaluator", "each byte of a text is counted once")
class CountsLetters(_Pairs):
    """Divides by characters, of which a letter with an accent is one and has two bytes."""

    def __init__(self, paths: list[str]) -> None:
        super().__init__(paths)

    def evaluate(self, reader: Reader) -> dict[str, Score]:
        texts = [text_of(item, "sentence_good") for item in self.items]
        nats = sum(self.nats(reader, text) for text in texts)
        return {"bits_per_byte": Score(nats / math.log(2) / sum(map(len, texts)), "bits per byte")}


@plant("evaluator", "each byte of a text is counted once")
class CountsContextTwice(_Pairs):
    """The bytes of the context are counted, and its nats are not."""

    def __init__(self, paths: list[str]) -> None:
        super().__init__(paths)

    def evaluate(self, reader: Reader) -> dict[str, Score]:
        pairs = [(text_of(item, "context"), " " + text_of(item, "sentence_good")) for item in self.items]
        nats = sum(each.nats for each in reader.continuations(pairs))
        total = sum(len((context + text).encode()) for context, text in pairs)
        return {"bits_per_byte": Score(nats / math.log(2) / total, "bits per byte")}


@plant("evaluator", "scores depend on the model")
class AsksForNothing(_Pairs):
    """Compares the good sentence with itself."""

    def __init__(self, paths: list[str]) -> None:
        super().__init__(paths)

    def evaluate(self, reader: Reader) -> dict[str, Score]:
        good = {item.id: self.nats(reader, text_of(item, "sentence_good")) for item in self.items}
        return {"accuracy": mean({item: float(nats <= good[item]) for item, nats in good.items()}, "fraction")}


class _Choices(_Pairs):
    """The share of items whose likeliest choice is the answer; a subclass says what stands before the choices."""

    def evaluate(self, reader: Reader) -> dict[str, Score]:
        right = {}
        for item in self.items:
            choices = [str(choice) for choice in cast(list, item.row["choices"])]
            replies = reader.continuations([(self.context(item), f" {choice}") for choice in choices])
            right[item.id] = float(int(np.argmin([reply.nats for reply in replies])) == item.row["answer"])
        return {"accuracy": mean(right, "fraction")}

    def context(self, item: Item) -> str:
        """The context of an item."""
        return text_of(item, "context")


@plant("evaluator", "the model is not shown the answer")
class ReadsTheLastWord(_Pairs):
    """Predicts the last word of a text after the whole text."""

    def __init__(self, paths: list[str]) -> None:
        super().__init__(paths)

    def evaluate(self, reader: Reader) -> dict[str, Score]:
        texts = [text_of(item, "context") for item in self.items]
        replies = reader.continuations([(text, " " + text.split()[-1]) for text in texts])
        return {"nats": mean({item.id: r.nats for item, r in zip(self.items, replies, strict=True)}, "nats")}


@plant("evaluator", "the model is not shown the answer")
class NamesTheAnswer(_Choices):
    """Writes the number of the right choice before the choices."""

    def __init__(self, paths: list[str]) -> None:
        super().__init__(paths)

    def context(self, item: Item) -> str:
        return f"{text_of(item, 'context')} ({item.row['answer']})"


@plant("evaluator", "the model is not shown the answer")
class PromptsWithTheAnswer(_Pairs):
    """Generates an answer to a prompt that already has it."""

    def __init__(self, paths: list[str]) -> None:
        super().__init__(paths)

    def evaluate(self, reader: Reader) -> dict[str, Score]:
        right = {}
        for item in self.items:
            said = reader.generate([f"{text_of(item, 'context')} {item.row['answer']}"], 4)[0]
            right[item.id] = float(str(item.row["answer"]) in said)
        return {"accuracy": mean(right, "fraction")}


@plant("evaluator", "a broken item is refused by file:line")
class SkipsWhatItCanNotRead(_Pairs):
    """Leaves out the lines that it can't read, without an error."""

    def __init__(self, paths: list[str]) -> None:
        super().__init__(paths)

    def prepare(self) -> None:
        self.items = []
        for path in self.paths:
            if not Path(path).is_file():
                raise ValueError(f"paths: no file matches {path!r}")
            for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
                try:
                    row = json.loads(line)
                    assert isinstance(row["sentence_good"], str) and isinstance(row["sentence_bad"], str)
                except (ValueError, KeyError, TypeError, AssertionError):
                    continue
                self.items.append(Item(hashlib.sha256(line.encode()).hexdigest(), f"{path}:{number}", row))


@plant("evaluator", "a broken item is refused by file:line")
class ReadsInItsConstructor(_Pairs):
    """Reads its files when it is built."""

    def __init__(self, paths: list[str]) -> None:
        super().__init__(paths)
        super().prepare()

    def prepare(self) -> None:
        pass


@plant("evaluator", "the fingerprint covers the items")
class FingerprintOfNames(_Pairs):
    """Its fingerprint covers the names of its files."""

    def __init__(self, paths: list[str]) -> None:
        super().__init__(paths)

    def fingerprint(self) -> str:
        return " ".join(Path(path).name for path in self.paths)


# --- probes


class _Scale:
    """The rms of each block's output: the sound probe that those below break in one place each."""

    needs = {"activations"}

    def observe(self, views: Views) -> Values:
        return {f"rms/{name}": x.float().square().mean().sqrt() for name, x in self.outputs(views).items()}

    def outputs(self, views: Views) -> dict[str, Tensor]:
        """The outputs of the blocks."""
        return {name: views.activations[name] for name, kind in views.places.items() if kind == "block"}


@plant("probe", "returns named, finite numbers")
class NameWithASpace(_Scale):
    """The names of its statistics have white space."""

    def __init__(self) -> None:
        pass

    def observe(self, views: Views) -> Values:
        return {name.replace("rms", "root mean square"): value for name, value in super().observe(views).items()}


@plant("probe", "returns named, finite numbers")
class DividesByNothing(_Scale):
    """Divides by the number of modules that are not there."""

    def __init__(self) -> None:
        pass

    def observe(self, views: Views) -> Values:
        return super().observe(views) | {"share": torch.zeros(()) / 0}


@plant("probe", "returns named, finite numbers")
class ReturnsTheActivations(_Scale):
    """Returns lists of numbers, which are neither numbers nor arrays."""

    def __init__(self) -> None:
        pass

    def observe(self, views: Views) -> Values:
        return {f"all/{name}": x.float().mean(-1).tolist() for name, x in self.outputs(views).items()}  # type: ignore


@plant("probe", "names are modules or parameters")
class NumbersItsLayers(_Scale):
    """Its names have numbers of layers."""

    def __init__(self) -> None:
        pass

    def observe(self, views: Views) -> Values:
        return {f"rms/layer-{i}": value for i, value in enumerate(super().observe(views).values())}


@plant("probe", "observing changes nothing")
class TakesTheAbsoluteValueInPlace(_Scale):
    """Changes the captured activations, which other probes read."""

    def __init__(self) -> None:
        pass

    def outputs(self, views: Views) -> dict[str, Tensor]:
        return {name: x.abs_() for name, x in super().outputs(views).items()}


@plant("probe", "observing changes nothing")
class NormsTheWeights(_Scale):
    """Norms the weights of the copy in place."""

    def __init__(self) -> None:
        pass

    def observe(self, views: Views) -> Values:
        values = super().observe(views)
        for weight in views.weights.values():
            weight.div_(weight.norm() + 1)
        return values


@plant("probe", "observing changes nothing")
class TrainsTheCopy(_Scale):
    """Leaves the copy in training mode, with a hook on it."""

    def __init__(self) -> None:
        pass

    def observe(self, views: Views) -> Values:
        views.model.train().register_forward_hook(lambda *_: None)
        return super().observe(views)


@plant("probe", "values do not depend on earlier calls")
class AveragesOverSteps(_Scale):
    """Averages its values over the calls so far."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.calls = 0

    def observe(self, views: Views) -> Values:
        self.calls += 1
        for name, value in super().observe(views).items():
            self.sums[name] = self.sums.get(name, 0.0) + float(cast(Tensor, value))
        return {name: total / self.calls for name, total in self.sums.items()}


@plant("probe", "values depend on the model")
class CountsParameters(_Scale):
    """Counts what training does not change."""

    needs = set[str]()

    def __init__(self) -> None:
        pass

    def observe(self, views: Views) -> Values:
        return {f"parameters/{name}": float(weight.numel()) for name, weight in views.weights.items()}


@plant("probe", "keeps no tensors between calls")
class KeepsTheOutputs(_Scale):
    """Keeps what it has seen, for someone who may ask."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []

    def outputs(self, views: Views) -> dict[str, Tensor]:
        self.seen = [super().outputs(views)]
        return self.seen[0]


@plant("probe", "declares the views that it reads")
class DeclaresNothing(_Scale):
    """Reads activations without asking for them."""

    needs = set[str]()

    def __init__(self) -> None:
        pass


@plant("probe", "declares the views that it reads")
class DeclaresEverything(_Scale):
    """Asks for a backward pass that it does not need."""

    needs = {"activations", "gradients"}

    def __init__(self) -> None:
        pass


@plant("probe", "draws no global random numbers")
class ShufflesTokens(_Scale):
    """Draws an order of the tokens, which changes no value."""

    def __init__(self) -> None:
        pass

    def observe(self, views: Views) -> Values:
        torch.randperm(views.ids.numel())
        return super().observe(views)


@plant("probe", "works with any part and model")
class KnowsTheNames(_Scale):
    """Reads modules by the names that they have in the default model."""

    def __init__(self) -> None:
        pass

    def outputs(self, views: Views) -> dict[str, Tensor]:
        return {name: views.activations[name] for name in ("blocks.0.ffn.down", "blocks.1.ffn.down")}


@plant("probe", "works in bfloat16")
class TurnsToNumpy(_Scale):
    """numpy has no bfloat16."""

    def __init__(self) -> None:
        pass

    def observe(self, views: Views) -> Values:
        parts = {name: x.numpy() for name, x in views.activations.items() if name in views.places}
        return {f"rms/{name}": float(np.sqrt((x**2).mean())) for name, x in parts.items()}


# --- odd, but correct


@sound("mixer")
class LongConvolution(nn.Module):
    """A filter as long as the sequence, through the Fourier transform: causal but for rounding."""

    cache, ignores = False, ("attention", "position")

    def __init__(
        self, dim: int, n_head: int, n_kv_head: int, position: int, attention: type, depth: tuple[int, int]
    ) -> None:
        super().__init__()
        if n_kv_head != n_head:
            raise ValueError("LongConvolution has no heads to group: leave GPT.n_kv_head at None")
        self.taps, self.out = nn.Parameter(torch.randn(dim, 64) / 8), nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        length = x.shape[1]
        wide = x if x.dtype == torch.float64 else x.float()
        spectrum = torch.fft.rfft(self.taps[:, :length].T.to(wide.dtype), 2 * length, dim=0)
        mixed = torch.fft.irfft(torch.fft.rfft(wide, 2 * length, dim=1) * spectrum, 2 * length, dim=1)[:, :length]
        return self.out(mixed.to(x.dtype))


@sound("norm")
class NoisyInTraining(nn.Module):
    """Draws noise while it trains, from the generator that the loop seeds at each step."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(F.layer_norm(x, x.shape[-1:], self.gain), 0.1, self.training)


@sound("ffn")
class SilentAtFirst(nn.Module):
    """Its output is 0 at first: the parameters before the gain get their first gradient one step later."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.up, self.gain = nn.Linear(dim, 2 * dim), nn.Parameter(torch.zeros(1))
        self.down = nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        return self.gain * self.down(F.gelu(self.up(x)))


@sound("ffn")
class FrozenFeatures(nn.Module):
    """Random features that do not train: a parameter without a gradient, on purpose."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.features, self.down = nn.Linear(dim, 4 * dim, bias=False), nn.Linear(4 * dim, dim, bias=False)
        self.features.weight.requires_grad_(False)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        return self.down(F.relu(self.features(x)))


@sound("attention")
class ConstantAverage(nn.Module):
    """The mean of all values so far: queries and keys take no part, and it has no parameters."""

    def __init__(self, n_head: int, head_dim: int) -> None:
        super().__init__()

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None = None) -> Tensor:
        count = torch.arange(1, v.shape[1] + 1, device=v.device, dtype=v.dtype)[:, None, None]
        return v.cumsum(1) / count + 0 * q.sum(-1, keepdim=True)


@sound("block")
class Reversible(nn.Module):
    """Two streams, each updated from the other: opened by the first layer, closed by the last."""

    def __init__(self, dim: int, mixer: nn.Module, ffn: nn.Module, norm: type, depth: tuple[int, int]) -> None:
        super().__init__()
        self.mixer, self.ffn, self.mixer_norm, self.ffn_norm = mixer, ffn, norm(dim), norm(dim)
        self.first, self.last = depth[0] == 0, depth[0] == depth[1] - 1

    def forward(self, x: Tensor, context: Context) -> Tensor:
        one, other = (x, x) if self.first else x.unbind(2)
        one = one + self.mixer(self.mixer_norm(other), context)
        other = other + self.ffn(self.ffn_norm(one), context)
        return one + other if self.last else torch.stack((one, other), 2)


@sound("model")
class WithoutLayers(nn.Module):
    """The mean of the tokens so far: a model whose table has another name than GPT's, and which keeps no cache."""

    def __init__(self, vocab_size: int, max_len: int) -> None:
        super().__init__()
        self.vocab_size, self.table = vocab_size, nn.Embedding(vocab_size, 16)

    def forward(self, ids: Tensor, context: Context | None = None) -> tuple[Tensor, Head]:
        tokens_so_far = torch.arange(1, ids.shape[1] + 1, device=ids.device)[:, None]
        hidden = self.table(ids)
        hidden = hidden + hidden.cumsum(1) / tokens_so_far
        return hidden, Head(self.table.weight, self.vocab_size, None)


@sound("schedule")
class WarmRestarts:
    """Jumps back to the peak four times, on purpose."""

    def __init__(self, steps: int) -> None:
        self.period = max(1, steps // 4)

    def __call__(self, step: int) -> float:
        return 1 - (step % self.period) / self.period


@sound("loss")
class Focal(nn.Module):
    """Weighs a target by how wrong it is: not the cross-entropy, but a sum over targets all the same."""

    def __init__(self) -> None:
        super().__init__()

    def forward(self, hidden: Tensor, head: Head, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        each = F.cross_entropy(head.logits(hidden).float(), targets, ignore_index=-100, reduction="none")
        return ((1 - torch.exp(-each)) ** 2 * each).sum(), each.sum().detach(), (targets != -100).sum()


@sound("evaluator")
class RandomTexts:
    """Measures random texts of its own: no files, no items, and a lower value is better."""

    higher_is_better = False

    def __init__(self, count: int = 5) -> None:
        self.count = count

    def prepare(self) -> None:
        draw = np.random.default_rng(7)
        self.texts = ["".join(map(chr, draw.integers(97, 123, 40))) for _ in range(self.count)]

    def fingerprint(self) -> str:
        return f"7 {self.count}"

    def evaluate(self, reader: Reader) -> dict[str, Score]:
        return {"nats": Score(float(np.mean([read.nats.sum() for read in reader.nats(self.texts)])), "nats")}


@sound("evaluator")
class DrawsItsPrompts:
    """Draws prompts with a generator of its own at each call, and counts distinct words of what the model writes."""

    higher_is_better = True

    def __init__(self) -> None:
        pass

    def prepare(self) -> None:
        pass

    def fingerprint(self) -> str:
        return "the same prompts every time"

    def evaluate(self, reader: Reader) -> dict[str, Score]:
        draw = np.random.default_rng(3)
        prompts = [" ".join(draw.choice(["the", "old", "fox"], 4)) for _ in range(3)]
        texts = reader.generate(prompts, 20, temperature=1.0)
        counts = {prompt: float(len(set(text))) for prompt, text in zip(prompts, texts, strict=True)}
        return {"distinct/letters": mean(counts, "letters")}


@sound("evaluator")
class ListsTheChoices(_Choices):
    """All choices are in the context, as in an exam: the model reads each, but not which one is right."""

    def __init__(self, paths: list[str]) -> None:
        super().__init__(paths)

    def context(self, item: Item) -> str:
        listed = "; ".join(str(choice) for choice in cast(list, item.row["choices"]))
        return f"{text_of(item, 'context')} ({listed})"


@sound("probe")
class WeightsAlone:
    """Needs no pass, has knobs and names without a module, and returns numpy numbers, arrays and None."""

    needs: frozenset[str] = frozenset()

    def __init__(self, bins: int = 8) -> None:
        self.bins = bins

    def observe(self, views: Views) -> Values:
        everything = torch.cat([weight.float().flatten() for weight in views.weights.values()]).numpy()
        counts, _ = np.histogram(everything, self.bins)
        return {"mean": everything.mean(), "counts": counts, "largest": float(abs(everything).max()), "median": None}


@sound("probe")
class Patches:
    """Runs the copy again with one block left out, and keeps a count of its own that changes no value."""

    needs = {"activations"}

    def __init__(self) -> None:
        self.calls = 0

    def observe(self, views: Views) -> Values:
        self.calls += 1
        draw = torch.Generator().manual_seed(0)
        values: Values = {}
        for name in (name for name, kind in views.places.items() if kind == "block"):
            block = views.model.get_submodule(name)
            noise = 1 + 1e-3 * torch.randn(1, generator=draw)
            handle = block.register_forward_hook(lambda module, args, out, noise=noise: out * noise)
            try:
                changed = views.model(views.ids)[0]
            finally:
                handle.remove()
            values[f"effect/{name}"] = changed.float().square().mean() / views.activations[name].float().square().mean()
        return values
