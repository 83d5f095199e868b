"""Feed-forward networks against references that are not ours."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import parts, tiny_gpt
from torch import nn
from transformers.activations import ACT2FN
from transformers.models.llama import modeling_llama as llama
from transformers.models.mixtral import modeling_mixtral as mixtral

from components.ffn import GEGLU, GELU, GLU, Bilinear, MixtureOfExperts, ReGLU, ReLU, SiLU, SquaredReLU, SwiGLU
from parity.reference import llama_config, randomize
from toolkit.context import Context
from toolkit.rundir.facts import flops_per_token, parameters

PLAIN = {
    ReLU: (lambda x: max(x, 0.0), "relu"),
    GELU: (lambda x: 0.5 * x * (1 + math.erf(x / 2**0.5)), "gelu"),
    SiLU: (lambda x: x / (1 + math.exp(-x)), "silu"),
    SquaredReLU: (lambda x: max(x, 0.0) ** 2, "relu2"),
}
GATED = {
    GLU: (lambda x: 1 / (1 + math.exp(-x)), "sigmoid"),
    Bilinear: (lambda x: x, "linear"),
    ReGLU: (lambda x: max(x, 0.0), "relu"),
    GEGLU: (lambda x: 0.5 * x * (1 + math.erf(x / 2**0.5)), "gelu"),
    SwiGLU: (lambda x: x / (1 + math.exp(-x)), "silu"),
}


def apply(function, x):
    """A function of floats on every number, in float64."""
    x = x.detach().double()
    return torch.tensor([function(value) for value in x.flatten().tolist()], dtype=torch.float64).view_as(x)


def linear(layer, x, rows=slice(None)):
    """x W^T + b over some of the rows, in float64."""
    out = x.double() @ layer.weight[rows].detach().double().T
    return out if layer.bias is None else out + layer.bias[rows].detach().double()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("cls", PLAIN, ids=lambda cls: cls.__name__)
def test_plain_networks_equal_the_formula_and_transformers(cls, bias, parity):
    function, name = PLAIN[cls]
    x, ours = torch.randn(2, 5, 32), randomize(cls(32, bias=bias))
    formula = linear(ours.down, apply(function, linear(ours.up, x)))
    parity(cls.__name__, "formula, float64", ours(x, Context()), formula)
    parity(cls.__name__, f"transformers ACT2FN['{name}']", ours(x, Context()), ours.down(ACT2FN[name](ours.up(x))))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("cls", GATED, ids=lambda cls: cls.__name__)
def test_gated_networks_equal_the_formula_and_llama(cls, bias, parity):
    function, name = GATED[cls]
    x, ours = torch.randn(2, 5, 32), randomize(cls(32, hidden=96, bias=bias))
    halves = {"gate_proj": slice(0, 96), "up_proj": slice(96, 192)}
    gate, up = (linear(ours.gate_up, x, rows) for rows in halves.values())
    parity(cls.__name__, "formula, float64", ours(x, Context()), linear(ours.down, apply(function, gate) * up))
    theirs = llama.LlamaMLP(llama_config(mlp_bias=bias, hidden_act=name))
    for leaf in ("weight", "bias")[: 1 + bias]:
        for half, rows in halves.items():
            getattr(getattr(theirs, half), leaf).data = getattr(ours.gate_up, leaf).data[rows]
        getattr(theirs.down_proj, leaf).data = getattr(ours.down, leaf).data
    parity(cls.__name__, f"transformers LlamaMLP, {name}", ours(x, Context()), theirs(x))


def test_the_approximate_gelu_is_that_of_gpt2_and_gemma(parity):
    x, ours = torch.randn(2, 5, 32), randomize(GELU(32, tanh=True))
    expected = ours.down(ACT2FN["gelu_new"](ours.up(x)))
    parity("GELU", "transformers ACT2FN['gelu_new']", ours(x, Context()), expected)
    gated = randomize(GEGLU(32, hidden=96, tanh=True))
    gate, up = gated.gate_up.each(x)
    expected = gated.down(ACT2FN["gelu_pytorch_tanh"](gate) * up)
    parity("GEGLU", "transformers ACT2FN['gelu_pytorch_tanh']", gated(x, Context()), expected)
    assert not torch.equal(ours(x, Context()), ours.down(F.gelu(ours.up(x))))


def test_glu_equals_torch(parity):
    x, ours = torch.randn(2, 5, 32), randomize(GLU(32, hidden=96))
    gate, up = ours.gate_up(x).split(96, dim=-1)
    parity("GLU", "torch.nn.functional.glu", ours(x, Context()), ours.down(F.glu(torch.cat((up, gate), dim=-1))))


@pytest.mark.parametrize("dim", [16, 64, 96, 384, 512, 768, 1024, 1600])
@pytest.mark.parametrize("cls", [*PLAIN, *GATED], ids=lambda cls: cls.__name__)
def test_default_widths_hold_as_many_parameters_as_the_plain_4c_network(cls, dim):
    with torch.device("meta"):
        ffn = cls(dim)
    count = sum(p.numel() for p in ffn.parameters())
    assert count == 8 * dim**2 if cls in PLAIN else abs(count / (8 * dim**2) - 1) <= 1 / dim
    assert ffn.down.residual and (cls in PLAIN or ffn.down.in_features % 8 == 0)


def test_default_gated_widths_are_the_documented_ones():
    assert [SwiGLU(dim).down.in_features for dim in (2, 32, 64, 96, 768)] == [8, 88, 168, 256, 2048]
    assert SwiGLU(64).gate_up.merged == {"gate": 168, "up": 168}


# --- mixture of experts


def same_as_mixtral(ours, top_k):
    """Mixtral's block with our weights."""
    sizes = dict(hidden_size=32, intermediate_size=ours.experts[0].down.in_features, num_attention_heads=4)
    config = mixtral.MixtralConfig(**sizes, num_local_experts=len(ours.experts), num_experts_per_tok=top_k)
    config._experts_implementation = "eager"
    theirs = mixtral.MixtralSparseMoeBlock(config)
    theirs.gate.weight.data = ours.router.weight.data
    theirs.experts.gate_up_proj.data = torch.stack([e.gate_up.weight.data for e in ours.experts])
    theirs.experts.down_proj.data = torch.stack([e.down.weight.data for e in ours.experts])
    return theirs


@pytest.mark.parametrize("batch, length", [(2, 13), (1, 1), (3, 64), (1, 2)])
@pytest.mark.parametrize("experts, top_k", [(8, 2), (4, 1), (4, 4), (5, 3)])
def test_mixture_of_experts_equals_mixtral(experts, top_k, batch, length, parity):
    ours = randomize(MixtureOfExperts(32, experts=experts, top_k=top_k))
    theirs, context = same_as_mixtral(ours, top_k), Context()
    x = torch.randn(batch, length, 32, requires_grad=True)
    y, weight = x.detach().clone().requires_grad_(), torch.randn(batch, length, 32)
    out, expected = ours(x, context), theirs(y)
    parity("MixtureOfExperts", "transformers MixtralSparseMoeBlock", out, expected, 2e-6)
    balance = mixtral.load_balancing_loss_func((theirs.gate(y.flatten(0, 1))[0],), experts, top_k) / top_k
    mine = context.losses["moe/balance"]
    parity("MixtureOfExperts", "transformers load_balancing_loss_func / top_k", mine, 0.01 * balance)
    ((out * weight).sum() + mine).backward()
    ((expected * weight).sum() + 0.01 * balance).backward()
    gradients = [x.grad, ours.router.weight.grad]
    gradients += [torch.stack([getattr(e, n).weight.grad for e in ours.experts]) for n in ("gate_up", "down")]
    expected = [y.grad, theirs.gate.weight.grad, theirs.experts.gate_up_proj.grad, theirs.experts.down_proj.grad]
    if top_k == 1:  # a lone weight is 1 whatever the router says: only the balance loss moves it, by about nothing here
        del gradients[1], expected[1]
    parity("MixtureOfExperts", "transformers MixtralSparseMoeBlock, gradients", tuple(gradients), tuple(expected), 1e-5)


def test_mixture_of_experts_takes_any_spread_of_the_choices(parity):
    """All on the same experts, which makes every bin of theirs full, and next to all."""
    x = torch.randn(2, 32, 32)
    for lean in (0.0, 1.0, 100.0):
        ours = randomize(MixtureOfExperts(32))
        x[..., 0] = lean
        ours.router.weight.data[:2, 0] = lean
        context = Context()
        parity(
            "MixtureOfExperts",
            "transformers MixtralSparseMoeBlock",
            ours(x, context),
            same_as_mixtral(ours, 2)(x),
            2e-6,
        )
        assert context.metrics["moe/max_load"] <= 0.5 and context.metrics["moe/dropped_fraction"] == 0
    assert context.metrics["moe/max_load"] == 0.5  # one of the two choices each


def naive(ours, x, limit):
    """Token by token in float64, earlier positions first; beyond ``limit`` choices an expert says nothing."""
    x, out, taken, dropped = x.detach().double(), torch.zeros(*x.shape, dtype=torch.float64), {}, 0
    for t in range(x.shape[1]):
        for b in range(x.shape[0]):
            odds = linear(ours.router, x[b, t]).softmax(-1).tolist()
            best = sorted(range(len(odds)), key=lambda e: -odds[e])[: ours.top_k]
            for e in best:
                taken[e] = taken.get(e, 0) + 1
                if taken[e] > limit:
                    dropped += 1
                    continue
                expert = ours.experts[e]
                gate, up = linear(expert.gate_up, x[b, t]).chunk(2)
                share = odds[e] / sum(odds[other] for other in best)
                out[b, t] += share * linear(expert.down, apply(PLAIN[SiLU][0], gate) * up)
    return out, dropped / (x.shape[0] * x.shape[1] * ours.top_k)


@pytest.mark.parametrize("capacity", [0.3, 1.0, 1.25])
def test_mixture_of_experts_drops_the_latest_positions_in_training_alone(capacity, parity):
    ours, x, context = randomize(MixtureOfExperts(32, capacity=capacity)), torch.randn(3, 13, 32), Context()
    expected, dropped = naive(ours, x, math.ceil(capacity * 3 * 13 * 2 / 8))
    assert dropped > 0
    parity("MixtureOfExperts", "loop over tokens with a limit, float64", ours(x, context), expected, 2e-6)
    parity("MixtureOfExperts", "fraction dropped by that loop", context.metrics["moe/dropped_fraction"], dropped)
    expected, dropped = naive(ours, x, math.inf)
    parity("MixtureOfExperts", "loop over tokens, float64", ours.eval()(x, context), expected, 2e-6)
    assert dropped == 0


def test_with_a_capacity_no_later_token_touches_an_earlier_one_of_its_sequence():
    ours, x = randomize(MixtureOfExperts(32, capacity=0.5)), torch.randn(1, 32, 32)
    before = ours(x, Context())
    for t in range(32):
        changed = x.clone()
        changed[:, t] = torch.randn(32)
        assert torch.equal(ours(changed, Context())[:, :t], before[:, :t])


def test_losses_of_layers_add_up_and_metrics_are_those_of_the_worst():
    model, context, ids = tiny_gpt(ffn=MixtureOfExperts, n_layer=3), Context(), torch.randint(50, (2, 32))
    alone = []
    for block in model.blocks:
        block.ffn.register_forward_hook(lambda ffn, args, out: alone.append(ffn_alone(ffn, args[0])))
    model(ids, context)
    losses, loads = zip(*alone, strict=True)
    torch.testing.assert_close(context.losses["moe/balance"], sum(losses))
    assert list(context.losses) == ["moe/balance"] and context.metrics["moe/max_load"] == max(loads)


def ffn_alone(ffn, x):
    context = Context()
    ffn.forward(x, context)
    return context.losses["moe/balance"], context.metrics["moe/max_load"]


def test_a_balanced_router_has_a_balance_loss_of_its_weight_alone():
    ours, context = MixtureOfExperts(32, balance=0.5, experts=4, top_k=4), Context()
    ours(torch.randn(2, 13, 32), context)
    assert context.losses["moe/balance"].item() == pytest.approx(0.5)  # every expert gets a quarter of the choices


def test_active_parameters_equal_the_plain_network_and_flops_are_those_of_the_bins():
    with torch.device("meta"):
        moe, plain = (tiny_gpt(dim=96, max_len=128, n_layer=1, ffn=ffn) for ffn in (MixtureOfExperts, GELU))
    extra = parameters(moe)["active"] - parameters(plain)["active"]
    assert extra == 8 * 96  # the router
    assert parameters(moe)["total"] - parameters(moe)["active"] == 6 * 3 * 96 * 128
    more = flops_per_token(moe, 128) - flops_per_token(plain, 128)
    assert more == 6 * 8 * 96 + 6 * 8 * 96**2 // 2  # the router, and half as many rows again


def test_more_choices_than_experts_are_refused():
    with pytest.raises(ValueError, match="MixtureOfExperts.top_k = 5.*MixtureOfExperts.experts = 4"):
        MixtureOfExperts(32, experts=4, top_k=5)


@pytest.mark.parametrize("part", parts("ffn"))
def test_every_projection_back_into_the_residual_stream_says_so(part):
    layers = [m for name, m in part.cls(32).named_modules() if isinstance(m, nn.Linear) and name.endswith("down")]
    assert layers and all(layer.residual for layer in layers)
