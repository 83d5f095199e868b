"""Checks of the parts inside a model (attention, position, mixer, norm, ffn, block), and of whole models."""

from __future__ import annotations

import io

import torch
from torch import nn

from toolkit.conformance.bench import (
    DIM,
    HEAD_DIM,
    HEADS,
    LAYERS,
    LENGTHS,
    LONGEST,
    VOCAB,
    Bench,
    objective,
    plain_part,
    position_with,
    relative,
    tokens,
    two_steps,
)
from toolkit.conformance.lines import Broken, Gauge, NotApplicable, check
from toolkit.context import Context
from toolkit.rundir import facts

MODELS = (*LAYERS, "model")
NO_METHOD = "it has none of rotate, embed and score_bias: it does nothing"


@check("shape kept", *MODELS)
def shape(bench: Bench) -> Gauge:
    """Hidden states are (B, T, C), finite and float32 at every length and depth."""
    gauge = Gauge(0.0, "wrong shapes")
    depths = (1, 2, 3) if bench.kind in ("block", "mixer", "ffn") else (2,)
    for n_layer in depths:
        for label, model in bench.models(**({} if bench.kind == "model" else {"n_layer": n_layer})):
            for length in LENGTHS:
                hidden, head = model(tokens(3, length))
                if hidden.dtype != torch.float32:
                    raise Broken(f"float32 went in, {hidden.dtype} came out at length {length}{label}")
                if not hidden.isfinite().all():
                    raise Broken(f"values that are not finite at length {length}{label}, {n_layer} layers")
                wrong = hidden.shape[:2] != (3, length) or head.logits(hidden).shape != (3, length, VOCAB)
                gauge.record(float(wrong), f"T={length}{label}")
    if len(depths) > 1:
        gauge.tried.append("1, 2, 3 layers")
    return gauge


@check("dtype kept", *LAYERS)
def dtype(bench: Bench) -> Gauge:
    """The output has the input's dtype, in each of three dtypes. Tests the part alone, or for some kinds in a model."""
    if bench.kind == "position" and not _position_methods(bench):
        raise NotApplicable(NO_METHOD)
    gauge = Gauge(0.0, "wrong dtypes")
    for expected in (torch.float32, torch.bfloat16, torch.float64):
        for name, out in outputs_alone(bench, 13, expected):
            gauge.record(float(out.dtype != expected), f"{str(expected)[6:]} {name}".strip())
    return gauge


@check("each position on its own", "norm", "ffn")
def pointwise(bench: Bench) -> Gauge:
    """The output at a position does not depend on other positions."""
    gauge = Gauge(1e-5)
    for length in (2, 13, 64):
        module, x = bench.cls(DIM).eval(), torch.randn(2, length, DIM)
        whole = _forward(bench, module, x)
        for t in {0, length // 2, length - 1}:
            gauge.record(relative(_forward(bench, module, x[:, t : t + 1]), whole[:, t : t + 1]), f"T={length}")
    return gauge


@check("rows on their own", *MODELS)
def rows(bench: Bench) -> Gauge:
    """The hidden states of a sequence do not depend on the other sequences of the batch."""
    gauge = Gauge(1e-4)
    for label, model in bench.models():
        ids = tokens(4, 33)
        whole = model(ids)[0]
        for row in range(4):
            gauge.record(relative(whole[row : row + 1], model(ids[row : row + 1])[0]), f"B=4, T=33{label}")
    return gauge


@check("causality, by values", *MODELS)
def causal_values(bench: Bench) -> Gauge:
    """Changing token t changes the output at t, and nothing before t; for every t."""
    gauge = Gauge(1e-5, "share of the movement that went backwards,")
    for label, model in bench.models():
        for length in LENGTHS[1:]:
            ids = tokens(1, length).repeat(length + 1, 1)
            changed = torch.arange(length)
            ids[changed + 1, changed] = (ids[changed + 1, changed] + 1) % VOCAB  # row t + 1 differs from row 0 at t
            hidden = model(ids)[0]
            moved = (hidden[1:] - hidden[:1]).abs().amax(-1)  # (changed t, position)
            unmoved = (moved.diagonal() == 0).nonzero()
            if len(unmoved):
                raise Broken(f"changing token {int(unmoved[0])} of {length} does not move its own output")
            gauge.record(moved.tril(-1).max() / moved.max(), f"T={length}{label}")
    return gauge


@check("causality, by gradients", *MODELS)
def causal_gradients(bench: Bench) -> Gauge:
    """The output at t has no gradient with respect to the embeddings of later tokens."""
    gauge = Gauge(1e-5, "share of the gradient from later positions,")
    for label, model in bench.models():
        embedded = []
        model.embed.register_forward_hook(lambda module, args, out, outputs=embedded: outputs.append(out))
        for length in (2, 13, 64):
            embedded.clear()
            hidden = model(tokens(1, length))[0]
            for t in sorted({0, (length - 2) // 2, length - 2}):
                projection = (hidden[:, t] * torch.randn(hidden.shape[-1])).sum()
                (gradient,) = torch.autograd.grad(projection, embedded[0], retain_graph=True)
                gauge.record(gradient[:, t + 1 :].abs().max() / gradient.abs().max(), f"T={length}{label}")
    return gauge


@check("gradients reach every parameter", *MODELS, "init")
def gradients(bench: Bench) -> Gauge:
    """Within 5 optimizer steps, every parameter gets a gradient that is finite and not zero."""
    model = bench.model()
    optimizer, first_step, last_step = torch.optim.SGD(model.parameters(), lr=1e-3), {}, 0
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    for step in range(5):  # several steps: a projection that starts at zero blocks the gradient in the first
        optimizer.zero_grad()
        objective(model, tokens(4, 33, seed=step)).backward()
        for name, parameter in trainable:
            if parameter.grad is None:
                continue
            if not parameter.grad.isfinite().all():
                raise Broken(f"the gradient of {name} is not finite at step {step}")
            if parameter.grad.any() and name not in first_step:
                first_step[name], last_step = step, step
        optimizer.step()
    missing = [name for name, _ in trainable if name not in first_step]
    if missing:
        raise Broken(f"no gradient in 5 steps: {', '.join(missing)}")
    gauge = Gauge(note=f"{len(first_step)} of {len(first_step)} parameters, the last at step {last_step}")
    gauge.record(0, "B=4, T=32, 5 steps")
    return gauge


@check("two steps lower the loss", *MODELS, "init")
def learns(bench: Bench) -> Gauge:
    """Two steps of AdamW on one batch lower its loss."""
    return two_steps(bench.model(plain_init=True), plain_part("loss")())


@check("the seed fixes everything", *MODELS, "init")
def deterministic(bench: Bench) -> Gauge:
    """Equal seeds give equal weights and outputs, whatever was drawn before. The global generator does not move."""
    first = bench.model(dropout=0.1) if bench.kind != "model" else bench.model()
    torch.rand(1000)
    generator_state = torch.get_rng_state()
    second = bench.model(dropout=0.1) if bench.kind != "model" else bench.model()
    if not torch.equal(generator_state, torch.get_rng_state()):
        raise Broken("building the part moves the global random generator; draw in the constructor, or from `draw`")
    gauge, ids, outputs = Gauge(0.0, "largest difference"), tokens(2, 13), []
    for name, value in first.state_dict().items():
        gauge.record((value.double() - second.state_dict()[name].double()).abs().max(), "weights of two builds")
    for model in (first, second, second):
        torch.manual_seed(3)
        outputs.append(model(ids)[0])
    gauge.record((outputs[0] - outputs[1]).abs().max(), "outputs of two builds")
    gauge.record((outputs[1] - outputs[2]).abs().max(), "one build called twice")
    other = bench.model(seed=1).state_dict()
    if not any((value != other[name]).any() for name, value in bench.model().state_dict().items()):
        raise Broken("another seed gives the same weights")
    return gauge


@check("float32 against float64", *MODELS)
def float64(bench: Bench) -> Gauge:
    """The model gives the same output in float32 and float64, up to rounding."""
    gauge = Gauge(1e-4, "relative difference")
    for label, model in bench.models():
        for length in (1, 13, 64):
            ids = tokens(2, length)
            ours = model.float()(ids)[0]
            gauge.record(relative(ours, model.double()(ids)[0]), f"T={length}{label}")
    return gauge


@check("bfloat16 against float32", *MODELS)
def bfloat16(bench: Bench) -> Gauge:
    """Bfloat16 adds only rounding errors, both under autocast (as in training) and with the part alone in bfloat16. The
    error is relative, in the 2-norm of the whole output."""
    gauge = Gauge(0.05, "relative error")
    model, ids = bench.model(plain_init=True).eval(), tokens(2, 64)
    expected = model(ids)[0]
    with torch.autocast("cpu", torch.bfloat16):
        gauge.record((model(ids)[0].float() - expected).norm() / expected.norm(), "autocast, T=64")
    if bench.kind in ("attention", "norm", "ffn") or (bench.kind == "position" and _position_methods(bench)):
        in_float32, in_bfloat16 = (dict(outputs_alone(bench, 33, dtype)) for dtype in (torch.float32, torch.bfloat16))
        for name, out in in_bfloat16.items():
            error = (out.float() - in_float32[name]).norm() / in_float32[name].norm().clamp_min(1e-6)
            gauge.record(error, f"alone, T=33 {name}".strip())
    return gauge


@check("one graph under compile", *MODELS, slow=True)
def compiles(bench: Bench) -> Gauge:
    """Forward and loss compile into one graph without a break, and give the values and gradients of eager mode."""
    gauge = Gauge(1e-4, "relative difference")
    for backend in ("aot_eager", "inductor") if bench.inductor else ("aot_eager",):
        torch.compiler.reset()
        model, results = bench.model(**({} if bench.kind == "model" else {"n_layer": 1})), []
        step, ids = _Step(model), tokens(2, 14)
        for compiled in (False, True):
            if compiled:
                step.compile(backend=backend, fullgraph=True)
            step.zero_grad()
            value = step(ids)
            value.backward()
            results.append([value.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
        for ours, theirs in zip(*results, strict=True):
            gauge.record((ours - theirs).abs().max() / max(1.0, theirs.abs().max()), f"{backend}, T=13")
    return gauge


class _Step(nn.Module):
    """Model and loss as one module, which is what the toolkit compiles."""

    def __init__(self, model):
        super().__init__()
        self.model, self.loss = model, plain_part("loss")()

    def forward(self, ids):
        return objective(self.model, ids, self.loss)


@check("state dict round trip", *MODELS)
def restored(bench: Bench) -> Gauge:
    """Weights that are saved and loaded into a model of another seed give the same outputs."""
    gauge, file, ids = Gauge(0.0, "largest difference"), io.BytesIO(), tokens(2, 33)
    model, other = bench.model().eval(), bench.model(seed=1).eval()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    gauge.record((model(ids)[0] - other(ids)[0]).abs().max(), "T=33")
    return gauge


@check("parameters and FLOPs counted", *MODELS)
def counted(bench: Bench) -> Gauge:
    """The part builds and runs on the meta device, on which a dry run counts. No parameter is a scalar (FSDP2)."""
    model = bench.model()
    with torch.device("meta"):
        meta_model = bench.model()
    count, flops = facts.parameters(meta_model), facts.flops_per_token(meta_model, LONGEST)
    scalars = [name for name, parameter in model.named_parameters() if parameter.ndim == 0]
    if scalars:
        raise Broken(f"parameters without a dimension, which FSDP2 refuses: {', '.join(scalars)}; give them shape (1,)")
    real_count = sum(p.numel() for p in model.parameters())
    meta_count = sum(p.numel() for p in meta_model.parameters())
    gauge = Gauge(0.0, "difference", note=f"{count['total']:,} parameters, {flops:,} FLOPs a token")
    gauge.record(abs(real_count - meta_count), f"meta against real, T={LONGEST}")
    if not 0 < count["active"] <= count["total"] or flops <= 0:
        raise Broken(f"counts that can't be: {count}, {flops} FLOPs a token")
    return gauge


@check("positions used, and nothing beside them", "position")
def position_pure(bench: Bench) -> Gauge:
    """rotate, embed and score_bias depend only on the given positions: a slice of the sequence gives that slice of the
    result, each row may have its own positions, and heads may have another size."""
    part = bench.cls(DIM, HEADS, HEAD_DIM, LONGEST)
    gauge, positions = Gauge(1e-5), torch.arange(LONGEST)[None]
    q, k, x = torch.randn(2, 64, HEADS, HEAD_DIM), torch.randn(2, 64, 2, HEAD_DIM), torch.randn(2, 64, DIM)
    row_positions = torch.stack((torch.arange(13), torch.arange(20, 33)))
    for start, end in ((0, 1), (7, 8), (5, 18), (63, 64)):
        slice_positions = positions[:, start:end]
        if hasattr(part, "rotate"):
            whole, part_of_slice = (
                part.rotate(q, k, positions),
                part.rotate(q[:, start:end], k[:, start:end], slice_positions),
            )
            for from_whole, from_slice in zip(whole, part_of_slice, strict=True):
                gauge.record(relative(from_slice, from_whole[:, start:end]), "rotate, offset")
        if hasattr(part, "embed"):
            gauge.record(
                relative(part.embed(x[:, start:end], slice_positions), part.embed(x, positions)[:, start:end]),
                "embed, offset",
            )
        if hasattr(part, "score_bias"):
            from_whole, from_slice = (
                part.score_bias(positions[0], positions[0]),
                part.score_bias(slice_positions[0], positions[0]),
            )
            gauge.record(relative(from_slice, from_whole[:, start:end]), "score_bias, offset")
    if hasattr(part, "rotate"):
        both_rows = part.rotate(q[:, :13], k[:, :13], row_positions)[0]
        second_row = part.rotate(q[1:, :13], k[1:, :13], row_positions[1:])[0]
        gauge.record(relative(both_rows[1:], second_row), "rotate, positions by row")
        wide = torch.randn(2, 13, HEADS, 2 * HEAD_DIM)
        gauge.record(float(part.rotate(wide, wide, positions[:, :13])[0].shape != wide.shape), "rotate, heads of 16")
    if hasattr(part, "embed"):
        both_rows = part.embed(x[:, :13], row_positions)
        gauge.record(relative(both_rows[1:], part.embed(x[1:, :13], row_positions[1:])), "embed, positions by row")
    if not gauge.tried:
        raise NotApplicable(NO_METHOD)
    return gauge


@check("slots used, or declared in `ignores`", "mixer")
def slots(bench: Bench) -> Gauge:
    """A mixer uses the position part and the attention kernel that it is given, or declares that it ignores them."""
    ids, ignores = tokens(2, 13), getattr(bench.entry.cls, "ignores", ())
    gauge = Gauge(note=f"ignores {', '.join(ignores)}" if ignores else "uses attention and position")
    changes = {"attention": _Nothing, "position": position_with("rotate"), "position ": position_with("score_bias")}
    for slot, replacement in changes.items():
        other_slots = {} if slot == "attention" else {"position": _Nowhere}
        before = bench.model(**other_slots).eval()(ids)[0]
        try:
            after = bench.model(**{slot.strip(): replacement}).eval()(ids)[0]
        except ValueError:  # refused when built, with a remedy: this is as good as being used
            gauge.record(0, f"{slot.strip()} {replacement.__name__}: refused")
            continue
        if torch.equal(before, after) and slot.strip() not in ignores:
            raise Broken(f"GPT.{slot.strip()} changes nothing; use it, or declare ignores = ({slot.strip()!r},)")
        gauge.record(0, f"{slot.strip()} replaced")
    return gauge


class _Nothing(nn.Module):
    """A kernel that returns zeros."""

    supports = {"offset", "bias", "documents", "gqa"}

    def __init__(self, n_head, head_dim):
        super().__init__()

    def forward(self, q, k, v, mask=None):
        return torch.zeros(*q.shape[:-1], v.shape[-1], dtype=q.dtype)


class _Nowhere(nn.Module):
    """A position part without any effect."""

    def __init__(self, dim, n_head, head_dim, max_len):
        super().__init__()


def outputs_alone(bench: Bench, length: int, dtype: torch.dtype) -> list[tuple[str, torch.Tensor]]:
    """(name, output) of the part alone in a dtype. The inputs are the same for every dtype, up to rounding."""
    generator = torch.Generator().manual_seed(4)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    if bench.kind == "attention":
        q, k, v = (draw(2, length, HEADS, HEAD_DIM) for _ in range(3))
        return [("", bench.cls(HEADS, HEAD_DIM).to(dtype).eval()(q, k, v))]
    if bench.kind in ("norm", "ffn"):
        torch.manual_seed(0)
        return [("", _forward(bench, bench.cls(DIM).to(dtype).eval(), draw(2, length, DIM)))]
    if bench.kind == "position":
        torch.manual_seed(0)
        part, positions = bench.cls(DIM, HEADS, HEAD_DIM, LONGEST), torch.arange(length)[None]
        outputs = []
        if hasattr(part, "embed"):
            outputs.append(("embed", part.to(dtype).embed(draw(2, length, DIM), positions)))
        if hasattr(part, "rotate"):
            q, k = part.rotate(draw(2, length, HEADS, HEAD_DIM), draw(2, length, 2, HEAD_DIM), positions)
            outputs += [("rotate q", q), ("rotate k", k)]
        if hasattr(part, "score_bias"):
            bias = part.score_bias(positions[0], positions[0])
            if bias.shape != (HEADS, length, length) or not bias.isfinite().all():
                raise Broken(f"score_bias gave {tuple(bias.shape)}; it has to give ({HEADS}, T, S), all of it finite")
            outputs += [("score_bias", bias.to(dtype))]
        return outputs
    return [("in a model", bench.model().to(dtype)(tokens(2, length))[0])]


def _position_methods(bench: Bench) -> list[str]:
    return [method for method in ("embed", "rotate", "score_bias") if hasattr(bench.entry.cls, method)]


def _forward(bench: Bench, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return module(x) if bench.kind == "norm" else module(x, Context())
