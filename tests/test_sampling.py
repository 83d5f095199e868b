"""The fast paths of generation against the plain ones: a cache read to its end, few rows in the head, sorted draws."""

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_gpt

from components.attention import SDPA, FlashAttention, MathAttention
from components.position import ALiBi, RoPE
from toolkit.context import Context
from toolkit.loop import sampling
from toolkit.model import Head


@pytest.mark.parametrize("attention", [MathAttention, SDPA, FlashAttention])
@pytest.mark.parametrize("position", [RoPE, ALiBi])
def test_a_cache_read_up_to_its_end_is_the_whole_cache_behind_a_mask(attention, position):
    if attention is FlashAttention and position is ALiBi:
        pytest.skip("FlashAttention takes no score bias")
    model = tiny_gpt(attention=attention, position=position, n_kv_head=2).eval()
    ids = torch.randint(50, (3, 12))
    caches, start = (model.init_cache(3), model.init_cache(3)), 0
    for length in (1, 4, 1, 1, 3, 2):
        piece, here = ids[:, start : start + length], torch.tensor(start)
        whole, _ = model(piece, Context(cache=caches[0], start=here))
        short, _ = model(piece, Context(cache=caches[1], start=here, end=start + length))
        torch.testing.assert_close(short, whole, rtol=1e-5, atol=1e-5)
        start += length
    with pytest.raises(ValueError, match="33 tokens do not fit"):
        model(ids[:, :1], Context(cache=caches[1], start=torch.tensor(32), end=33))


def test_the_heads_logits_of_few_rows_are_those_of_many():
    head, hidden = Head(torch.randn(2176, 32), 2100, 5.0), torch.randn(2, 8, 32)
    expected = 5 * torch.tanh(F.linear(hidden, head.weight)[..., :2100] / 5)
    torch.testing.assert_close(head.logits(hidden), expected)  # 16 rows
    torch.testing.assert_close(head.logits(hidden[:1]), expected[:1])  # 8
    torch.testing.assert_close(head.logits(hidden[:, -1]), expected[:, -1])  # 2
    torch.testing.assert_close(head.logits(hidden[0, 0]), expected[0, 0])  # 1


def test_angles_of_other_positions_or_widths_are_not_taken_for_the_last_ones():
    part, q = RoPE(64, 4, 16, 32), torch.randn(1, 3, 4, 16)
    for positions, x in ((torch.tensor([[0, 1, 2]]), q), (torch.tensor([[5, 6, 7]]), q), (None, q[..., :8])):
        positions = part.angles.last_call[0] if positions is None else positions  # the same tensor, narrower heads
        for turned, fresh in zip(
            part.rotate(x, x, positions), RoPE(64, 4, 16, 32).rotate(x, x, positions), strict=True
        ):
            assert torch.equal(turned, fresh)


@pytest.mark.parametrize("p", [0.3, 0.9, 0.999])
@pytest.mark.parametrize("sharpness", [0.1, 3.0])  # nearly flat: thousands of tokens; peaked: a handful
def test_the_nucleus_is_that_of_the_whole_vocabulary_sorted(sharpness, p):
    probabilities = (sharpness * torch.randn(3, 6000)).softmax(-1)
    ordered, index = probabilities.sort(descending=True)
    surplus = ordered.cumsum(-1) - ordered >= p
    expected = probabilities.masked_fill(surplus.gather(-1, index.argsort(-1)), 0.0)
    kept, order = sampling._nucleus(probabilities, p)
    assert torch.equal(torch.zeros_like(probabilities).scatter(-1, order, kept), expected)


def test_tokens_are_drawn_as_often_as_they_are_probable(monkeypatch):
    probabilities = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0])
    logits, draws = probabilities.log().expand(20_000, -1), 20_000
    generator = torch.Generator().manual_seed(0)
    drawn = sampling._choose(logits, 1.0, None, None, generator).bincount(minlength=6) / draws
    assert drawn[[0, 2, 5]].sum() == 0 and (drawn - probabilities).abs().max() < 0.02  # 5 standard deviations
    top = sampling._choose(logits, 1.0, 2, None, generator).bincount(minlength=6) / draws
    assert (top - torch.tensor([0, 0.625, 0, 0.375, 0, 0])).abs().max() < 0.02
    for extreme, token in ((0.0, 4), (1 - 2**-24, 1)):  # neither end of the random numbers draws the impossible
        monkeypatch.setattr(torch, "rand", lambda *shape, extreme=extreme, **rest: torch.full(shape, extreme))
        assert sampling._choose(logits[:2], 1.0, None, None, None).tolist() == [token, token]


def test_a_model_that_was_sampled_from_goes_on_training():
    model = tiny_gpt()
    for chosen in sampling.stream(model, [1, 2, 3], 4, num=2):
        assert not (torch.is_inference_mode_enabled() or chosen.is_inference()) and torch.is_grad_enabled()
    hidden, head = model(torch.randint(50, (2, 4)))
    head.logits(hidden).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.slow  # compiles
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method. is deprecated:DeprecationWarning")  # PyTorch's own
def test_a_compiled_step_writes_the_same_tokens():
    model, options = tiny_gpt(attention=SDPA).eval(), {"num": 2, "seed": 3}
    plain = torch.stack(list(sampling.stream(model, [1, 2, 3], 40, **options)))  # 40: the window slides on the way
    fast = torch.stack(list(sampling.stream(model, [1, 2, 3], 40, compiled=True, **options)))
    assert torch.equal(plain, fast)


def test_a_compiled_step_needs_a_cache():
    with pytest.raises(ValueError, match="a compiled step needs a cache"):
        next(sampling.stream(tiny_gpt(), [1], 1, cache=False, compiled=True))


# --- draws


def logits_of(kind: str, vocabulary: int, dtype: torch.dtype) -> torch.Tensor:
    """(4, vocabulary) of extreme kinds, as float32, which is what a head gives."""
    drawn = torch.randn(4, vocabulary)
    if kind == "huge":
        drawn *= 1e38
    elif kind == "equal":
        drawn.fill_(3.0)
    elif kind == "mostly impossible":
        drawn[:, : vocabulary - 1] = -torch.inf
    elif kind == "far apart":
        drawn[:, vocabulary // 2] += 1e4
    return drawn.clamp(max=3e38).to(dtype).float()


@pytest.mark.parametrize("vocabulary", [1, 2, 255, 256, 257, 258, 300, 4095, 4096, 4097, 5000])
@pytest.mark.parametrize("kind", ["usual", "huge", "equal", "mostly impossible", "far apart"])
def test_no_draw_is_past_the_vocabulary_or_of_an_impossible_token(kind, vocabulary):
    generator = torch.Generator().manual_seed(vocabulary)
    for dtype in (torch.float32, torch.bfloat16):
        logits = logits_of(kind, vocabulary, dtype)
        logits = torch.where(logits.isinf() & (logits > 0), 3e38, logits)  # bfloat16 rounds the largest up
        for temperature in (0, 1e-300, 1e-40, 1e-30, 1e-20, 1e-3, 0.8, 1.0, 50.0, 1e30, 1e300):
            for top_k in (None, 1, 7, 10**6):
                for top_p in (None, 1e-9, 0.9, 1.0):
                    drawn = sampling._choose(logits, temperature, top_k, top_p, generator)
                    assert ((0 <= drawn) & (drawn < vocabulary)).all(), (temperature, top_k, top_p)
                    chosen = logits.gather(-1, drawn[:, None])
                    assert (chosen > -torch.inf).all(), (temperature, top_k, top_p)


@pytest.mark.parametrize("top_p", [None, 0.9])
@pytest.mark.parametrize("temperature", [1e-300, 1e-40, 1e-12])
def test_a_tiny_temperature_is_as_temperature_0(temperature, top_p):
    logits = torch.randn(8, 257)
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(sampling._choose(logits, temperature, None, top_p, generator), logits.argmax(-1))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("temperature", [0, 0.8])
def test_logits_that_are_not_finite_are_told(value, temperature):
    logits = torch.randn(2, 257)
    logits[1, 3] = value
    for broken in (logits, torch.full((2, 257), -torch.inf)):
        with pytest.raises(ValueError, match="the model's logits are not finite: .* use an earlier checkpoint"):
            sampling._choose(broken, temperature, None, None, torch.Generator().manual_seed(0))
