"""Evaluators against naive loops over a tiny model, and item by item against the code of lm-evaluation-harness."""

import gzip
import json
import math
import random
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_gpt

from components.evaluator import (
    Completion,
    Induction,
    LastWord,
    MinimalPairs,
    MultipleChoice,
    PositionLoss,
    TextLoss,
)
from components.harness import LMEval
from components.tokenizer import BPE, Bytes
from toolkit.evaluation.evaluators import is_higher_better
from toolkit.evaluation.reader import Reader

MAX_LEN = 48
NAMES, VERBS = ["Tom", "Mia", "the dog", "the old king"], ["sees", "takes", "likes"]
THINGS = ["the red ball", "a key", "a café", "the long road"]
SENTENCES = [f"{name} {verb} {thing}." for name in NAMES for verb in VERBS for thing in THINGS]
TEXT = "\n".join(SENTENCES)


def sentences(count: int, seed: int) -> list[str]:
    """Sentences of the text that the model has learnt, or near it: it predicts some of their words, and not others."""
    draw, found = random.Random(seed), []
    for _ in range(count):
        words = draw.choice(SENTENCES).split(" ")
        if draw.random() < 0.5:
            words[draw.randrange(len(words))] = draw.choice(["blue", "road.", "Mia", "runs"])
        found.append(" ".join(words))
    return found


def trained(tokenizer):
    """A tiny GPT that has learnt some of the text, so that its likeliest tokens are often right, and often wrong."""
    torch.manual_seed(0)
    model = tiny_gpt(vocab_size=tokenizer.vocab_size, max_len=MAX_LEN)
    ids = [i for sentence in SENTENCES for i in (tokenizer.eot, *tokenizer.encode(sentence))] * 2
    data, optimizer = torch.tensor(ids), torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(150):
        starts = torch.randint(len(data) // 2, (16,), generator=torch.Generator().manual_seed(step))
        batch = torch.stack([data[start : start + MAX_LEN + 1] for start in starts])
        hidden, head = model(batch[:, :-1])
        loss = F.cross_entropy(head.logits(hidden).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module", params=["bytes", "bpe"])
def learnt(request):
    """(model, tokenizer, reader). The tokens of BPE have several bytes."""
    tokenizer = Bytes() if request.param == "bytes" else BPE(300)
    if request.param == "bpe":
        tokenizer.train([TEXT])
    model = trained(tokenizer)
    return model, tokenizer, Reader(model, tokenizer, MAX_LEN, batch_tokens=256)


@torch.no_grad()
def logits(model, ids):
    """The logits of the token after ``ids``: one sequence, no cache, no padding."""
    hidden, head = model(torch.tensor([list(ids)]))
    return head.logits(hidden)[0, -1].double()


def naive_nats(model, before, ids):
    """The nats of each of ``ids``, one token at a time, each from all tokens before it. None of them is left out."""
    read, nats = list(before), []
    for token in ids:
        nats.append(-logits(model, read).log_softmax(-1)[token].item())
        read.append(token)
    return nats


def naive_document(model, tokenizer, text):
    """[(position, nats)] of the tokens of a text: windows of MAX_LEN; the last one ends at the end of the text."""
    ids, found = list(tokenizer.encode(text)), []
    for start in range(0, len(ids), MAX_LEN):
        end = min(start + MAX_LEN, len(ids))
        before = [tokenizer.eot] if start == 0 else ids[end - MAX_LEN - 1 : start]
        nats = naive_nats(model, before, ids[start:end])
        found += [(len(before) + i, value) for i, value in enumerate(nats)]
    return found


def write(path, rows):
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


def measure(evaluator, reader):
    evaluator.prepare()
    return evaluator.evaluate(reader)


def listed(score):
    return list(score.items.values())


# ---- naive loops


@pytest.fixture
def documents(tmp_path):
    """Two files with documents shorter and longer than the context."""
    near = [sentences(1, 1)[0], " ".join(sentences(2, 2)), "Ünïcode, and a café"]
    far = ["zq!", "".join(map(chr, range(33, 33 + MAX_LEN)))]
    (tmp_path / "near.txt").write_text("\n<|endoftext|>\n".join(near) + "\n<|endoftext|>\n\n")
    write(tmp_path / "far.jsonl", [{"text": text} for text in far])
    return [str(tmp_path / "near.txt"), str(tmp_path / "far.jsonl")], near, far


def test_text_loss(learnt, documents, parity):
    model, tokenizer, reader = learnt
    paths, near, far = documents
    scores = measure(TextLoss(paths), reader)
    nats = {text: [value for _, value in naive_document(model, tokenizer, text)] for text in near + far}
    bits = [sum(nats[text]) / math.log(2) / len(text.encode()) for text in near + far]
    parity("TextLoss", "naive loop: each document", listed(scores["bits_per_byte"]), bits, 1e-5)
    for name, texts in {"": near + far, "/near": near, "/far": far}.items():
        total = sum(sum(nats[text]) for text in texts)
        text_bytes = sum(len(text.encode()) for text in texts)
        ours = [scores[f"bits_per_byte{name}"].value, scores[f"loss_nats{name}"].value]
        theirs = [total / math.log(2) / text_bytes, total / sum(len(nats[text]) for text in texts)]
        parity("TextLoss", "naive loop: all together", ours, theirs, 1e-5)
    assert len(scores) == 6 and len(measure(TextLoss(paths[:1]), reader)) == 2


@pytest.mark.parametrize("buckets", [None, [3, 10, 40]])
def test_position_loss(learnt, documents, tmp_path, parity, buckets):
    model, tokenizer, reader = learnt
    paths, near, far = documents
    long = " ".join(sentences(12, 3))
    paths = [*paths, write(tmp_path / "long.jsonl", [{"text": long}])]
    scores = measure(PositionLoss(paths, buckets=buckets), reader)
    pairs = [naive_document(model, tokenizer, text) for text in [*near, *far, long]]
    edges = [(1, 1), (2, 3), (4, 7), (8, 15), (16, 31), (32, 48)] if buckets is None else [(3, 9), (10, 39), (40, 48)]
    assert list(scores) == [f"nats_at/{low}-{high}" for low, high in edges]
    for low, high in edges:
        within = [[value for position, value in each if low <= position <= high] for each in pairs]
        score, flat = scores[f"nats_at/{low}-{high}"], [value for each in within for value in each]
        parity("PositionLoss", "naive loop: all documents", score.value, np.mean(flat), 1e-5)
        parity("PositionLoss", "naive loop: each document", listed(score), [np.mean(e) for e in within if e], 1e-5)


def pairs(count, seed):
    """Minimal pairs; the bad sentence is not always the less likely one, nor as long as the good one."""
    draw, rows = random.Random(seed), []
    for sentence in sentences(count, seed):
        words = sentence.split(" ")
        place = draw.randrange(len(words) - 1)
        words[place : place + 2] = words[place + 1], words[place]
        bad = " ".join(words) if draw.random() < 0.6 else " ".join(words)[: draw.randrange(5, 15)]
        rows.append({"sentence_good": sentence, "sentence_bad": bad})
    return rows


@pytest.mark.parametrize("by", ["sum", "token"])
@pytest.mark.parametrize("prefix", ["", " "])
def test_minimal_pairs(learnt, tmp_path, parity, by, prefix):
    model, tokenizer, reader = learnt
    rows = pairs(25, 4) + [{"sentence_good": "a key", "sentence_bad": "a key"}]
    paths = [write(tmp_path / "a.jsonl.gz", rows), write(tmp_path / "b.jsonl", rows[:5])]
    scores = measure(MinimalPairs(paths, by, prefix), reader)

    def cost(text):
        nats = naive_nats(model, [tokenizer.eot], tokenizer.encode(prefix + text))
        return sum(nats) / (len(nats) if by == "token" else 1)

    wins = [float(cost(row["sentence_good"]) < cost(row["sentence_bad"])) for row in rows[:-1]] + [0.5]
    parity("MinimalPairs", "naive loop: each pair", listed(scores["accuracy"]), wins + wins[:5])
    assert listed(scores["accuracy/a"]) == wins and scores["accuracy/b"].value == sum(wins[:5]) / 5
    assert scores["accuracy"].value == pytest.approx(sum(wins + wins[:5]) / 31)
    assert 0 < sum(wins[:-1]) < 25


def test_minimal_pairs_by_token_differs_from_the_sum(learnt, tmp_path):
    path = write(tmp_path / "a.jsonl", pairs(25, 4))
    by_sum, by_token = (measure(MinimalPairs([path], by), learnt[2])["accuracy"] for by in ("sum", "token"))
    assert listed(by_sum) != listed(by_token)


def naive_choice(model, tokenizer, context, choices):
    """The sum of the nats of each choice, after the context and a space. The oldest tokens that do not fit are lost."""
    found = []
    for choice in choices:
        stripped = context.rstrip()
        whole = list(tokenizer.encode(f"{context} {choice}"))
        before = list(tokenizer.encode(stripped)) if stripped else [tokenizer.eot]
        targets = whole[len(before) :] if stripped else whole
        before = before[-(MAX_LEN + 1 - len(targets)) :]
        found.append(sum(naive_nats(model, before, targets)))
    return found


def test_multiple_choice(learnt, tmp_path, parity):
    model, tokenizer, reader = learnt
    draw, rows, sums, per_byte = random.Random(0), [], [], []
    for number, sentence in enumerate(sentences(30, 5)):
        context = " ".join([*sentences(3, number), sentence.split(" ")[0]])[-(10 + 3 * number) :]
        context = ["", " ", context, context + " "][min(number, 3 if number % 5 == 0 else 2)]
        choices = [" ".join(each.split(" ")[1:])[: draw.randrange(4, 14)] for each in sentences(4, 100 + number)]
        answer = draw.randrange(4)
        nats = naive_choice(model, tokenizer, context, choices)
        sums.append(float(np.argmin(nats) == answer))
        per_byte.append(float(np.argmin([n / len(c.encode()) for n, c in zip(nats, choices, strict=True)]) == answer))
        labelled = {"text": choices, "label": list("ABCD")}
        rows += [{"context": context, "choices": labelled, "answer": "ABCD"[answer]}] if number % 2 else []
        rows += [{"context": context, "choices": choices, "answer": answer}] if number % 2 == 0 else []
    scores = measure(MultipleChoice([write(tmp_path / "a.jsonl", rows)]), reader)
    assert list(scores) == ["accuracy", "accuracy_per_byte"] and sums != per_byte
    parity("MultipleChoice", "naive loop: each question", listed(scores["accuracy"]), sums)
    parity("MultipleChoice", "naive loop: each question, by byte", listed(scores["accuracy_per_byte"]), per_byte)
    assert scores["accuracy"].value == pytest.approx(sum(sums) / 30) and 0 < sum(sums) < 30


def test_last_word(learnt, tmp_path, parity):
    model, tokenizer, reader = learnt
    texts = [" ".join([*sentences(number % 3, number), sentence]) for number, sentence in enumerate(sentences(40, 6))]
    expected = []
    for text in texts:
        before, word = text.rsplit(" ", 1)
        read = list(tokenizer.encode(before))
        targets = list(tokenizer.encode(text))[len(read) :]
        right = []
        for token in targets:
            window = read[-(MAX_LEN + 1 - len(targets) + len(right)) :]
            right.append(int(logits(model, window).argmax()) == token)
            read.append(token)
        expected.append(float(all(right)))
    scores = measure(LastWord([write(tmp_path / "a.jsonl", [{"text": text} for text in texts])]), reader)
    assert list(scores) == ["accuracy"]
    parity("LastWord", "naive loop: each text", listed(scores["accuracy"]), expected)
    assert 0 < sum(expected) < 40


def test_induction(learnt, parity):
    model, tokenizer, reader = learnt
    evaluator = Induction(length=10, sequences=3, seed=5)
    ids = [i for i in range(tokenizer.vocab_size) if tokenizer.byte_lengths[i] > 0]
    seen = []

    class Spy:
        def __getattr__(self, name):
            return getattr(reader, name)

        def token_nats(self, sequences):
            seen.extend(sequences)
            return reader.token_nats(sequences)

    scores = measure(evaluator, Spy())
    assert [len(each) for each in seen] == [20] * 3 and all(each[:10] == each[10:] for each in seen)
    assert {i for each in seen for i in each} <= set(ids) and len({tuple(each) for each in seen}) == 3
    nats = np.array([naive_nats(model, [tokenizer.eot], each) for each in seen])
    for name, part in {"nats_first_half": nats[:, 1:10], "nats_second_half": nats[:, 11:]}.items():
        parity("Induction", "naive loop: each sequence", listed(scores[name]), part.mean(1), 1e-5)
        parity("Induction", "naive loop: all sequences", scores[name].value, part.mean(), 1e-5)
    first = seen[:]
    seen.clear()
    measure(Induction(length=10, sequences=2, seed=5), Spy())
    assert seen == first[:2]
    seen.clear()
    measure(Induction(length=10, sequences=2, seed=6), Spy())
    assert seen != first[:2]


def test_induction_draws_no_special_ids():
    class Stub:
        tokenizer, max_len = SimpleNamespace(byte_lengths=[0, 1, 0, 3, 0, 0], eot=5), 64

        def token_nats(self, sequences):
            assert {i for each in sequences for i in each} == {1, 3}
            return [np.ones(len(each)) for each in sequences]

    assert measure(Induction(length=32, sequences=4), Stub())["nats_second_half"].value == 1.0


def test_induction_needs_both_halves_in_the_context(learnt):
    with pytest.raises(ValueError, match=rf"Induction.length to {MAX_LEN // 2} or less"):
        measure(Induction(length=MAX_LEN // 2 + 1), learnt[2])
    measure(Induction(length=MAX_LEN // 2, sequences=1), learnt[2])


def test_completion(learnt, tmp_path, parity):
    model, tokenizer, reader = learnt
    prompts = ["Tom", "Mia likes", "", "the old king", "zq"]
    texts = []
    for prompt in prompts:
        ids, new = list(tokenizer.encode(prompt)) or [tokenizer.eot], []
        while len(new) < 12 and (token := int(logits(model, ids + new).argmax())) != tokenizer.eot:
            new.append(token)
        texts.append(tokenizer.decode(new))
    words = [text.split() for text in texts]
    bigrams = [(a, b) for each in words for a, b in zip(each, each[1:], strict=False)]
    path = write(tmp_path / "prompts.jsonl", [{"prompt": prompt} for prompt in prompts[2:]])
    pattern = r"the|ee"
    scores = measure(Completion(prompts[:2], [path], pattern=pattern, max_tokens=12), reader)
    expected = [float(bool(re.search(pattern, text))) for text in texts]
    parity("Completion", "naive loop: each prompt", listed(scores["match"]), expected)
    assert scores["match"].value == pytest.approx(sum(expected) / 5)
    assert scores["distinct_2"].value == pytest.approx(len(set(bigrams)) / len(bigrams))
    whole = texts[0].split()[-1].strip(".")
    for wanted in ([whole], [whole[:-1], whole + "s"], [whole[1:]], [".*"]):
        found = [float(any(word in re.split(r"\W+", text) for word in wanted)) for text in texts]
        assert listed(measure(Completion(prompts, words=wanted, max_tokens=12), reader)["match"]) == found
    warm = Completion(prompts, pattern="x", max_tokens=12, temperature=3.0)
    warm.prepare()
    assert warm.evaluate(reader) == warm.evaluate(reader)


# ---- what prepare() refuses


HELLASWAG = {
    "ind": 0,
    "activity_label": "Roof",
    "ctx_a": "A man sits.",
    "ctx_b": "he",
    "ctx": "A man sits. he",
    "endings": ["runs.", "eats."],
    "label": "1",
}
ARC = {"question": "Why?", "choices": {"text": ["so", "no"], "label": ["A", "B"]}, "answerKey": "B"}
PIQA = {"goal": "Open it", "sol1": "pull", "sol2": "push", "label": 0}
PLAIN = {"context": "Tom", "choices": ["sees", "takes"], "answer": 1}
PAIR = {"sentence_good": "a", "sentence_bad": "b"}


@pytest.mark.parametrize(
    ("evaluator", "sound", "change", "message"),
    [
        (MinimalPairs, PAIR, {"sentence_bad": 3}, "'sentence_bad' must be text, not 3"),
        (MinimalPairs, PAIR, {"sentence_good": " "}, "'sentence_good' is empty"),
        (MinimalPairs, PAIR, {"sentence_bad": "a\ud800"}, "half of a surrogate pair"),
        (MinimalPairs, PAIR, {"sentence_bad": None}, "'sentence_bad' must be text, not null"),
        (LastWord, {"text": "a b"}, {"text": "ab"}, "must have a last word"),
        (LastWord, {"text": "a b"}, {"text": "a b "}, "must have a last word"),
        (LastWord, {"text": "a b"}, {"text": " b"}, "must have a last word"),
        (LastWord, {"text": "a b"}, {"text": ["a", "b"]}, "'text' must be text"),
        (MultipleChoice, PLAIN, {"answer": 2}, "'answer' must be one of 0, 1, not 2"),
        (MultipleChoice, PLAIN, {"answer": -1}, "'answer' must be one of 0, 1, not -1"),
        (MultipleChoice, PLAIN, {"answer": True}, "'answer' must be one of 0, 1, not True"),
        (MultipleChoice, PLAIN, {"answer": 1.0}, "'answer' must be one of 0, 1, not 1.0"),
        (MultipleChoice, PLAIN, {"choices": "ab"}, "'choices' must be a list of two or more texts"),
        (MultipleChoice, PLAIN, {"choices": ["a"]}, "'choices' must be a list of two or more texts"),
        (MultipleChoice, PLAIN, {"choices": ["a", ""]}, "texts that are not empty"),
        (MultipleChoice, PLAIN, {"context": 1}, "'context' must be text, not 1"),
        (MultipleChoice, ARC, {"answerKey": "C"}, "'answerKey' must be one of A, B, not 'C'"),
        (MultipleChoice, ARC, {"choices": {"text": ["a", "b"], "label": ["A"]}}, "'choices' must be a list"),
        (MultipleChoice, ARC, {"choices": {"text": ["a", "b"], "label": ["A", "A"]}}, "a label of its own"),
        (MultipleChoice, ARC, {"choices": ["a", "b"]}, "the lists 'text' and 'label'"),
        (MultipleChoice, PIQA, {"label": 2}, "'label' must be one of 0, 1, not 2"),
        (MultipleChoice, PIQA, {"sol1": ""}, "'sol1' is empty"),
        (MultipleChoice, HELLASWAG, {"label": ""}, "'label' must be one of 0, 1, not ''"),
        (MultipleChoice, HELLASWAG, {"endings": ["runs.", "[x]"]}, "texts that are not empty"),
        (Completion, {"prompt": "a"}, {"prompt": 1}, "'prompt' must be text, not 1"),
    ],
)
def test_a_broken_item_is_refused_by_file_and_line(tmp_path, evaluator, sound, change, message):
    path = tmp_path / "items.jsonl"
    knobs = {"pattern": "x"} if evaluator is Completion else {}
    path.write_text(json.dumps(sound) + "\n\n" + json.dumps(sound) + "\n")
    evaluator(paths=[str(path)], **knobs).prepare()
    path.write_text(json.dumps(sound) + "\n\n" + json.dumps({**sound, **change}) + "\n")
    with pytest.raises(ValueError, match=rf"items\.jsonl:3: .*{re.escape(message)}"):
        evaluator(paths=[str(path)], **knobs).prepare()


def test_an_unknown_format_is_refused_with_those_that_are_known(tmp_path):
    path = write(tmp_path / "a.jsonl", [PLAIN, {"goal": "x", "sol1": "y", "label": 0}])
    with pytest.raises(ValueError, match=r"a\.jsonl:2: the fields goal, sol1, label .* piqa: goal, sol1, sol2, label"):
        MultipleChoice([path]).prepare()


def test_metrics_of_two_files_never_share_a_name(tmp_path):
    (tmp_path / "b").mkdir()
    paths = [write(tmp_path / "a.jsonl", [PAIR]), write(tmp_path / "b" / "a.jsonl", [PAIR])]
    with pytest.raises(ValueError, match="MinimalPairs.paths: the metrics of .* rename one file"):
        MinimalPairs(paths).prepare()


def test_messages_about_texts_name_the_evaluator(tmp_path):
    for evaluator in (TextLoss, PositionLoss):
        with pytest.raises(ValueError, match=rf"^{evaluator.__name__}\.paths: no file matches"):
            evaluator([str(tmp_path / "none*")]).prepare()
        with pytest.raises(ValueError, match=rf"a\.jsonl:1: .*bind {evaluator.__name__}\.column"):
            evaluator([write(tmp_path / "a.jsonl", [PAIR])]).prepare()
        (tmp_path / "blank.txt").write_text(" \n")
        with pytest.raises(ValueError, match=rf"{evaluator.__name__}\.paths = .* have no text"):
            evaluator([str(tmp_path / "blank.txt")]).prepare()


@pytest.mark.parametrize(
    ("evaluator", "knobs", "message"),
    [
        (PositionLoss, {"paths": ["a"], "buckets": [1, 4, 4]}, "PositionLoss.buckets"),
        (Completion, {"pattern": "a"}, "no prompt"),
        (Completion, {"prompts": ["a"]}, "exactly one"),
        (Completion, {"prompts": ["a"], "pattern": "a", "words": ["b"]}, "exactly one"),
        (Completion, {"prompts": ["a"], "pattern": "("}, "not a regular expression"),
    ],
)
def test_a_constructor_refuses_what_can_not_be_measured(evaluator, knobs, message):
    with pytest.raises(ValueError, match=message):
        evaluator(**knobs)


def test_the_fingerprint_covers_items_and_knobs(tmp_path):
    def prints(rows, **changes):
        pairs, text = (
            write(tmp_path / "a.jsonl", rows),
            write(tmp_path / "t.jsonl", [{"text": rows[0]["sentence_bad"]}]),
        )
        knobs = {
            "by": "sum",
            "prefix": "",
            "buckets": None,
            "length": 4,
            "seed": 0,
            "max_tokens": 3,
            "temperature": 0.0,
        }
        knobs |= {"sequences": 2, "words": ["a"], "prompts": ["a"]} | changes
        built = {
            "pairs": MinimalPairs([pairs], knobs["by"], knobs["prefix"]),
            "text": TextLoss([text]),
            "position": PositionLoss([text], buckets=knobs["buckets"]),
            "induction": Induction(knobs["length"], knobs["sequences"], knobs["seed"]),
            "completion": Completion(
                knobs["prompts"], None, None, knobs["words"], knobs["max_tokens"], knobs["temperature"]
            ),
        }
        for evaluator in built.values():
            evaluator.prepare()
        return {name: evaluator.fingerprint() for name, evaluator in built.items()}

    before = prints([PAIR])
    assert before == prints([PAIR]) and len(set(before.values())) == 5
    for changes, name in [
        ({"by": "token"}, "pairs"),
        ({"prefix": " "}, "pairs"),
        ({"buckets": [1, 3]}, "position"),
        ({"length": 5}, "induction"),
        ({"sequences": 3}, "induction"),
        ({"seed": 1}, "induction"),
        ({"max_tokens": 4}, "completion"),
        ({"temperature": 1.0}, "completion"),
        ({"words": ["b"]}, "completion"),
        ({"prompts": ["b"]}, "completion"),
    ]:
        after = prints([PAIR], **changes)
        assert {each for each in before if before[each] != after[each]} == {name}
    after = prints([{**PAIR, "sentence_bad": "c"}])
    assert {each for each in before if before[each] != after[each]} == {"pairs", "text", "position"}


# ---- lm-evaluation-harness


class Naive:
    """A model of lm-eval over a tiny GPT, once lm-eval's TemplateLM is its base. It gets tokens from lm-eval and reads
    them one window at a time, as lm-eval's class HFLM does, without a batch or a cache."""

    def __init__(self, model, tokenizer):
        super().__init__()
        self.model, self.tokenizer = model, tokenizer

    @property
    def eot_token_id(self):
        return self.tokenizer.eot

    def tok_encode(self, string, add_special_tokens=None, **_):
        return list(self.tokenizer.encode(string))

    def _loglikelihood_tokens(self, requests, **_):
        return [self._read(context, targets) for _, context, targets in requests]

    @torch.no_grad()
    def _read(self, context, targets):
        ids = (list(context) + list(targets))[-(MAX_LEN + 1) :]
        hidden, head = self.model(torch.tensor([ids[:-1]]))
        rows = head.logits(hidden)[0, -len(targets) :].double().log_softmax(-1)
        greedy = rows.argmax(-1).tolist() == list(targets)
        return rows[range(len(targets)), targets].sum().item(), greedy

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        from lm_eval import utils

        return [
            sum(
                self._read(*utils.make_disjoint_window(window))[0]
                for window in utils.get_rolling_token_windows(
                    self.tok_encode(request.args[0]), self.prefix_token_id, MAX_LEN, 1
                )
            )
            for request in requests
        ]

    def generate_until(self, requests, disable_tqdm=False):
        return [self._generate(*request.args) for request in requests]

    def _generate(self, prompt, settings):
        ids, new = self.tok_encode(prompt), []
        while len(new) < settings["max_gen_toks"]:
            token = int(logits(self.model, ids + new).argmax())
            if token == self.tokenizer.eot:
                break
            new.append(token)
        text = self.tokenizer.decode(new)
        for mark in settings["until"]:
            text = text.split(mark)[0]
        return text


def task_file(task, path, split, **changes):
    """The file of a task of lm-eval, or of a new one (None), that reads a local file."""
    lm_eval = pytest.importorskip("lm_eval")
    local = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": {split: path}}}
    splits = {f"{each}_split": None for each in ("training", "test")} | {"validation_split": split}
    base = {} if task is None else {"include": str(Path(lm_eval.__file__).parent / "tasks" / task)}
    own = Path(path).with_suffix(".yaml")
    own.write_text(json.dumps({**base, "task": own.stem, **local, **splits, **changes}))
    return own


def harness_scores(learnt, task, path, split, **changes):
    """What lm-evaluation-harness's own code makes of one of its tasks on a local file: its samples, in order."""
    own = task_file(task, path, split, **changes)
    return harness_results(learnt, own)


def harness_results(learnt, own, **settings):
    import datasets
    from lm_eval.api.model import TemplateLM
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    datasets.disable_progress_bars()
    naive = type("NaiveLM", (Naive, TemplateLM), {})(*learnt[:2])
    manager = TaskManager(include_path=str(own.parent), include_defaults=False)
    results = simple_evaluate(naive, tasks=[own.stem], task_manager=manager, bootstrap_iters=0, **settings)
    (samples,) = results["samples"].values()
    (figures,) = results["results"].values()
    return figures, sorted(samples, key=lambda sample: sample["doc_id"])


def measured_by_the_part(own, reader, **knobs):
    """The scores of LMEval on the task of a file, without the name of the task."""
    evaluator = LMEval([own.stem], include_path=str(own.parent), **knobs)
    scores = measure(evaluator, reader)
    return {name.removeprefix(f"{own.stem}/"): score for name, score in scores.items()}


def same_answers(parity, name, ours, samples, metric, figure, what):
    """Every item the same, and the mean; and not by chance: neither all right nor all wrong."""
    theirs = [float(sample[metric]) for sample in samples]
    assert listed(ours) == theirs and len(theirs) >= 40
    assert 0 < sum(theirs) < len(theirs)
    parity(name, f"lm_eval, {what}", ours.value, figure, 1e-12)


quiet = pytest.mark.filterwarnings("ignore")  # of lm_eval and what it imports


@quiet
def test_minimal_pairs_equal_lm_eval_blimp(learnt, tmp_path, parity):
    path = write(tmp_path / "blimp.jsonl", [{**row, "UID": "x"} for row in pairs(80, 7)])
    figures, samples = harness_scores(learnt, "blimp/adjunct_island.yaml", path, "train")
    score = measure(MinimalPairs([path], prefix=" "), learnt[2])["accuracy"]
    same_answers(parity, "MinimalPairs", score, samples, "acc", figures["acc,none"], "blimp")
    own = measured_by_the_part(Path(path).with_suffix(".yaml"), learnt[2])["acc"]
    same_answers(parity, "LMEval", own, samples, "acc", figures["acc,none"], "blimp")
    assert listed(own) == listed(score)


def hellaswag_rows(count):
    draw, rows = random.Random(8), []
    for number, sentence in enumerate(sentences(count, 9)):
        marks = ["", " [title]", " [step]", "  "][number % 4]
        endings = [f"{each.split(' ', 1)[1][: draw.randrange(5, 16)]}{marks} é" for each in sentences(4, 50 + number)]
        row = {
            "ind": number,
            "activity_label": "Tom",
            "ctx_a": sentence + marks,
            "ctx_b": ["", "mia", "ÉA b"][number % 3],
        }
        row |= {"ctx": "not read", "endings": endings, "label": str(draw.randrange(4)), "split": "val"}
        rows.append(row)
    return rows


def arc_rows(count):
    draw, rows = random.Random(10), []
    for number, sentence in enumerate(sentences(count, 11)):
        choices = [each.split(" ", 1)[1][: draw.randrange(4, 16)] for each in sentences(3 + number % 3, 90 + number)]
        labels = (list("ABCDE") if number % 2 else list("12345"))[: len(choices)]
        row = {"id": str(number), "question": sentence, "choices": {"text": choices, "label": labels}}
        rows.append(row | {"answerKey": draw.choice(labels)})
    return rows


def piqa_rows(count):
    draw = random.Random(12)
    return [
        {
            "goal": sentence,
            "sol1": sentences(1, 200 + number)[0],
            "sol2": sentences(1, 300 + number)[0][: draw.randrange(8, 20)],
            "label": draw.randrange(2),
        }
        for number, sentence in enumerate(sentences(count, 13))
    ]


BOTH = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_bytes")]


@quiet
@pytest.mark.parametrize(
    ("task", "rows"),
    [("hellaswag/hellaswag", hellaswag_rows(60)), ("arc/arc_easy", arc_rows(60)), ("piqa/piqa", piqa_rows(60))],
    ids=["hellaswag", "arc", "piqa"],
)
def test_multiple_choice_equals_lm_eval(learnt, tmp_path, parity, task, rows):
    path = write(tmp_path / "items.jsonl", rows)
    figures, samples = harness_scores(learnt, f"{task}.yaml", path, "validation", metric_list=BOTH)
    evaluator = MultipleChoice([path])
    scores = measure(evaluator, learnt[2])
    same_answers(parity, "MultipleChoice", scores["accuracy"], samples, "acc", figures["acc,none"], task)
    per_byte = scores["accuracy_per_byte"]
    same_answers(
        parity, "MultipleChoice", per_byte, samples, "acc_bytes", figures["acc_bytes,none"], f"{task} per byte"
    )
    own = measured_by_the_part(Path(path).with_suffix(".yaml"), learnt[2])
    for metric, score in {"acc": scores["accuracy"], "acc_bytes": per_byte}.items():
        same_answers(parity, "LMEval", own[metric], samples, metric, figures[f"{metric},none"], f"{task} {metric}")
        assert listed(own[metric]) == listed(score)
    asked = [(question.context, " " + choice) for question in evaluator.questions for choice in question.choices]
    theirs = [tuple(arguments) for sample in samples for arguments in sample["arguments"]]
    assert asked == theirs
    nats = [each.nats for each in learnt[2].continuations(asked)]
    expected = [-float(answer[0]) for sample in samples for answer in sample["filtered_resps"]]
    parity("MultipleChoice", f"lm_eval, {task}: nats of each choice", nats, expected, 1e-5)


@quiet
def test_last_word_equals_lm_eval_lambada(learnt, tmp_path, parity):
    texts = [" ".join([*sentences(number % 3, number), sentence]) for number, sentence in enumerate(sentences(60, 14))]
    path = write(tmp_path / "lambada.jsonl", [{"text": text.replace(". ", ".\n\n ")} for text in texts])
    figures, samples = harness_scores(learnt, "lambada/lambada_openai.yaml", path, "test")
    score = measure(LastWord([path]), learnt[2])["accuracy"]
    same_answers(parity, "LastWord", score, samples, "acc", figures["acc,none"], "lambada_openai")
    own = measured_by_the_part(Path(path).with_suffix(".yaml"), learnt[2])
    same_answers(parity, "LMEval", own["acc"], samples, "acc", figures["acc,none"], "lambada_openai")
    assert listed(own["acc"]) == listed(score)
    parity("LMEval", "lm_eval, lambada_openai: perplexity", own["perplexity"].value, figures["perplexity,none"], 1e-5)


@quiet
def test_text_loss_equals_lm_eval_pile(learnt, tmp_path, parity):
    texts = [" ".join(sentences(1 + number % 9, number)) for number in range(40)] + ["ünïcödé €"]
    path = write(tmp_path / "pile.jsonl", [{"text": text} for text in texts])
    figures, samples = harness_scores(learnt, "pile/pile_arxiv.yaml", path, "train")
    score = measure(TextLoss([path]), learnt[2])["bits_per_byte"]
    theirs = [-nats / (length * math.log(2)) for nats, length in (sample["bits_per_byte"] for sample in samples)]
    parity("TextLoss", "lm_eval, pile: each document", listed(score), theirs, 1e-5)
    parity("TextLoss", "lm_eval, pile: all documents", score.value, figures["bits_per_byte,none"], 1e-5)
    own = measured_by_the_part(Path(path).with_suffix(".yaml"), learnt[2])
    parity("LMEval", "lm_eval, pile: each document", listed(own["bits_per_byte"]), theirs, 1e-5)
    for metric in ("bits_per_byte", "byte_perplexity", "word_perplexity"):
        parity("LMEval", f"lm_eval, pile: {metric}", own[metric].value, figures[f"{metric},none"], 1e-4)


# ---- LMEval


@quiet
def test_lm_eval_generates_as_lm_eval(learnt, tmp_path, parity):
    """Texts, stopped at a mark, with examples in the prompt, through a filter, and on the first documents only."""
    words = [sentence.split(" ")[-3:] for sentence in sentences(60, 15)]  # short: two of them fit into the context
    rows = [{"start": f"{first} {second}", "end": last} for first, second, last in words]
    path = write(tmp_path / "endings.jsonl", rows)
    settings = {
        "output_type": "generate_until",
        "doc_to_text": "{{start}}",
        "doc_to_target": " {{end}}",
        "generation_kwargs": {"until": ["."], "max_gen_toks": 6, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "regexes_to_ignore": ["[.]"]}],
        "fewshot_split": "validation",
        "fewshot_config": {"sampler": "default"},
    }
    filters = {name: [{"function": function} for function in functions] for name, functions in FILTERS.items()}
    settings |= {"filter_list": [{"name": name, "filter": steps} for name, steps in filters.items()]}
    own = task_file(None, path, "validation", **settings)
    for examples in (0, 1):
        figures, samples = harness_results(learnt, own, num_fewshot=examples, limit=50)
        scores = measured_by_the_part(own, learnt[2], num_fewshot=examples, limit=50)
        assert list(scores) == ["exact_match/plain_text", "exact_match/lower_case"]
        for name in FILTERS:
            chosen = [sample for sample in samples if sample["filter"] == name]
            score = scores[f"exact_match/{name.replace(' ', '_')}"]
            assert listed(score) == [sample["exact_match"] for sample in chosen] and len(chosen) == 50
            assert score.value == pytest.approx(figures[f"exact_match,{name}"], abs=1e-12)
        if examples == 0:
            figure = figures["exact_match,plain text"]
            parity("LMEval", "lm_eval: generated texts", scores["exact_match/plain_text"].value, figure, 1e-12)
        assert examples or 0 < scores["exact_match/plain_text"].value < 1
        texts = {sample["resps"][0][0] for sample in samples}
        assert len(texts) > 3 and not any("." in text for text in texts)


FILTERS = {"plain text": ["take_first"], "lower case": ["lowercase", "take_first"]}


@quiet
def test_lm_eval_says_which_direction_is_better_of_each_metric(tmp_path):
    task = task_file("lambada/lambada_openai.yaml", write(tmp_path / "a.jsonl", [{"text": "a b"}]), "test")
    evaluator = LMEval([task.stem], include_path=str(tmp_path))
    evaluator.prepare()
    assert evaluator.lower_is_better == {"a/perplexity"}
    assert is_higher_better(evaluator, "a/acc") and not is_higher_better(evaluator, "a/perplexity")


@quiet
def test_the_fingerprint_of_lm_eval_covers_documents_prompts_and_knobs(tmp_path):
    rows = [{"start": "a", "end": "b"}, {"start": "c", "end": "d"}]

    def print_of(rows=rows, text="{{start}}", version=1, **knobs):
        settings = {"output_type": "loglikelihood", "doc_to_text": text, "doc_to_target": " {{end}}"}
        settings |= {"metric_list": [{"metric": "acc"}], "metadata": {"version": version}}
        task_file(None, write(tmp_path / "own.jsonl", rows), "validation", **settings)
        evaluator = LMEval(["own"], include_path=str(tmp_path), **knobs)
        evaluator.prepare()
        return evaluator.fingerprint()

    prints = [print_of(), print_of(rows[:1]), print_of(text="{{start}}!"), print_of(version=2), print_of(limit=1)]
    assert print_of() == prints[0] and len(set(prints)) == len(prints) - 1
    assert prints[1] == prints[4]  # the same document is asked


@quiet
@pytest.mark.parametrize(
    ("tasks", "include_path", "message"),
    [
        (["owm"], ".", "LMEval.tasks: lm-eval has no task 'owm'; did you mean 'own'"),
        (["own"], "none", "LMEval.include_path: no folder"),
        (["own"], "run/tasks", "is in the run's folder"),
        (["lost"], ".", "LMEval.tasks: the task 'lost' can't be loaded: FileNotFoundError"),
    ],
)
def test_what_lm_eval_can_not_measure_is_refused_by_prepare(tmp_path, monkeypatch, tasks, include_path, message):
    settings = {"output_type": "loglikelihood", "doc_to_text": "{{text}}", "doc_to_target": " b"}
    monkeypatch.setattr("toolkit.evaluation.harness._with_defaults", without_defaults)
    for name in ("own", "lost"):
        task_file(None, write(tmp_path / f"{name}.jsonl", [{"text": "a"}]), "validation", **settings)
    (tmp_path / "lost.jsonl").unlink()
    (tmp_path / "run" / "tasks").mkdir(parents=True)
    for name in ("config.gin", "facts.json"):
        (tmp_path / "run" / name).touch()
    with pytest.raises(ValueError, match=re.escape(message)):
        LMEval(tasks, include_path=str(tmp_path / include_path)).prepare()


@quiet
def test_lm_eval_refuses_a_continuation_without_tokens(learnt, tmp_path):
    """Its nats are 0, so that it would win every comparison."""
    settings = {"output_type": "loglikelihood", "doc_to_text": "{{start}}", "doc_to_target": "{{end}}"}
    settings |= {"target_delimiter": "", "metric_list": [{"metric": "acc"}]}
    own = task_file(None, write(tmp_path / "own.jsonl", [{"start": "y" * 99, "end": " b"}]), "validation", **settings)
    assert measured_by_the_part(own, learnt[2])
    own = task_file(None, write(tmp_path / "own.jsonl", [{"start": "y" * 99, "end": ""}]), "validation", **settings)
    with pytest.raises(ValueError, match="LMEval: the continuation '' has no tokens of its own after 'yyy"):
        measured_by_the_part(own, learnt[2])


def without_defaults(include_path):
    """lm-eval's own tasks take many seconds to read."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path, include_defaults=False)


def test_lm_eval_not_installed_names_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(ValueError, match=re.escape('python -m pip install -e ".[eval]"')):
        LMEval(["hellaswag"]).prepare()
