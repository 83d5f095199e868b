"""Data that says which tokens are targets, and sequences of random symbols."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_gpt
from runs import assert_exact, command, facts, rows, small_run

from components.loss import CrossEntropy
from components.sequences import AssociativeRecall, Copy, CopyAccuracy, InductionSequences, RecallAccuracy
from components.stories import SyntheticStories
from components.tokenizer import BPE, Bytes, Symbols
from toolkit.evaluation.reader import Reader
from toolkit.loop.prefetch import prefetch
from toolkit.loop.scoring import evaluate
from toolkit.objective import Objective

CPU = torch.device("cpu")
RECALL = ("AssociativeRecall.pairs = 4", "AssociativeRecall.sequences = 300", "AssociativeRecall.val_sequences = 30")
RECALL += ("RecallAccuracy.length = 32", "RecallAccuracy.pairs = 4")


def recall(tokenizer=None, **knobs):
    data = AssociativeRecall(
        tokenizer or Symbols(40), 32, 0, **{"pairs": 4, "sequences": 200, "val_sequences": 30} | knobs
    )
    data.prepare()
    return data


def test_targets_of_the_data_are_used_and_next_tokens_without_them():
    for data in (recall(), SyntheticStories(Bytes(), 32, 0, stories=20, val_stories=4)):
        data.prepare()
        batches = list(prefetch(data, "train", 3, [0, 5], CPU))
        for index, (ids, targets) in zip((0, 5), batches, strict=True):
            samples = data.batch("train", index, 3)
            assert (ids.numpy() == samples[:, :-1]).all() and ids.is_contiguous() and targets.is_contiguous()
            expected = data.targets(samples) if isinstance(data, AssociativeRecall) else samples[:, 1:]
            assert (targets.numpy() == expected).all() and targets.dtype == torch.int64


def test_what_evaluation_writes_into_targets_does_not_reach_the_data():
    class Kept(AssociativeRecall):
        def targets(self, samples):
            self.kept = super().targets(samples)
            return self.kept

    data = Kept(Symbols(40), 32, 0, pairs=4, sequences=200, val_sequences=30)
    data.prepare()
    (batch,) = prefetch(data, "val", 4, [0], CPU)
    batch[1][:] = -100
    assert (data.kept != -100).any()


@torch.no_grad()
def test_loss_and_bits_per_byte_count_the_answers_alone():
    data = recall()
    model = tiny_gpt(vocab_size=42, max_len=32).eval()
    score = evaluate(Objective(model, CrossEntropy()), data, Symbols(40), 8, 20, CPU)  # the last batch is cut
    nats, text_bytes = [], 0
    for sample in data.batch("val", 0, 20):
        answers = {symbol: sample[place + 1] for place, symbol in enumerate(sample[:8]) if 0 < place and place % 2}
        for place in range(9, 32):
            if sample[place] in answers:
                hidden, head = model(torch.from_numpy(sample[None, : place + 1]))
                answer = torch.tensor(answers[sample[place]])
                nats.append(F.cross_entropy(head.logits(hidden)[0, -1], answer).item())
                text_bytes += len(f"{answer} ")
    assert len(nats) == 80 and score["loss_nats"] == pytest.approx(np.mean(nats), rel=1e-5)
    assert score["bits_per_byte"] == pytest.approx(sum(nats) / math.log(2) / text_bytes, rel=1e-5)


def test_a_run_trains_and_is_measured_again(tmp_path):
    bindings = (*RECALL, "Experiment.mask_documents = True", "GPT.attention = @SDPA")
    overlays = ("gin/data/associative_recall.gin",)
    assert small_run(tmp_path, "a", overlays=overlays, bindings=bindings, stories=False) == 0
    last = rows(tmp_path / "a")[-1]
    assert facts(tmp_path / "a")["windows"] == {"train": 300, "val": 30}
    again = command("toolkit.evaluate", str(tmp_path / "a"), "--json")
    assert again.returncode == 0, again.stderr
    assert f'"loss_nats": {last["val_full/loss_nats"]}' in again.stdout
    assert f'"eval/RecallAccuracy/accuracy": {last["eval/RecallAccuracy/accuracy"]}' in again.stdout


def test_a_final_evaluator_that_fails_loses_no_training(tmp_path):
    common = ("Experiment.final_evaluators = [@RecallAccuracy]", "Experiment.checkpoint_every = 1000")
    common += ("RecallAccuracy.length = 32",)
    pairs = "RecallAccuracy.pairs = {}"
    assert small_run(tmp_path, "whole", bindings=(*common, pairs.format(4))) == 0
    with pytest.raises(ValueError, match="pairs = 99: they and their queries have 396 tokens"):
        small_run(tmp_path, "mended", bindings=(*common, pairs.format(99)))
    assert small_run(tmp_path, "mended", "--resume", "--allow-change", bindings=(*common, pairs.format(4))) == 0
    steps = facts(tmp_path / "mended")["steps"]
    assert facts(tmp_path / "mended")["resumed"][0]["step"] == steps
    assert rows(tmp_path / "mended") == rows(tmp_path / "whole")
    assert_exact(tmp_path / "whole", tmp_path / "mended", steps)


def test_the_seed_of_a_run_orders_the_sequences_and_the_corpus_seed_chooses_them():
    def content(split, size=200, **knobs):
        data = recall(**knobs)
        return {row.tobytes() for row in data.batch(split, 0, size)}, data.fingerprint()

    assert content("train") == content("train") and content("val", 30)[1] == content("train")[1]
    assert not content("train", corpus_seed=1)[0] & content("train")[0]
    assert content("train", corpus_seed=1)[1] != content("train")[1]
    data = AssociativeRecall(Symbols(40), 32, 7, pairs=4, sequences=200, val_sequences=30)
    data.prepare()
    train = data.batch("train", 0, 200)
    assert {row.tobytes() for row in train} == content("train")[0] and (train != recall().batch("train", 0, 200)).any()
    assert (
        data.batch("val", 0, 30) == recall().batch("val", 0, 30)
    ).all() and data.fingerprint() == recall().fingerprint()
    longer = recall(sequences=3000)
    assert content("train")[0] < {row.tobytes() for row in longer.batch("train", 0, 3000)}


def test_an_evaluator_draws_none_of_the_datas_sequences():
    data, seen = recall(sequences=3000), []

    class Spy(Reader):
        def token_greedy(self, sequences):
            seen.extend(sequences)
            return super().token_greedy(sequences)

    reader = Spy(tiny_gpt(vocab_size=42, max_len=32), Symbols(40), 32, batch_tokens=999)
    for seed in (0, 1):
        RecallAccuracy(pairs=4, length=32, seed=seed).evaluate(reader)
    drawn = {tuple(row) for row in seen}
    own = {
        tuple(row[1:]) for split, size in (("train", 3000), ("val", 30)) for row in data.batch(split, 0, size).tolist()
    }
    assert len(drawn) == 512 and not drawn & own


@pytest.mark.parametrize(
    "data, message",
    [
        (lambda: AssociativeRecall(Bytes(), 32, 0, pairs=9), "^AssociativeRecall: pairs = 9: .*set pairs to 8 or less"),
        (lambda: AssociativeRecall(Symbols(8), 32, 0, pairs=4), "pairs = 4: .*3 keys and 4 values; .* to 10 or more"),
        (
            lambda: AssociativeRecall(Symbols(10), 8, 0, pairs=1),
            "sequences are drawn twice.*AssociativeRecall.sequences",
        ),
        (
            lambda: AssociativeRecall(BPE(), 32, 0),
            "@BPE learns from text, and AssociativeRecall has none; bind @Symbols",
        ),
        (lambda: Copy(Bytes(), 2, 0), "^Copy: .*make the sequences longer: Experiment.seq_len"),
        (lambda: Copy(Symbols(2), 20, 0), "raise Symbols.symbols"),
        (lambda: InductionSequences(Bytes(), 14, 0), "shortest = 8: .*set shortest to 7 or less"),
        (lambda: InductionSequences(Symbols(900), 2, 0, shortest=1, sequences=9), "needs 3 tokens or more, and has 2"),
        (lambda: InductionSequences(Symbols(16), 32, 0), "set Symbols.symbols to 17 or more"),
    ],
)
def test_sequences_that_can_not_be_drawn_are_refused(data, message):
    with pytest.raises(ValueError, match=message):
        data().prepare()


def test_an_evaluator_refuses_a_sequence_that_does_not_fit():
    reader = Reader(tiny_gpt(vocab_size=42, max_len=32), Symbols(40), 32, batch_tokens=999)
    with pytest.raises(ValueError, match="CopyAccuracy.length = 33 .*set CopyAccuracy.length to 32 or less"):
        CopyAccuracy(length=33).evaluate(reader)


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="unknown split 'test'; splits are train, val"):
        recall().batch("test", 0, 1)


def test_symbols_are_numbers_with_a_space():
    tokenizer = Symbols(13)
    assert tokenizer.encode("3 0\n12  ") == [3, 0, 12] and tokenizer.decode([3, 0, 12]) == "3 0 12 "
    assert tokenizer.encode("13 -1 03 x") == [tokenizer.unknown] * 4 and tokenizer.encode("") == []
    assert tokenizer.byte_lengths.sum() == len(tokenizer.decode(range(13))) and tokenizer.byte_lengths.shape == (15,)
    assert tokenizer.decode([1, tokenizer.eot]) == "1 <|endoftext|>"
    assert tokenizer.fingerprint() != Symbols(14).fingerprint()


def test_likeliest_tokens_are_those_of_a_pass_for_each_token():
    model, tokenizer = tiny_gpt(vocab_size=5, max_len=6).eval(), Symbols(3)
    sequences = [[0, 1, 2, 2, 1, 0], [], [2], [1, 1, 0, 2, 0, 1, 2, 0, 1, 1, 0]]  # the last one needs windows
    expected = []
    with torch.no_grad():
        for sequence in sequences:
            right = []
            for place, token in enumerate(sequence):
                start = 0 if place < 6 else len(sequence) - 6  # windows end at 6 and at 11 tokens
                context = [tokenizer.eot, *sequence[:place]] if place < 6 else sequence[start - 1 : place]
                hidden, head = model(torch.tensor([context]))
                right.append(bool(head.logits(hidden)[0, -1].argmax() == token))
            expected.append(right)
    for batch_tokens in (1, 1000):
        greedy = Reader(model, tokenizer, 6, batch_tokens).token_greedy(sequences)
        assert [each.tolist() for each in greedy] == expected and greedy[1].dtype == bool
    assert any(map(any, expected)) and not all(map(all, expected))
