"""What every part on the shelf has to keep, whichever it is: a newly registered part is tested here with no edit."""

import copy
import io
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, parts, tiny_gpt
from torch import nn

from components.attention import MathAttention
from components.loss import CrossEntropy
from components.position import RoPE
from toolkit.context import Context, Mask
from toolkit.model import Head
from toolkit.registry import CATALOG

LAYERS = ("attention", "position", "mixer", "norm", "ffn", "block")
LENGTHS = (1, 2, 13, 32)
VOCAB = 50


def gpt_with(part, **overrides):
    """The tiny GPT with one part swapped; the others are the plain ones, which support everything."""
    return tiny_gpt(**{part.kind: part.cls, **overrides})


def tokens(batch, length, seed=1):
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def objective(model, ids, loss=None):
    """The training loss of a batch with the auxiliary losses that the parts leave in the context."""
    context = Context()
    hidden, head = model(ids[:, :-1], context)
    total = (loss or CrossEntropy())(hidden.flatten(0, 1), head, ids[:, 1:].flatten())[0]
    return total + sum(context.losses.values())


def supports(part, what):
    return what in getattr(part.cls, "supports", ())


def decode(model, ids, chunks):
    """Hidden states of ``ids``, fed through the cache in pieces of these lengths."""
    cache, start, out = model.init_cache(len(ids)), 0, []
    for chunk in ids.split(chunks, dim=1):
        out.append(model(chunk, Context(cache=cache, start=torch.tensor(start)))[0])
        start += chunk.shape[1]
    return torch.cat(out, dim=1)


# --- shapes, dtypes, precision


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("part", parts(*LAYERS))
def test_a_model_with_the_part_maps_ids_to_finite_hidden_states_of_its_width(part, length):
    hidden, head = gpt_with(part)(tokens(3, length))
    assert hidden.shape == (3, length, TINY["dim"]) and hidden.dtype == torch.float32 and hidden.isfinite().all()
    assert head.logits(hidden).shape == (3, length, VOCAB)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("part", parts("attention"))
def test_attention_keeps_shape_and_dtype(part, length, dtype):
    q, k, v = torch.randn(3, 2, length, 4, 8).to(dtype)
    out = part.cls(4, 8)(q, k, v)
    assert out.shape == q.shape and out.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("part", parts("norm", "ffn"))
def test_norms_and_ffns_keep_shape_and_dtype(part, dtype):
    x = torch.randn(2, 13, 32, dtype=dtype)
    module = part.cls(32).to(dtype)
    out = module(x) if part.kind == "norm" else module(x, Context())
    assert out.shape == x.shape and out.dtype == dtype


@pytest.mark.parametrize("part", parts("norm", "ffn"))
def test_norms_and_ffns_see_each_position_alone(part):
    x, module = torch.randn(2, 13, 32), part.cls(32)
    whole, alone = (module(t) if part.kind == "norm" else module(t, Context()) for t in (x, x[:, 5:6]))
    torch.testing.assert_close(whole[:, 5:6], alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("part", parts("position"))
def test_positions_keep_shape_and_dtype(part, dtype):
    position, at = part.cls(32, 4, 8, 32), torch.arange(13)[None]
    if hasattr(position, "embed"):
        x = torch.randn(2, 13, 32, dtype=dtype)
        out = position.to(dtype).embed(x, at)
        assert out.shape == x.shape and out.dtype == dtype
    if hasattr(position, "rotate"):
        q, k = torch.randn(2, 13, 4, 8, dtype=dtype), torch.randn(2, 13, 2, 8, dtype=dtype)
        for before, after in zip((q, k), position.rotate(q, k, at), strict=True):
            assert after.shape == before.shape and after.dtype == dtype
    if hasattr(position, "score_bias"):
        assert position.score_bias(at[0], torch.arange(32)).shape == (4, 13, 32)


@pytest.mark.parametrize("part", parts(*LAYERS))
def test_autocast_to_bfloat16_stays_close_to_float32(part):
    model, ids = gpt_with(part, init=CATALOG["GPT2Init"].cls), tokens(2, 32)
    hidden, head = model(ids)
    with torch.autocast("cpu", torch.bfloat16):
        low, low_head = model(ids)
        low_logits = low_head.logits(low)
    error = (head.logits(hidden) - low_logits.float()).norm() / head.logits(hidden).norm()
    assert error < 0.02


# --- causality


@pytest.mark.parametrize("part", parts(*LAYERS))
def test_changing_a_token_moves_nothing_before_it(part):
    model, ids = gpt_with(part), tokens(2, 32)
    before = model(ids)[0]
    for t in (0, 1, 12, 30, 31):
        changed = ids.clone()
        changed[:, t] = (ids[:, t] + 1) % VOCAB
        after = model(changed)[0]
        assert torch.equal(before[:, :t], after[:, :t])
        assert not torch.allclose(before[:, t], after[:, t])


@pytest.mark.parametrize("part", parts(*LAYERS))
def test_no_gradient_flows_from_a_position_to_later_ones(part):
    model, embedded = gpt_with(part), []
    model.embed.register_forward_hook(lambda module, args, out: embedded.append(out))
    hidden = model(tokens(2, 13))[0]
    reach = 13  # positions; a mixer with a knob called width looks that far in each layer
    if part.kind == "mixer" and "width" in part.knobs:
        reach = TINY["n_layer"] * (part.knobs["width"].default - 1)
    for t in (0, 6, 11):
        (gradient,) = torch.autograd.grad((hidden[:, t] * torch.randn(32)).sum(), embedded[0], retain_graph=True)
        assert (gradient[:, t + 1 :] == 0).all()
        assert (gradient[:, max(0, t - reach) : t + 1].abs().sum((0, 2)) > 0).all()


# --- learning


@pytest.mark.parametrize("part", parts(*LAYERS, "init"))
def test_every_parameter_gets_a_finite_gradient_that_is_not_zero_within_a_few_steps(part):
    model = gpt_with(part)
    optimizer, moved = torch.optim.SGD(model.parameters(), lr=1e-3), set()
    for step in range(4):  # several: a projection that starts at zero hides what lies before it for one step
        optimizer.zero_grad()
        objective(model, tokens(4, 33, seed=step)).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
            if parameter.grad.any():
                moved.add(name)
        optimizer.step()
    assert moved == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("part", parts(*LAYERS))
def test_parameters_have_a_dimension(part):
    """FSDP2 refuses scalars."""
    assert all(parameter.ndim >= 1 for parameter in gpt_with(part).parameters())


# --- seeds and initial values


def assert_same(first, second):
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


@pytest.mark.parametrize("part", parts(*LAYERS, "init"))
def test_the_seed_alone_fixes_every_initial_value(part):
    first = gpt_with(part).state_dict()
    torch.rand(1000)  # what was drawn before does not count
    assert_same(first, gpt_with(part).state_dict())
    torch.manual_seed(1)
    assert not torch.equal(first["embed.weight"], gpt_with(part).state_dict()["embed.weight"])


@pytest.mark.parametrize("part", parts(*LAYERS, "init"))
def test_building_leaves_the_global_generator_as_found(part):
    torch.rand(3)
    before, seed = torch.get_rng_state(), torch.initial_seed()
    gpt_with(part, dropout=0.1)
    assert torch.equal(torch.get_rng_state(), before) and torch.initial_seed() == seed


@pytest.mark.parametrize("part", parts(*LAYERS))
def test_swapping_a_part_leaves_what_the_arms_share_bit_equal(part):
    ours, theirs = tiny_gpt().state_dict(), gpt_with(part).state_dict()
    shared = [name for name in ours if name in theirs and ours[name].shape == theirs[name].shape]
    assert "embed.weight" in shared and len(shared) > 8
    assert_same({name: ours[name] for name in shared}, {name: theirs[name] for name in shared})


@pytest.mark.parametrize("part", parts("init"))
def test_an_init_draws_from_the_generator_it_is_given_and_fills_biases(part):
    def filled():
        weight, bias = nn.Parameter(torch.full((32, 48), 9.0)), nn.Parameter(torch.full((32,), 9.0))
        weight.residual = bias.residual = False
        with torch.no_grad():
            for name, parameter in (("a.weight", weight), ("a.bias", bias)):
                part.cls(2)(name, parameter, torch.Generator().manual_seed(3))
        return {"weight": weight, "bias": bias}

    before, first = torch.get_rng_state(), filled()
    assert torch.equal(torch.get_rng_state(), before)
    assert all((value != 9.0).all() and value.isfinite().all() for value in first.values())
    assert_same(first, filled())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("vocab_size, dim", [(50, 32), (33, 12), (51, 6)])
@pytest.mark.parametrize("part", parts("init"))
def test_padding_the_vocabulary_leaves_the_first_rows_as_they_were(part, vocab_size, dim, tied):
    shape = dict(dim=dim, n_head=3 if dim % 3 == 0 else 4, position=CATALOG["NoPE"].cls, tie_embeddings=tied)
    bare = tiny_gpt(vocab_size, init=part.cls, pad_vocab_to=1, **shape)
    padded = tiny_gpt(vocab_size, init=part.cls, pad_vocab_to=64, **shape)
    ours, theirs = bare.state_dict(), padded.state_dict()
    tables = {name for name in ours if len(ours[name]) != len(theirs[name])}
    assert tables == ({"embed.weight"} if tied else {"embed.weight", "unembed.weight"})
    assert all((theirs[name][vocab_size:] == 0).all() for name in tables)
    assert_same(ours, {name: theirs[name][:vocab_size] if name in tables else theirs[name] for name in theirs})
    assert padded.padding == sum(p.numel() for p in padded.parameters()) - sum(p.numel() for p in bare.parameters())


# --- compile, save, copy


class Step(nn.Module):
    """Model and loss in one module: what the toolkit compiles."""

    def __init__(self, model, loss):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, ids):
        return objective(self.model, ids, self.loss)


SWAPS = [p for p in parts(*LAYERS, "loss") if p.values[0].cls not in {*TINY.values(), CrossEntropy}]


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own, on any Function
@pytest.mark.parametrize("part", SWAPS)  # each takes seconds; the plain parts are in every one of them
def test_the_part_compiles_into_one_graph_that_equals_eager(part):
    torch.compiler.reset()
    model = tiny_gpt(n_layer=1) if part.kind == "loss" else gpt_with(part, n_layer=1)
    step, ids = Step(model, part.cls() if part.kind == "loss" else CrossEntropy()), tokens(2, 14)
    results = []
    for compiled in (False, True):
        if compiled:
            step.compile(backend="aot_eager", fullgraph=True)
        step.zero_grad()
        value = step(ids)
        value.backward()
        results.append({"loss": value.detach(), **{name: p.grad.clone() for name, p in model.named_parameters()}})
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("part", parts(*LAYERS))
def test_a_state_dict_restores_the_model(part):
    file, ids = io.BytesIO(), tokens(2, 13)
    model = gpt_with(part)
    torch.save(model.state_dict(), file)
    torch.manual_seed(1)
    other = gpt_with(part)
    assert not torch.equal(model(ids)[0], other(ids)[0])
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(model(ids)[0], other(ids)[0])


def test_a_copy_of_a_model_drops_out_by_its_own_mode():
    model, ids = tiny_gpt(dropout=0.5), tokens(2, 13)
    quiet = copy.deepcopy(model).eval()
    assert torch.equal(quiet(ids)[0], model.eval()(ids)[0])
    model.train()
    assert torch.equal(quiet(ids)[0], quiet(ids)[0]) and not torch.equal(model(ids)[0], model(ids)[0])


# --- decoding with a cache

MIXERS, POSITIONS, KERNELS = ([p.values[0] for p in parts(kind)] for kind in ("mixer", "position", "attention"))
CACHED = [
    pytest.param(mixer, position, kernel, id=f"{mixer.name}-{position.name}-{kernel.name}")
    for mixer, position, kernel in itertools.product(MIXERS, POSITIONS, KERNELS)
    if supports(kernel, "offset") and (supports(kernel, "bias") or not hasattr(position.cls, "score_bias"))
]


@pytest.mark.parametrize("chunks", [1, [5, 1, 7, 2, 17]], ids=["tokens", "chunks"])
@pytest.mark.parametrize("mixer, position, attention", CACHED)
def test_decoding_with_a_cache_equals_the_full_forward(mixer, position, attention, chunks):
    ids = tokens(2, 32)
    for n_kv_head in (4, 2, 1) if supports(attention, "gqa") else (4,):
        slots = dict(mixer=mixer.cls, position=position.cls, attention=attention.cls)
        try:
            model = tiny_gpt(**slots, n_kv_head=n_kv_head).eval()
        except ValueError as refusal:  # a mixer may refuse grouped heads, with the remedy
            assert n_kv_head < 4 and "GPT.n_kv_head" in str(refusal)
            continue
        if model.init_cache(2) is None:
            pytest.skip(f"{mixer.name} keeps no cache")
        torch.testing.assert_close(decode(model, ids, chunks), model(ids)[0], rtol=1e-4, atol=1e-4)


class Squared(nn.Module):
    """A score bias that is not linear: unlike ALiBi's, a shift of all distances shows."""

    def __init__(self, dim, n_head, head_dim, max_len):
        super().__init__()

    def score_bias(self, q_positions, k_positions):
        return -((q_positions[:, None] - k_positions - 3.0) ** 2).expand(4, -1, -1) / 8


def test_decoding_with_a_cache_keeps_a_score_bias_in_place():
    model, ids = tiny_gpt(position=Squared), tokens(2, 32)
    torch.testing.assert_close(decode(model, ids, [5, 1, 7, 2, 17]), model(ids)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("part", parts("mixer"))
def test_a_cache_is_a_set_of_tensors_whose_size_does_not_grow(part):
    model, ids = gpt_with(part), tokens(2, 8)
    cache = model.init_cache(2)
    if cache is None:
        pytest.skip(f"{part.name} keeps no cache")
    before = [[t.shape for t in layer] for layer in cache]
    model(ids, Context(cache=cache, start=torch.tensor(3)))
    assert [[t.shape for t in layer] for layer in cache] == before


def test_the_model_refuses_to_go_past_its_context():
    model = tiny_gpt(max_len=8)
    with pytest.raises(ValueError, match="context of 8"):
        model(tokens(1, 9))
    with pytest.raises(ValueError, match="context of 8"):
        model(tokens(1, 2), Context(cache=model.init_cache(1), start=torch.tensor(7)))


# --- what a kernel supports


def kernel_inputs(part, length=13, n_kv_head=4):
    torch.manual_seed(5)
    q = torch.randn(2, length, 4, 8)
    k, v = torch.randn(2, 2, length, n_kv_head, 8)
    return part.cls(4, 8), q, k, v


def honouring(what):
    return [p for p in parts("attention") if supports(p.values[0], what)]


@pytest.mark.parametrize("part", honouring("bias"))
def test_a_bias_that_leaves_only_the_diagonal_returns_the_values(part):
    kernel, q, k, v = kernel_inputs(part)
    bias = torch.full((4, 13, 13), -1e4)
    bias.diagonal(dim1=1, dim2=2).zero_()
    bias[3] = 0  # one head is left alone: the bias is per head
    out = kernel(q, k, v, Mask(torch.tensor(0), 13, 13, None, bias))
    torch.testing.assert_close(out[:, :, :3], v[:, :, :3])
    torch.testing.assert_close(out[:, :, 3], kernel(q, k, v)[:, :, 3])


@pytest.mark.parametrize("part", honouring("documents"))
def test_each_document_is_attended_to_as_if_it_stood_alone(part):
    kernel, q, k, v = kernel_inputs(part)
    documents = torch.tensor([[0] * 5 + [1] * 8, [0] * 1 + [1] * 2 + [2] * 10])
    out = kernel(q, k, v, Mask(torch.tensor(0), 13, 13, documents, None))
    for row, ids in enumerate(documents):
        for document in ids.unique():
            alone = (t[row : row + 1, ids == document] for t in (q, k, v))
            torch.testing.assert_close(out[row : row + 1, ids == document], kernel(*alone))


@pytest.mark.parametrize("part", honouring("offset"))
def test_queries_at_an_offset_attend_as_they_do_in_the_full_sequence(part):
    kernel, q, k, v = kernel_inputs(part)
    whole = kernel(q, k, v)
    for start, end in ((0, 1), (0, 4), (4, 5), (4, 13), (12, 13)):
        out = kernel(q[:, start:end], k, v, Mask(torch.tensor(start), end - start, 13, None, None))
        torch.testing.assert_close(out, whole[:, start:end])


@pytest.mark.parametrize("n_kv_head", [1, 2])
@pytest.mark.parametrize("part", honouring("gqa"))
def test_grouped_heads_equal_repeated_heads(part, n_kv_head):
    kernel, q, k, v = kernel_inputs(part, n_kv_head=n_kv_head)
    repeated = (t.repeat_interleave(4 // n_kv_head, dim=2) for t in (k, v))
    torch.testing.assert_close(kernel(q, k, v), kernel(q, *repeated))


@pytest.mark.parametrize("part", parts("mixer", "position", "ffn", "block", "norm") + honouring("documents"))
def test_no_token_reaches_another_document(part):
    model, ids = gpt_with(part), tokens(2, 32)
    if "documents" not in getattr(model.mixers[0], "supports", ()):
        pytest.skip(f"{part.name} does not declare documents")
    documents = torch.tensor([[0] * 9 + [1] * 11 + [2] * 12, [0] * 16 + [1] * 16])
    before = model(ids, Context(documents=documents))[0]
    changed = torch.where(documents == 1, (ids + 1) % VOCAB, ids)
    after = model(changed, Context(documents=documents))[0]
    other = documents != 1
    assert torch.equal(before[other], after[other]) and not torch.allclose(before[~other], after[~other])
    assert not torch.allclose(before[other], model(ids)[0][other])  # the mask does something


@pytest.mark.parametrize("part", parts("mixer", "position", "ffn", "block", "norm") + honouring("documents"))
def test_a_packed_document_equals_the_document_alone(part):
    """With positions that restart in each document, as the toolkit sets them."""
    model, ids, lengths = gpt_with(part), tokens(1, 32), (9, 1, 22)
    if "documents" not in getattr(model.mixers[0], "supports", ()):
        pytest.skip(f"{part.name} does not declare documents")
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    documents = torch.arange(3).repeat_interleave(torch.tensor(lengths))[None]
    packed = model(ids, Context(positions, documents))[0].split(lengths, dim=1)
    for document, hidden in zip(ids.split(lengths, dim=1), packed, strict=True):
        torch.testing.assert_close(hidden, model(document)[0], rtol=1e-4, atol=1e-4)


class Bare(MathAttention):
    """A kernel that declares nothing."""

    supports = set()


BIASED = [p for p in parts("position") if hasattr(p.values[0].cls, "score_bias")]
NOT_BIAS, NOT_GQA = ([p for p in parts("attention") if not supports(p.values[0], w)] for w in ("bias", "gqa"))


@pytest.mark.parametrize("attention", [Bare, *(p.values[0].cls for p in NOT_BIAS)])
@pytest.mark.parametrize("part", BIASED)
def test_a_score_bias_is_refused_at_construction_by_a_kernel_that_can_not_add_it(part, attention):
    with pytest.raises(ValueError, match=rf"{part.name}.*{attention.__name__}.*use GPT.attention = @"):
        gpt_with(part, attention=attention)
    with pytest.raises(ValueError, match=part.name):  # in one layer of two as well
        tiny_gpt(position=[RoPE, part.cls], attention=[MathAttention, attention])


@pytest.mark.parametrize("attention", [Bare, *(p.values[0].cls for p in NOT_GQA)])
def test_grouped_heads_are_refused_at_construction_by_a_kernel_without_them(attention):
    with pytest.raises(ValueError, match=rf"{attention.__name__}.*GPT.n_kv_head = 4"):
        tiny_gpt(attention=attention, n_kv_head=2)


def test_a_kernel_without_offsets_gets_no_cache():
    """Generation then recomputes, rather than attend to the wrong keys."""
    assert tiny_gpt(attention=[MathAttention, Bare]).init_cache(1) is None


# --- losses


def loss_inputs(rows=24):
    torch.manual_seed(5)
    hidden, weight = torch.randn(rows, 16), torch.randn(64, 16)
    targets = torch.randint(VOCAB, (rows,))
    targets[[0, 3, 4, 5, 6, 20]] = -100
    return hidden.requires_grad_(), weight.requires_grad_(), targets


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("part", parts("loss"))
def test_every_loss_reports_the_plain_cross_entropy_and_the_count(part, softcap):
    hidden, weight, targets = loss_inputs()
    _, nats, count = part.cls()(hidden, Head(weight, VOCAB, softcap), targets)
    logits = (hidden @ weight.T)[:, :VOCAB]
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    torch.testing.assert_close(nats, F.cross_entropy(logits, targets, reduction="sum").detach())
    assert not nats.requires_grad and int(count) == 18


@pytest.mark.parametrize("sizes", [[8, 8, 8], [1, 2, 21], [7, 17]])
@pytest.mark.parametrize("part", parts("loss"))
def test_a_loss_is_a_sum_that_micro_batches_add_up_to(part, sizes):
    """Ignored targets are spread unevenly: 6 of 24, with a micro-batch of none that count among them."""
    hidden, weight, targets = loss_inputs()
    loss, head = part.cls(), Head(weight, VOCAB, None)
    whole = loss(hidden, head, targets)
    pieces = [loss(h, head, t) for h, t in zip(hidden.split(sizes), targets.split(sizes), strict=True)]
    summed = [sum(column) for column in zip(*pieces, strict=True)]
    torch.testing.assert_close(summed, list(whole))
    for one, other in zip(*(torch.autograd.grad(x[0], (hidden, weight)) for x in (whole, summed)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("part", parts("loss"))
def test_ignored_targets_change_nothing_and_get_no_gradient(part):
    hidden, weight, targets = loss_inputs()
    ignored, loss, head = targets == -100, part.cls(), Head(weight, VOCAB, None)
    gradient = torch.autograd.grad(loss(hidden, head, targets)[0], hidden)[0]
    assert (gradient[ignored] == 0).all() and (gradient[~ignored].abs().sum(1) > 0).all()
    kept = loss(hidden[~ignored], head, targets[~ignored])[0]
    torch.testing.assert_close(loss(hidden, head, targets)[0], kept)
    nothing = loss(hidden, head, torch.full_like(targets, -100))
    assert not any(nothing)
    assert not any(g.any() for g in torch.autograd.grad(nothing[0], (hidden, weight)))


@pytest.mark.parametrize("part", parts("loss"))
def test_rows_that_pad_the_vocabulary_take_no_part(part):
    hidden, weight, targets = loss_inputs()
    loss = part.cls()
    before = loss(hidden, Head(weight, VOCAB, None), targets)[0]
    assert (torch.autograd.grad(before, weight, retain_graph=True)[0][VOCAB:] == 0).all()
    raised = torch.cat((weight[:VOCAB], weight[VOCAB:] + 100))
    assert torch.equal(before, loss(hidden, Head(raised, VOCAB, None), targets)[0])


# --- optimizers


def regression():
    torch.manual_seed(2)
    model, x = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1)), torch.randn(64, 8)
    return model, x, x[:, :1] * x[:, 1:2] + x[:, 2:3]


def fit(model, optimizer, x, y, steps):
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("part", parts("optimizer"))
def test_an_optimizer_lowers_the_loss_of_a_regression(part):
    model, x, y = regression()
    losses = fit(model, part.cls(model), x, y, 100)
    assert losses[-1] < 0.95 * losses[0] and all(math.isfinite(loss) for loss in losses)


@pytest.mark.parametrize("part", parts("optimizer"))
def test_optimizer_groups_hold_every_trainable_parameter_once_with_a_peak_rate_and_a_name(part):
    model = tiny_gpt()
    model.embed.weight.requires_grad_(False)
    model.norm.weight.lr_scale = 0.5
    optimizer = part.cls(model)
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert isinstance(optimizer, torch.optim.Optimizer)
    peaks = {id(p): group["peak_lr"] for group in optimizer.param_groups for p in group["params"]}
    assert all(group["lr"] == group["peak_lr"] and group["name"] for group in optimizer.param_groups)
    assert peaks[id(model.norm.weight)] == pytest.approx(0.5 * peaks[id(model.norm.bias)])


@pytest.mark.parametrize("part", parts("optimizer"))
def test_an_optimizer_at_rate_zero_moves_nothing(part):
    """The schedule owns the rate: what an optimizer does beside it would escape the comparison."""
    model, x, y = regression()
    optimizer, before = part.cls(model), copy.deepcopy(model.state_dict())
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    fit(model, optimizer, x, y, 3)
    assert_same(before, model.state_dict())


@pytest.mark.parametrize("part", parts("optimizer"))
def test_a_restored_optimizer_goes_on_as_if_nothing_had_happened(part):
    model, x, y = regression()
    optimizer = part.cls(model)
    fit(model, optimizer, x, y, 3)
    other = copy.deepcopy(model)
    restored = part.cls(other)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert fit(model, optimizer, x, y, 5) == fit(other, restored, x, y, 5)
    assert_same(model.state_dict(), other.state_dict())


# --- schedules


def schedules(part, steps):
    """The part for every valid kind of warm-up, with each of its fractions at both ends and in between."""
    fractions = [knob for knob in part.knobs if knob.endswith("_fraction")]
    warmups = sorted({0, 1, steps // 10, steps // 2, steps - 1} & set(range(steps)))
    for warmup in warmups if "warmup_steps" in part.knobs else [None]:
        knobs = {} if warmup is None else {"warmup_steps": warmup}
        yield warmup or 0, part.cls(steps, **knobs)
        for knob, value in itertools.product(fractions, (0.0, 0.37, 1.0)):
            yield warmup or 0, part.cls(steps, **knobs, **{knob: value})


@pytest.mark.parametrize("part", parts("schedule"))
def test_a_schedule_is_a_fraction_of_the_peak_at_every_step(part):
    for steps in (*range(1, 40), *range(40, 1001, 61), 1000):
        for warmup, schedule in schedules(part, steps):
            at = {0, warmup - 1, warmup, warmup + 1, steps // 2, steps - 2, steps - 1} & set(range(steps))
            assert all(0 <= schedule(step) <= 1 and math.isfinite(schedule(step)) for step in at)
            assert warmup == 0 or schedule(warmup - 1) == 1


@pytest.mark.parametrize("part", parts("schedule"))
def test_a_schedule_remembers_nothing(part):
    for _, schedule in schedules(part, 100):
        forward = [schedule(step) for step in range(100)]
        assert all(0 <= value <= 1 for value in forward)
        assert [schedule(step) for step in reversed(range(100))] == forward[::-1]


@pytest.mark.parametrize("part", [p for p in parts("schedule") if "warmup_steps" in p.values[0].knobs])
def test_a_warm_up_that_leaves_no_step_at_the_peak_is_refused(part):
    with pytest.raises(ValueError, match=rf"{part.name}.warmup_steps"):
        part.cls(100, warmup_steps=100)


@pytest.mark.parametrize("steps, warmup", [(2, 0), (3, 1), (10, 3), (500, 0), (1000, 1), (1000, 998), (777, 100)])
def test_warmup_cosine_hits_the_peak_and_its_end_exactly(steps, warmup):
    for final in (0.0, 0.1, 0.3, 1.0):
        schedule = CATALOG["WarmupCosine"].cls(steps, warmup_steps=warmup, final_fraction=final)
        assert schedule(max(0, warmup - 1)) == 1.0 and schedule(warmup) == 1.0 and schedule(steps - 1) == final
