"""Sequences that begin alike: their groups save the most tokens, and a reader reads a common beginning once."""

import itertools
import random
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from conftest import tiny_gpt

from components.mixer import GatedLinearRecurrence, SelfAttention, ShortConvolution
from components.tokenizer import Bytes
from toolkit.evaluation import batches, prefixes
from toolkit.evaluation.reader import Reader

LONG = 64
CONTEXT = "Once upon a time, a hen ran home "
CHOICES = ["and slept.", "and sang.", "again", "to the old fox", "!"]


def savings(sequences: list[tuple[int, ...]], ends: tuple[int, ...]) -> int:
    """Tokens that are not read if consecutive sequences up to each end are read together, by definition."""
    total, start = 0, 0
    for end in ends:
        group = sequences[start:end]
        shared = next(n for n in itertools.count() if len({each[: n + 1] for each in group}) > 1 or n == len(group[0]))
        total += max(0, shared - 1) * (len(group) - 1)
        start = end
    return total


def test_groups_save_the_most_tokens(monkeypatch):
    monkeypatch.setattr(prefixes, "WORTH", 0.0)
    draw = random.Random(0)
    for _ in range(60):
        count = draw.randint(2, 7)
        sequences = sorted({tuple(draw.choices((1, 2), k=draw.randint(1, 6))) for _ in range(count)})
        n = len(sequences)
        cuts = (ends for k in range(n) for ends in itertools.combinations(range(1, n), k))
        best = max(savings(sequences, (*ends, n)) for ends in cuts)
        groups, alone = prefixes.groups(draw.sample(sequences, n))
        assert sum(group.shared * (len(group.sequences) - 1) for group in groups) == best
        assert sorted(alone + [each for group in groups for each in group.sequences]) == sequences
        for group in groups:
            assert len({each[: group.shared + 1] for each in group.sequences}) == 1
            assert all(len(each) > group.shared >= 1 for each in group.sequences)


def test_sequences_that_share_little_are_read_alone():
    long, short = tuple(range(100)), tuple(range(10))
    assert prefixes.groups([(*long, 1), (*long, 2), (7, *short), (7, *short[::-1])]) == (
        [prefixes.Group([(*long, 1), (*long, 2)], 99)],
        [(7, *short), (7, *short[::-1])],
    )
    assert prefixes.groups([]) == ([], []) and prefixes.groups([(1,)]) == ([], [(1,)])


@pytest.mark.parametrize("way", ["padded", "trimmed"])
@pytest.mark.parametrize(
    "batch_tokens, largest, allowed", [(10**6, 10**6, 10**6), (40, 10**6, 30), (1, 9, 9), (99, 3, 5)]
)
def test_batches_are_as_large_as_allowed(way, batch_tokens, largest, allowed, monkeypatch):
    monkeypatch.setattr(batches, "PASS", allowed)
    draw = random.Random(1)
    lengths = sorted((draw.randint(1, 20) for _ in range(30)), reverse=True)
    weights = [draw.randint(1, 3) for _ in lengths]

    def fits(start, end):
        own = lengths[start:end]
        wasted = sum(own[0] - length for length in own)
        if way == "trimmed":
            wasted = sum((n - own[-1]) * weight for n, weight in zip(own, weights[start:end], strict=True))
        return len(own) == 1 or (own[0] * len(own) <= batch_tokens and len(own) <= largest and wasted <= allowed)

    extra = [weights] if way == "trimmed" else []
    slices = list(getattr(batches, way)(lengths, *extra, batch_tokens, largest))
    assert [place for each in slices for place in range(30)[each]] == list(range(30))
    for each in slices:
        assert fits(each.start, each.stop) and (each.stop == 30 or not fits(each.start, each.stop + 1))


@contextmanager
def tokens_read(model):
    """A list that gets the number of tokens of each forward pass."""
    counts = []
    hook = model.register_forward_pre_hook(lambda module, arguments: counts.append(arguments[0].numel()))
    yield counts
    hook.remove()


def slow(model, tokenizer):
    """A reader that reads each sequence alone."""
    reader = Reader(model, tokenizer, LONG, 1)
    reader._can_share = False
    return reader


MIXERS = [SelfAttention, GatedLinearRecurrence, [SelfAttention, ShortConvolution]]


@pytest.mark.parametrize("batch_tokens", [16, 4096])
@pytest.mark.parametrize("mixer", MIXERS, ids=["attention", "recurrence", "hybrid"])
def test_a_common_beginning_is_read_once(mixer, batch_tokens, monkeypatch):
    monkeypatch.setattr(batches, "PASS", 0)  # no token is wasted to save a pass
    model, tokenizer = tiny_gpt(257, LONG, mixer=mixer).eval(), Bytes()
    reader, alone = Reader(model, tokenizer, LONG, batch_tokens), slow(model, tokenizer)
    pairs = [(context, choice) for context in (CONTEXT, CONTEXT[5:]) for choice in CHOICES]
    with tokens_read(model) as together:
        ours = reader.continuations(pairs)
    with tokens_read(model) as separately:
        theirs = alone.continuations(pairs)
    assert np.allclose([each.nats for each in ours], [each.nats for each in theirs], rtol=1e-6)
    assert [each[1:] for each in ours] == [each[1:] for each in theirs]
    assert sum(together) < 0.4 * sum(separately) and max(together) <= max(batch_tokens, len(CONTEXT))
    texts = [CONTEXT + choice for choice in CHOICES]  # here the common beginning is scored, too
    for mine, other in zip(reader.nats(texts), alone.nats(texts), strict=True):
        assert np.allclose(mine.nats, other.nats, rtol=1e-5, atol=1e-6) and len(mine.nats) == len(other.nats)


def test_choices_of_one_token_are_read_once():
    model, tokenizer = tiny_gpt(257, LONG).eval(), Bytes()
    with tokens_read(model) as counts:
        ours = Reader(model, tokenizer, LONG, 512).continuations([("The answer is", letter) for letter in "ABCD"])
    assert counts == [len("The answer is")]
    hidden, head = model(torch.tensor([tokenizer.encode("The answer is")]))
    nats = -head.logits(hidden[0, -1]).log_softmax(-1)
    assert np.allclose([each.nats for each in ours], [nats[ord(letter)].item() for letter in "ABCD"], rtol=1e-5)


def test_a_model_of_ones_own_needs_no_length_and_other_caches_are_not_shared():
    pairs = [(CONTEXT, choice) for choice in CHOICES]
    model, tokenizer = tiny_gpt(257, LONG).eval(), Bytes()
    expected = [each.nats for each in slow(model, tokenizer).continuations(pairs)]
    init_cache = model.init_cache
    for own, shares in ((lambda batch: init_cache(batch), True), (lambda batch: flipped(init_cache(batch)), False)):
        model.init_cache = own
        reader = Reader(model, tokenizer, LONG, 512)
        assert np.allclose([each.nats for each in reader.continuations(pairs)], expected, rtol=1e-6)
        assert reader._can_share is shares


def flipped(caches):
    """Caches whose first axis is not the batch."""
    return [tuple(tensor.transpose(0, 1) for tensor in layer) for layer in caches]
