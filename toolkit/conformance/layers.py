"""Checks of what stands inside the model: attention, position, mixer, norm, ffn and block, and a whole model."""

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
from toolkit.conformance.report import Broken, Gauge, NotApplicable, check
from toolkit.context import Context
from toolkit.rundir import facts

MODELS = (*LAYERS, "model")
NO_METHOD = "it has none of rotate, embed and score_bias: it does nothing"


@check("shape kept", *MODELS)
def shape(bench: Bench) -> Gauge:
    """Hidden states are (B, T, C), finite, in float32, at every length and depth."""
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
                gauge.see(float(wrong), f"T={length}{label}")
    if len(depths) > 1:
        gauge.tried.append("1, 2, 3 layers")
    return gauge


@check("dtype kept", *LAYERS)
def dtype(bench: Bench) -> Gauge:
    """The part alone, or a model of it, in each of three dtypes: what comes out is of the dtype that went in."""
    if bench.kind == "position" and not _methods(bench):
        raise NotApplicable(NO_METHOD)
    gauge = Gauge(0.0, "wrong dtypes")
    for kept in (torch.float32, torch.bfloat16, torch.float64):
        for name, out in alone(bench, 13, kept):
            gauge.see(float(out.dtype != kept), f"{str(kept)[6:]} {name}".strip())
    return gauge


@check("each position on its own", "norm", "ffn")
def pointwise(bench: Bench) -> Gauge:
    """A position's output does not depend on the others."""
    gauge = Gauge(1e-5)
    for length in (2, 13, 64):
        module, x = bench.cls(DIM).eval(), torch.randn(2, length, DIM)
        whole = _apply(bench, module, x)
        for t in {0, length // 2, length - 1}:
            gauge.see(relative(_apply(bench, module, x[:, t : t + 1]), whole[:, t : t + 1]), f"T={length}")
    return gauge


@check("rows on their own", *MODELS)
def rows(bench: Bench) -> Gauge:
    """A sequence's hidden states do not depend on what else is in the batch."""
    gauge = Gauge(1e-4)
    for label, model in bench.models():
        ids = tokens(4, 33)
        whole = model(ids)[0]
        for row in range(4):
            gauge.see(relative(whole[row : row + 1], model(ids[row : row + 1])[0]), f"B=4, T=33{label}")
    return gauge


@check("causality, by values", *MODELS)
def causal_values(bench: Bench) -> Gauge:
    """Change token t, each t in turn: nothing before t moves, and t does."""
    gauge = Gauge(1e-5, "share of the movement that went backwards,")
    for label, model in bench.models():
        for length in LENGTHS[1:]:
            ids = tokens(1, length).repeat(length + 1, 1)
            at = torch.arange(length)
            ids[at + 1, at] = (ids[at + 1, at] + 1) % VOCAB  # row t + 1 differs from row 0 at t
            hidden = model(ids)[0]
            moved = (hidden[1:] - hidden[:1]).abs().amax(-1)  # (t changed, position)
            stuck = (moved.diagonal() == 0).nonzero()
            if len(stuck):
                raise Broken(f"changing token {int(stuck[0])} of {length} does not move its own output")
            gauge.see(moved.tril(-1).max() / moved.max(), f"T={length}{label}")
    return gauge


@check("causality, by gradients", *MODELS)
def causal_gradients(bench: Bench) -> Gauge:
    """The output at t has no gradient with respect to later embedded tokens."""
    gauge = Gauge(1e-5, "share of the gradient from later positions,")
    for label, model in bench.models():
        embedded = []
        model.embed.register_forward_hook(lambda module, args, out, kept=embedded: kept.append(out))
        for length in (2, 13, 64):
            embedded.clear()
            hidden = model(tokens(1, length))[0]
            for t in sorted({0, (length - 2) // 2, length - 2}):
                seen = (hidden[:, t] * torch.randn(hidden.shape[-1])).sum()
                (gradient,) = torch.autograd.grad(seen, embedded[0], retain_graph=True)
                gauge.see(gradient[:, t + 1 :].abs().max() / gradient.abs().max(), f"T={length}{label}")
    return gauge


@check("gradients reach every parameter", *MODELS, "init")
def gradients(bench: Bench) -> Gauge:
    """Within 5 optimizer steps every parameter has had a finite gradient that is not zero."""
    model = bench.model()
    optimizer, reached, last = torch.optim.SGD(model.parameters(), lr=1e-3), {}, 0
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    for step in range(5):  # several: a projection that starts at zero hides what lies before it for one step
        optimizer.zero_grad()
        objective(model, tokens(4, 33, seed=step)).backward()
        for name, parameter in trainable:
            if parameter.grad is None:
                continue
            if not parameter.grad.isfinite().all():
                raise Broken(f"the gradient of {name} is not finite at step {step}")
            if parameter.grad.any() and name not in reached:
                reached[name], last = step, step
        optimizer.step()
    missing = [name for name, _ in trainable if name not in reached]
    if missing:
        raise Broken(f"no gradient in 5 steps: {', '.join(missing)}")
    gauge = Gauge(note=f"{len(reached)} of {len(reached)} parameters, the last at step {last}")
    gauge.see(0, "B=4, T=32, 5 steps")
    return gauge


@check("two steps lower the loss", *MODELS, "init")
def learns(bench: Bench) -> Gauge:
    """Two steps of AdamW on one batch lower its loss."""
    return two_steps(bench.model(plain_init=True), plain_part("loss")())


@check("the seed fixes everything", *MODELS, "init")
def deterministic(bench: Bench) -> Gauge:
    """Equal seeds give equal weights and outputs, whatever was drawn before; the global generator stays as found."""
    first = bench.model(dropout=0.1) if bench.kind != "model" else bench.model()
    torch.rand(1000)
    found = torch.get_rng_state()
    second = bench.model(dropout=0.1) if bench.kind != "model" else bench.model()
    if not torch.equal(found, torch.get_rng_state()):
        raise Broken("building the part moves the global random generator; draw in the constructor, or from `draw`")
    gauge, ids, outputs = Gauge(0.0, "largest difference"), tokens(2, 13), []
    for name, value in first.state_dict().items():
        gauge.see((value.double() - second.state_dict()[name].double()).abs().max(), "weights of two builds")
    for model in (first, second, second):
        torch.manual_seed(3)
        outputs.append(model(ids)[0])
    gauge.see((outputs[0] - outputs[1]).abs().max(), "outputs of two builds")
    gauge.see((outputs[1] - outputs[2]).abs().max(), "one build called twice")
    other = bench.model(seed=1).state_dict()
    if not any((value != other[name]).any() for name, value in bench.model().state_dict().items()):
        raise Broken("another seed gives the same weights")
    return gauge


@check("float32 against float64", *MODELS)
def precise(bench: Bench) -> Gauge:
    """The model in float64 gives what it gives in float32, but for rounding."""
    gauge = Gauge(1e-4, "relative difference")
    for label, model in bench.models():
        for length in (1, 13, 64):
            ids = tokens(2, length)
            ours = model.float()(ids)[0]
            gauge.see(relative(ours, model.double()(ids)[0]), f"T={length}{label}")
    return gauge


@check("bfloat16 against float32", *MODELS)
def half(bench: Bench) -> Gauge:
    """Under autocast to bfloat16, as one trains, and the part alone in bfloat16: rounding and no more. Relative error
    of the whole output, in the 2-norm."""
    gauge = Gauge(0.05, "relative error")
    model, ids = bench.model(plain_init=True).eval(), tokens(2, 64)
    expected = model(ids)[0]
    with torch.autocast("cpu", torch.bfloat16):
        gauge.see((model(ids)[0].float() - expected).norm() / expected.norm(), "autocast, T=64")
    if bench.kind in ("attention", "norm", "ffn") or (bench.kind == "position" and _methods(bench)):
        singles, halves = (dict(alone(bench, 33, kept)) for kept in (torch.float32, torch.bfloat16))
        for name, out in halves.items():
            error = (out.float() - singles[name]).norm() / singles[name].norm().clamp_min(1e-6)
            gauge.see(error, f"alone, T=33 {name}".strip())
    return gauge


@check("one graph under compile", *MODELS, slow=True)
def compiles(bench: Bench) -> Gauge:
    """Forward and loss compile into one graph without a break, with the values and gradients of eager."""
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
            gauge.see((ours - theirs).abs().max() / max(1.0, theirs.abs().max()), f"{backend}, T=13")
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
    """Weights saved and read back into a model of another seed give the same outputs: nothing lives elsewhere."""
    gauge, file, ids = Gauge(0.0, "largest difference"), io.BytesIO(), tokens(2, 33)
    model, other = bench.model().eval(), bench.model(seed=1).eval()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    gauge.see((model(ids)[0] - other(ids)[0]).abs().max(), "T=33")
    return gauge


@check("parameters and FLOPs counted", *MODELS)
def counted(bench: Bench) -> Gauge:
    """The part builds and runs on the meta device, where a dry run counts; parameters have a dimension (FSDP2)."""
    model = bench.model()
    with torch.device("meta"):
        blank = bench.model()
    count, flops = facts.parameters(blank), facts.flops_per_token(blank, LONGEST)
    scalars = [name for name, parameter in model.named_parameters() if parameter.ndim == 0]
    if scalars:
        raise Broken(f"parameters without a dimension, which FSDP2 refuses: {', '.join(scalars)}; give them shape (1,)")
    real = sum(p.numel() for p in model.parameters())
    meta = sum(p.numel() for p in blank.parameters())
    gauge = Gauge(0.0, "difference", note=f"{count['total']:,} parameters, {flops:,} FLOPs a token")
    gauge.see(abs(real - meta), f"meta against real, T={LONGEST}")
    if not 0 < count["active"] <= count["total"] or flops <= 0:
        raise Broken(f"counts that can't be: {count}, {flops} FLOPs a token")
    return gauge


@check("positions used, and nothing beside them", "position")
def position_pure(bench: Bench) -> Gauge:
    """rotate, embed and score_bias are functions of the positions given: a slice of the sequence gives a slice of the
    result, positions may differ by row, and heads may have another size."""
    part = bench.cls(DIM, HEADS, HEAD_DIM, LONGEST)
    gauge, at = Gauge(1e-5), torch.arange(LONGEST)[None]
    q, k, x = torch.randn(2, 64, HEADS, HEAD_DIM), torch.randn(2, 64, 2, HEAD_DIM), torch.randn(2, 64, DIM)
    by_row = torch.stack((torch.arange(13), torch.arange(20, 33)))
    for start, end in ((0, 1), (7, 8), (5, 18), (63, 64)):
        here = at[:, start:end]
        if hasattr(part, "rotate"):
            whole, piece = part.rotate(q, k, at), part.rotate(q[:, start:end], k[:, start:end], here)
            for all_of, some in zip(whole, piece, strict=True):
                gauge.see(relative(some, all_of[:, start:end]), "rotate, offset")
        if hasattr(part, "embed"):
            gauge.see(relative(part.embed(x[:, start:end], here), part.embed(x, at)[:, start:end]), "embed, offset")
        if hasattr(part, "score_bias"):
            all_of, some = part.score_bias(at[0], at[0]), part.score_bias(here[0], at[0])
            gauge.see(relative(some, all_of[:, start:end]), "score_bias, offset")
    if hasattr(part, "rotate"):
        rows_apart = part.rotate(q[:, :13], k[:, :13], by_row)[0]
        alone_too = part.rotate(q[1:, :13], k[1:, :13], by_row[1:])[0]
        gauge.see(relative(rows_apart[1:], alone_too), "rotate, positions by row")
        wide = torch.randn(2, 13, HEADS, 2 * HEAD_DIM)
        gauge.see(float(part.rotate(wide, wide, at[:, :13])[0].shape != wide.shape), "rotate, heads of 16")
    if hasattr(part, "embed"):
        rows_apart = part.embed(x[:, :13], by_row)
        gauge.see(relative(rows_apart[1:], part.embed(x[1:, :13], by_row[1:])), "embed, positions by row")
    if not gauge.tried:
        raise NotApplicable(NO_METHOD)
    return gauge


@check("slots used, or declared in `ignores`", "mixer")
def slots(bench: Bench) -> Gauge:
    """A mixer that is given a position and an attention kernel uses them, or says so: else they would be bound in
    vain."""
    ids, ignores = tokens(2, 13), getattr(bench.entry.cls, "ignores", ())
    gauge = Gauge(note=f"ignores {', '.join(ignores)}" if ignores else "uses attention and position")
    changes = {"attention": _Nothing, "position": position_with("rotate"), "position ": position_with("score_bias")}
    for slot, other in changes.items():
        base = {} if slot == "attention" else {"position": _Nowhere}
        before = bench.model(**base).eval()(ids)[0]
        try:
            after = bench.model(**{slot.strip(): other}).eval()(ids)[0]
        except ValueError:  # refused when built, with a remedy: as good as used
            gauge.see(0, f"{slot.strip()} {other.__name__}: refused")
            continue
        if torch.equal(before, after) and slot.strip() not in ignores:
            raise Broken(f"GPT.{slot.strip()} changes nothing; use it, or declare ignores = ({slot.strip()!r},)")
        gauge.see(0, f"{slot.strip()} replaced")
    return gauge


class _Nothing(nn.Module):
    """A kernel that returns zeros."""

    supports = {"offset", "bias", "documents", "gqa"}

    def __init__(self, n_head, head_dim):
        super().__init__()

    def forward(self, q, k, v, mask=None):
        return torch.zeros(*q.shape[:-1], v.shape[-1], dtype=q.dtype)


class _Nowhere(nn.Module):
    """No position at all."""

    def __init__(self, dim, n_head, head_dim, max_len):
        super().__init__()


def alone(bench: Bench, length: int, kept: torch.dtype) -> list[tuple[str, torch.Tensor]]:
    """(name, output) of the part on its own in a dtype; the inputs are the same in each."""
    generator = torch.Generator().manual_seed(4)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(kept)

    if bench.kind == "attention":
        q, k, v = (draw(2, length, HEADS, HEAD_DIM) for _ in range(3))
        return [("", bench.cls(HEADS, HEAD_DIM).to(kept).eval()(q, k, v))]
    if bench.kind in ("norm", "ffn"):
        torch.manual_seed(0)
        return [("", _apply(bench, bench.cls(DIM).to(kept).eval(), draw(2, length, DIM)))]
    if bench.kind == "position":
        torch.manual_seed(0)
        part, at = bench.cls(DIM, HEADS, HEAD_DIM, LONGEST), torch.arange(length)[None]
        outputs = []
        if hasattr(part, "embed"):
            outputs.append(("embed", part.to(kept).embed(draw(2, length, DIM), at)))
        if hasattr(part, "rotate"):
            q, k = part.rotate(draw(2, length, HEADS, HEAD_DIM), draw(2, length, 2, HEAD_DIM), at)
            outputs += [("rotate q", q), ("rotate k", k)]
        if hasattr(part, "score_bias"):
            bias = part.score_bias(at[0], at[0])
            if bias.shape != (HEADS, length, length) or not bias.isfinite().all():
                raise Broken(f"score_bias gave {tuple(bias.shape)}; it has to give ({HEADS}, T, S), all of it finite")
            outputs += [("score_bias", bias.to(kept))]
        return outputs
    return [("in a model", bench.model().to(kept)(tokens(2, length))[0])]


def _methods(bench):
    return [method for method in ("embed", "rotate", "score_bias") if hasattr(bench.entry.cls, method)]


def _apply(bench, module, x):
    return module(x) if bench.kind == "norm" else module(x, Context())
