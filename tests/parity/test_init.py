"""Inits against published standard deviations, PyTorch's own initialisers, and what their papers promise."""

from functools import partial

import pytest
import torch
from conftest import tiny_gpt
from torch import nn

from components.ffn import GELU
from components.init import DeepNormInit, DepthScaled, GPT2Init, MuP, Orthogonal, SmallInit
from components.loss import CrossEntropy
from components.mixer import SelfAttention
from toolkit.groups import parameter_groups


def filled(init, rows, cols, name="blocks.0.mixer.qkv.weight", residual=False, merged=None):
    """A matrix as the model would hand it to the init."""
    parameter = nn.Parameter(torch.full((rows, cols), torch.nan))
    parameter.residual, parameter.merged, parameter.tied = residual, merged, False
    with torch.no_grad():
        init(name, parameter, torch.Generator().manual_seed(3))
    return parameter


def bare_gpt(init, **overrides):
    mixer, ffn = partial(SelfAttention, bias=True), partial(GELU, bias=True)
    return tiny_gpt(512, init=init, **{**dict(dim=256, n_layer=3, mixer=mixer, ffn=ffn), **overrides})


def check_model(part, reference, model, expected, parity):
    """``expected(name, parameter, residual)`` is the published standard deviation of a matrix."""
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert (parameter == (1.0 if name.endswith("weight") else 0.0)).all(), name
        elif parameter.ndim == 1:
            assert (parameter == 0).all(), name
        else:
            std = expected(name, parameter, name.endswith(("mixer.out.weight", "ffn.down.weight")))
            parity(part, reference, parameter.std(), std, 0.02)
            assert abs(parameter.mean().item()) < 0.02 * std, name


def test_gpt2_init_has_the_published_standard_deviations(parity):
    def expected(name, parameter, residual):
        return 0.02 / 6**0.5 if residual else 0.02

    check_model("GPT2Init", "published standard deviations", bare_gpt(GPT2Init), expected, parity)


def test_small_init_has_the_published_standard_deviations(parity):
    def expected(name, parameter, residual):
        return 2 / (3 * 256**0.5) if residual else (2 / (5 * 256)) ** 0.5

    check_model("SmallInit", "published standard deviations", bare_gpt(SmallInit), expected, parity)


def test_depth_scaled_has_the_published_standard_deviations(parity):
    def expected(name, parameter, residual):
        return 0.02 / (2 * (1 + int(name.split(".")[1]))) ** 0.5 if residual else 0.02

    check_model("DepthScaled", "published standard deviations", bare_gpt(DepthScaled), expected, parity)
    outside = filled(DepthScaled(3), 512, 256, "head.weight", residual=True)
    parity("DepthScaled", "published standard deviations", outside.std(), 0.02, 0.02)


# --- orthogonal


@pytest.mark.parametrize("rows, cols", [(48, 128), (128, 48), (96, 96)])
@pytest.mark.parametrize("residual", [False, True])
def test_orthogonal_matrices_are_orthogonal(rows, cols, residual, parity):
    w = filled(Orthogonal(3, gain=1.5), rows, cols, residual=residual)
    gain = 1.5 / 6**0.5 if residual else 1.5
    product = w @ w.T if rows <= cols else w.T @ w
    parity("Orthogonal", "W W^T = gain^2 I", product, gain**2 * torch.eye(min(rows, cols)), 1e-5)


def test_merged_matrices_are_orthogonal_each_on_its_own(parity):
    w = filled(Orthogonal(3), 128, 64, merged={"q": 64, "k": 32, "v": 32})
    for matrix in w.split((64, 32, 32)):
        parity("Orthogonal", "W W^T = gain^2 I, merged", matrix @ matrix.T, torch.eye(len(matrix)), 1e-5)


def test_an_orthogonal_model_has_normal_tables_and_zero_biases(parity):
    model = bare_gpt(Orthogonal, tie_embeddings=False)
    for table in (model.embed.weight, model.unembed.weight):
        parity("Orthogonal", "standard deviation of the tables", table.std(), 0.02, 0.02)
    assert (model.blocks[0].mixer.qkv.bias == 0).all()
    down = model.blocks[0].ffn.down.weight
    parity("Orthogonal", "W W^T = gain^2 I, in a model", down @ down.T, torch.eye(256) / 6, 1e-5)


# --- DeepNorm


@pytest.mark.parametrize("name", ["ffn.down", "ffn.up", "mixer.out", "mixer.v", "mixer.q", "mixer.k"])
def test_deepnorm_init_equals_xavier_normal(name, parity):
    """Bit by bit: PyTorch's draws the same numbers. (8 * 3)^(-1/4) with three layers, 1 for q and k."""
    beta = 1.0 if name in ("mixer.q", "mixer.k") else 24**-0.25
    ours, theirs = filled(DeepNormInit(3), 96, 64, f"blocks.2.{name}.weight"), torch.empty(96, 64)
    nn.init.xavier_normal_(theirs, beta, generator=torch.Generator().manual_seed(3))
    parity("DeepNormInit", "torch.nn.init.xavier_normal_", ours, theirs)


def test_deepnorm_init_tells_merged_matrices_apart(parity):
    ours, generator = filled(DeepNormInit(3), 128, 64, merged={"q": 64, "k": 32, "v": 32}), torch.Generator()
    generator.manual_seed(3)
    theirs = [torch.empty(rows, 64) for rows in (64, 32, 32)]
    for matrix, beta in zip(theirs, (1.0, 1.0, 24**-0.25), strict=True):
        nn.init.xavier_normal_(matrix, beta, generator=generator)
    parity("DeepNormInit", "torch.nn.init.xavier_normal_, merged", ours, torch.cat(theirs))


def test_a_deepnorm_model_has_normal_tables_and_zero_biases(parity):
    model = bare_gpt(DeepNormInit)
    parity("DeepNormInit", "standard deviation of the tables", model.embed.weight.std(), 0.02, 0.02)
    assert (model.blocks[0].mixer.qkv.bias == 0).all()


# --- maximal update parametrisation


@pytest.mark.parametrize("dim", [128, 256, 512])
def test_mup_has_the_published_standard_deviations_and_rates(dim, parity):
    m = dim / 256
    model = bare_gpt(MuP, dim=dim, tie_embeddings=False)

    def expected(name, parameter, residual):
        if name in ("embed.weight", "unembed.weight"):
            return 0.02 if name == "embed.weight" else 0.02 / m
        return 0.02 / m**0.5 / (6**0.5 if residual else 1.0)

    check_model("MuP", "published standard deviations", model, expected, parity)
    for name, parameter in model.named_parameters():
        plain = name == "embed.weight" or parameter.ndim == 1
        assert getattr(parameter, "lr_scale", 1.0) == (1.0 if plain else 1 / m), name
    names = {group["name"] for group in parameter_groups(model, 1e-3, 0.1)}
    assert names == {"decay", "no decay"} | ({f"decay, lr x {1 / m:g}"} if m != 1 else set())


def test_mup_at_the_base_width_is_gpt2_init():
    ours, theirs = (bare_gpt(init, tie_embeddings=False).state_dict() for init in (MuP, GPT2Init))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_mup_refuses_a_tied_table():
    with pytest.raises(ValueError, match="GPT.tie_embeddings = False"):
        bare_gpt(MuP)


def test_mup_names_its_rates_on_the_meta_device_too():
    with torch.device("meta"):
        model = bare_gpt(MuP, dim=512, tie_embeddings=False)
    assert model.blocks[0].ffn.up.weight.lr_scale == 0.5


def moved(init, dim, steps=5):
    """How far Adam at a large rate moves the last layer's output and the logits: root mean squares."""
    model = tiny_gpt(init=init, dim=dim, n_head=dim // 16, tie_embeddings=False)
    ids, hidden, logits = torch.randint(50, (4, 33), generator=torch.Generator().manual_seed(1)), [], []
    model.blocks[-1].register_forward_hook(lambda module, args, out: hidden.append(out.detach()))
    optimizer = torch.optim.Adam(parameter_groups(model, 1e-2, 0.0))
    for _ in range(steps + 1):
        out, head = model(ids[:, :-1])
        logits.append(head.logits(out).detach())
        optimizer.zero_grad()
        CrossEntropy()(out.flatten(0, 1), head, ids[:, 1:].flatten())[0].backward()
        optimizer.step()
    return [(x[-1] - x[0]).square().mean().sqrt().item() for x in (hidden, logits)]


def test_under_mup_steps_move_a_wide_model_as_far_as_a_narrow_one():
    """The coordinate check of the paper: with the width, changes grow under the standard parametrisation alone."""
    for init, grows in ((partial(MuP, base_dim=64), False), (GPT2Init, True)):
        narrow, middle, wide = (moved(init, dim) for dim in (64, 128, 256))
        for few, some, many in zip(narrow, middle, wide, strict=True):
            if grows:
                assert few * 1.3 < some and some * 1.3 < many
            else:
                assert max(some, many) < 1.3 * few
