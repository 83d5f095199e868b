"""Data on random symbols against their definitions, read token by token, and the accuracies against naive loops."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_gpt

from components.sequences import (
    AssociativeRecall,
    Copy,
    CopyAccuracy,
    InductionAccuracy,
    InductionSequences,
    RecallAccuracy,
)
from components.tokenizer import Bytes, Symbols
from toolkit.evaluation.reader import Reader


def recall_answers(row, alphabet, pairs):
    """What a reader of MQAR's definition expects: {place: answer}. Each key has its value, and is asked for once."""
    keys, values = alphabet[1 : len(alphabet) // 2], alphabet[len(alphabet) // 2 :]
    value_of, expected = {}, {}
    for place in range(0, 2 * pairs, 2):
        key, value = row[place], row[place + 1]
        assert key in keys and value in values and key not in value_of and value not in value_of.values()
        value_of[key] = value
    place, asked = 2 * pairs, []
    while place < len(row):
        if row[place] == alphabet[0]:
            place += 1
            continue
        asked.append(row[place])
        assert (place - 2 * pairs) % 2 == 0
        expected[place + 1] = value_of[row[place]]
        place += 2
    assert sorted(asked) == sorted(value_of)
    return expected


def copy_answers(row, alphabet):
    place = row.index(alphabet[0])  # the separator; the copied symbols are no blanks
    assert all(symbol == alphabet[0] for symbol in row[2 * place + 1 :])
    return {place + 1 + i: row[i] for i in range(place)}


def induction_answers(row, shortest):
    """The symbol that followed the last time, where there was such a time."""
    period = row.index(row[0], 1)
    assert len(set(row[:period])) == period and shortest <= period <= len(row) // 2
    follower, expected = {}, {}
    for place, symbol in enumerate(row):
        if place and row[place - 1] in follower:
            expected[place] = follower[row[place - 1]]
        if place:
            follower[row[place - 1]] = symbol
    assert min(expected) == period + 1  # the first repetition is not announced
    return expected


CASES = [
    (AssociativeRecall, {"pairs": 4}, Bytes(), 64, lambda row, alphabet: recall_answers(row, alphabet, 4)),
    (AssociativeRecall, {"pairs": 5, "power": 1.0}, Symbols(12), 21, lambda row, ids: recall_answers(row, ids, 5)),
    (AssociativeRecall, {"pairs": 1}, Symbols(4000), 4, lambda row, alphabet: recall_answers(row, alphabet, 1)),
    (Copy, {}, Symbols(30), 33, copy_answers),
    (Copy, {}, Bytes(), 20, copy_answers),
    (InductionSequences, {}, Bytes(), 64, lambda row, alphabet: induction_answers(row, 8)),
    (InductionSequences, {"shortest": 2}, Symbols(20), 31, lambda row, alphabet: induction_answers(row, 2)),
]


@pytest.mark.parametrize("cls, knobs, tokenizer, length, answers", CASES)
def test_every_answer_follows_from_the_definition_and_nothing_else_is_a_target(
    cls, knobs, tokenizer, length, answers, parity
):
    data = cls(tokenizer, length, 0, sequences=300, val_sequences=50, **knobs)
    data.prepare()
    alphabet = [i for i in range(tokenizer.vocab_size) if tokenizer.byte_lengths[i] > 0]
    for split, count in (("train", 300), ("val", 50)):
        samples = data.batch(split, 0, count)
        ours = data.targets(samples)
        expected = np.full_like(ours, -100)
        for number, (first, *row) in enumerate(samples.tolist()):
            assert first == tokenizer.eot and len(row) == length and set(row) <= set(alphabet)
            for place, answer in answers(row, alphabet).items():
                expected[number, place] = answer
                assert row[place] == answer
        parity(cls.__name__, "its definition, token by token", ours, expected)


@pytest.mark.parametrize("power", [0.01, 1.0])
def test_queries_are_as_far_from_the_pairs_as_in_the_published_code(power, parity):
    """The share of sequences with a query in each slot, against numpy's draws without replacement."""
    count, pairs, length = 3000, 4, 40
    data = AssociativeRecall(Symbols(40), length, 0, pairs=pairs, power=power, sequences=count)
    data.prepare()
    is_query = data.batch("train", 0, count)[:, 1 + 2 * pairs :: 2] != 0
    space = (length - 2 * pairs) // 2
    p = power * np.arange(1, space + 1) ** (power - 1)
    draws = np.random.default_rng(1)
    expected = np.zeros(space)
    for _ in range(20_000):
        expected[draws.choice(space, size=pairs, replace=False, p=p / p.sum())] += 1 / 20_000
    assert is_query.shape == (count, space) and (is_query.sum(1) == pairs).all()
    parity("AssociativeRecall", "numpy.random.choice", is_query.mean(0), expected, 0.07)  # 0.5 +- 0.009


@pytest.fixture(scope="module")
def learnt():
    """A tiny GPT that has learnt some of each task: its likeliest tokens are often right, and often wrong."""
    tokenizer, length = Symbols(16), 16
    model = tiny_gpt(vocab_size=tokenizer.vocab_size, max_len=length)
    sizes = {"sequences": 600, "val_sequences": 4}
    tasks = [
        AssociativeRecall(tokenizer, length, 0, pairs=3, **sizes),
        Copy(tokenizer, length, 0, **sizes),
        InductionSequences(tokenizer, length, 0, shortest=4, **sizes),
    ]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for data in tasks:
        data.prepare()
    for step in range(120):
        samples = np.concatenate([data.batch("train", step, 16) for data in tasks])
        targets = np.concatenate([data.targets(rows) for data, rows in zip(tasks, np.split(samples, 3), strict=True)])
        hidden, head = model(torch.from_numpy(samples[:, :-1]))
        F.cross_entropy(head.logits(hidden).flatten(0, 1), torch.from_numpy(targets).flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), tokenizer


ACCURACIES = [
    (RecallAccuracy(pairs=3, length=16, sequences=24), lambda row, ids: recall_answers(row, ids, 3)),
    (CopyAccuracy(length=15, sequences=24), copy_answers),
    (InductionAccuracy(shortest=4, length=16, sequences=24), lambda row, ids: induction_answers(row, 4)),
]


@pytest.mark.parametrize("evaluator, answers", ACCURACIES, ids=["recall", "copy", "induction"])
@torch.no_grad()
def test_an_accuracy_equals_a_loop_with_one_pass_for_each_answer(evaluator, answers, learnt, parity):
    model, tokenizer = learnt
    sequences = []

    class Spy(Reader):
        def token_greedy(self, given):
            sequences.extend(given)
            return super().token_greedy(given)

    evaluator.prepare()
    scores = evaluator.evaluate(Spy(model, tokenizer, 16, batch_tokens=100))
    expected = []
    for row in sequences:
        right = []
        for place, answer in answers(row, list(range(16))).items():
            hidden, head = model(torch.tensor([[tokenizer.eot, *row[:place]]]))
            right.append(float(head.logits(hidden)[0, -1].argmax() == answer))
        expected.append(sum(right) / len(right))
    name = type(evaluator).__name__
    assert 0.05 < np.mean(expected) < 0.95 and len({tuple(row) for row in sequences}) == 24 and len(scores) == 1
    items = list(scores["accuracy"].items.values())
    parity(name, "naive loop: each sequence", items, expected)
    parity(name, "naive loop: all sequences", scores["accuracy"].value, np.mean(expected))
