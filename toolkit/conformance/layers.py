"""Checks of any part inside a model, and of whole models: shapes, what an output depends on, precision and counts."""

from __future__ import annotations

import io

import torch
from torch import Tensor, nn

from toolkit.conformance.bench import LENGTHS, LONGEST, MODELS, VOCAB, Bench, relative, tokens
from toolkit.conformance.lines import Broken, Gauge, NotApplicable, check
from toolkit.rundir import facts


@check("output has the right shape", *MODELS, look_at="transposes, flattened axes, and streams that stay open")
def shape(bench: Bench) -> Gauge:
    """Hidden states are (B, T, C), finite and float32 at every length and depth, and logits are (B, T, V)."""
    gauge = Gauge(0.0, "wrong shapes")
    depths = (1, 2, 3) if bench.kind in ("block", "mixer", "ffn") else (2,)
    for n_layer in depths:
        for label, model in bench.models(**({} if bench.kind == "model" else {"n_layer": n_layer})):
            for length in LENGTHS:
                hidden, head = model(tokens(3, length))
                if hidden.dtype != torch.float32:
                    raise Broken(f"the output at T={length}{label} is {hidden.dtype}, but must be float32 as the input")
                if not hidden.isfinite().all():
                    raise Broken(
                        f"the output at T={length}{label}, {n_layer} layers, is not finite; look at divisions, roots, "
                        "logarithms and rows that are masked completely"
                    )
                wrong = hidden.shape[:2] != (3, length) or head.logits(hidden).shape != (3, length, VOCAB)
                gauge.record(float(wrong), f"T={length}{label}")
    if len(depths) > 1:
        gauge.tried.append("1, 2, 3 layers")
    return gauge


@check("sequences of a batch are independent", *MODELS, look_at="means, norms and state over the batch axis")
def rows(bench: Bench) -> Gauge:
    """The hidden states of a sequence do not depend on the other sequences of the batch."""
    gauge = Gauge(1e-4, "difference between alone and in a batch")
    for label, model in bench.models():
        ids = tokens(4, 33)
        whole = model(ids)[0]
        for row in range(4):
            gauge.record(relative(whole[row : row + 1], model(ids[row : row + 1])[0]), f"B=4, T=33{label}")
    return gauge


@check(
    "causal: later tokens change no output",
    *MODELS,
    look_at="the mask, the padding of convolutions, and means over positions",
)
def causal_values(bench: Bench) -> Gauge:
    """Changing token t changes the output at t, and nothing before t; for every t. The error is the largest change
    before t, relative to the largest change at any position."""
    gauge = Gauge(1e-5, "relative change before the changed token")
    for label, model in bench.models():
        for length in LENGTHS[1:]:
            ids = tokens(1, length).repeat(length + 1, 1)
            changed = torch.arange(length)
            ids[changed + 1, changed] = (ids[changed + 1, changed] + 1) % VOCAB  # row t + 1 differs from row 0 at t
            hidden = model(ids)[0]
            moved = (hidden[1:] - hidden[:1]).abs().amax(-1)  # (changed t, position)
            unmoved = (moved.diagonal() == 0).nonzero()
            if len(unmoved):
                raise Broken(
                    f"changing token {int(unmoved[0])} of {length} does not change the output at its own position, as "
                    "it must; look at the mask, which may exclude a token from itself, and at the residual connections"
                )
            gauge.record(moved.tril(-1).max() / moved.max(), f"T={length}{label}")
    return gauge


@check(
    "causal: no gradient from later tokens",
    *MODELS,
    look_at="the mask, and terms that are zero only in value, such as x - x.detach()",
)
def causal_gradients(bench: Bench) -> Gauge:
    """The output at t has no gradient with respect to the embeddings of later tokens. The error is the largest gradient
    of a later token, relative to the largest of any token."""
    gauge = Gauge(1e-5, "relative gradient of later tokens")
    for label, model in bench.models():
        tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
        if not tables:
            raise NotApplicable("the model has no nn.Embedding, so there is no embedding to take the gradient for")
        embedded: list[Tensor] = []  # (1, T, C)
        tables[0].register_forward_hook(lambda module, args, out, outputs=embedded: outputs.append(out))
        for length in (2, 13, 64):
            embedded.clear()
            hidden = model(tokens(1, length))[0]
            for t in sorted({0, (length - 2) // 2, length - 2}):
                projection = (hidden[:, t] * torch.randn(hidden.shape[-1])).sum()
                (gradient,) = torch.autograd.grad(projection, embedded[0], retain_graph=True)
                if not gradient.any():
                    raise Broken(
                        f"the output at position {t} of {length} has no gradient for any token, and must have one for "
                        "its own; look for detach(), torch.no_grad() and rounding"
                    )
                gauge.record(gradient[:, t + 1 :].abs().max() / gradient.abs().max(), f"T={length}{label}")
    return gauge


@check(
    "float32 agrees with float64",
    *MODELS,
    look_at="differences of large numbers, a missing eps, and sums in low precision",
)
def float64(bench: Bench) -> Gauge:
    """The model gives the same output in float32 and float64, up to rounding."""
    gauge = Gauge(1e-4, "relative difference")
    for label, model in bench.models():
        for length in (1, 13, 64):
            ids = tokens(2, length)
            ours = model.float()(ids)[0]
            gauge.record(relative(ours, model.double()(ids)[0]), f"T={length}{label}")
    return gauge


@check(
    "weights survive saving and loading",
    *MODELS,
    look_at="tensors that are neither a parameter nor a buffer, and buffers with persistent=False",
)
def restored(bench: Bench) -> Gauge:
    """Weights that are saved and loaded into a model of another seed give the same outputs."""
    gauge, file, ids = Gauge(0.0, "largest difference"), io.BytesIO(), tokens(2, 33)
    model, other = bench.model().eval(), bench.model(seed=1).eval()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    gauge.record((model(ids)[0] - other(ids)[0]).abs().max(), "T=33")
    return gauge


@check(
    "parameters and FLOPs can be counted",
    *MODELS,
    look_at="constructors that choose sizes by the device or by values of tensors",
)
def counted(bench: Bench) -> Gauge:
    """The part builds and runs on the meta device, on which a dry run counts. No parameter is a scalar (FSDP2)."""
    model = bench.model()
    with torch.device("meta"):
        meta_model = bench.model()
    count, flops = facts.parameters(meta_model), facts.flops_per_token(meta_model, LONGEST)
    scalars = [name for name, parameter in model.named_parameters() if parameter.ndim == 0]
    if scalars:
        raise Broken(f"FSDP2 refuses parameters that are scalars: {', '.join(scalars)}; give them the shape (1,)")
    real_count = sum(p.numel() for p in model.parameters())
    meta_count = sum(p.numel() for p in meta_model.parameters())
    note = f"{count['total']:,} parameters, {flops:,} FLOPs per token"
    gauge = Gauge(0.0, "difference between parameters on the meta device and on the CPU", note=note)
    gauge.record(abs(real_count - meta_count), f"meta against CPU, T={LONGEST}")
    if not 0 < count["active"] <= count["total"] or flops <= 0:
        raise Broken(
            f"impossible counts on the meta device: {count['active']:,} active of {count['total']:,} parameters, "
            f"{flops:,} FLOPs per token; active must be above 0 and at most the total, FLOPs above 0"
        )
    return gauge
