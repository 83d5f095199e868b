"""Tests of every registered part: its conformance report, and rules that need more than one part. A new part is tested
here without a change to this file."""

import copy
import json

import numpy as np
import pytest
import torch
from conftest import parts, tiny_gpt
from planted import StreamsLeftOpen
from torch import nn

from components.attention import MathAttention
from components.position import RoPE
from toolkit.compose import load_shelf
from toolkit.conformance import bench_of, run_checks
from toolkit.context import Context
from toolkit.model import GPT
from toolkit.registry import CATALOG, Entry

load_shelf()
LAYERS = ("attention", "position", "mixer", "norm", "ffn", "block")
VOCAB = 50
ALL = parts(*{entry.kind for entry in CATALOG.values()} - {"experiment"})


def tokens(batch: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def supports(part: Entry, what: str) -> bool:
    return what in getattr(part.cls, "supports", ())


def refuses_tied(part: Entry) -> bool:
    return part.kind == "init" and bench_of(part.name).untied


@pytest.fixture(scope="module")
def knobs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Bindings for the parts that need some to be built, with small files."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder = tmp_path_factory.mktemp("knobs")
    words = ["red", "hen", "fox", "ran", "home", "slept", "by", "the", "old", "mill"]
    draw = np.random.default_rng(0)
    stories = [" ".join(draw.choice(words, 60)) for _ in range(60)]
    (folder / "stories.txt").write_text("\n<|endoftext|>\n".join(stories))
    learnt = Tokenizer(models.BPE())
    learnt.pre_tokenizer, learnt.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    learnt.train_from_iterator(stories, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    learnt.save(str(folder / "tokenizer.json"))
    pairs = [{"sentence_good": f"the {w} ran home", "sentence_bad": f"the {w} slept by mill"} for w in words]
    choices = [
        {"context": f"the {w} ran", "choices": ["home", "by", "red"], "answer": i % 3} for i, w in enumerate(words)
    ]
    items = {
        "MinimalPairs": pairs,
        "MultipleChoice": choices,
        "LastWord": [{"text": story[:50].strip()} for story in stories],
    }
    for name, rows in items.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "own",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": f"{folder}/own.jsonl"}},
    }
    task |= {"validation_split": "validation", "output_type": "multiple_choice", "doc_to_text": "{{context}}"}
    task |= {"doc_to_choice": "{{choices}}", "doc_to_target": "{{answer}}", "metric_list": [{"metric": "acc"}]}
    (folder / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in choices))
    (folder / "own.yaml").write_text(json.dumps(task))
    return {
        "LMEval": ["LMEval.tasks = ['own']", f"LMEval.include_path = '{folder}'"],
        **{name: [f"{name}.paths = ['{folder}/{name}.jsonl']"] for name in items},
        **{name: [f"{name}.paths = ['{folder}/stories.txt']"] for name in ("TextLoss", "PositionLoss")},
        "Completion": ["Completion.prompts = ['the red hen', 'the old mill']", "Completion.pattern = '[aeiou]'"],
        "TextFiles": [f"TextFiles.paths = ['{folder}/stories.txt']", "TextFiles.val_fraction = 0.2"],
        "TokenizerFile": [f"TokenizerFile.path = '{folder}/tokenizer.json'"],
        "CompactVocabulary": ["CompactVocabulary.tokenizer = @Tiktoken"],
        "HubDataset": ["HubDataset.name = 'nobody/nothing'"],
        **{
            name: [f"{name}.sequences = 600", f"{name}.val_sequences = 60"]
            for name in ("AssociativeRecall", "Copy", "InductionSequences")
        },
        **{name: [f"{name}.sequences = 8"] for name in ("RecallAccuracy", "CopyAccuracy", "InductionAccuracy")},
        "WandB": ["WandB.mode = 'offline'"],
    }


@pytest.mark.parametrize("part", ALL)
@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")  # of what lm_eval imports
def test_the_conformance_report_has_no_failure(part, knobs, request):
    if part.name == "WandB":  # it keeps the mode of its first run for the life of the process
        request.addfinalizer(pytest.importorskip("wandb").teardown)
    if part.name == "LMEval":
        pytest.importorskip("lm_eval")
    bench = bench_of(part.name, knobs.get(part.name, ()))
    if part.name in ("TinyStories", "HubDataset"):
        bench.unavailable = (
            "its data is on the Hub, which tests don't use; tests/test_data.py loads local files in the same way"
        )
    found = list(run_checks(bench, slow=False))
    assert [line for line in found if line.verdict == "fail"] == []
    assert any(line.verdict == "pass" for line in found) or bench.unavailable


@pytest.mark.slow
@pytest.mark.parametrize("part", parts(*LAYERS, "loss"))
def test_the_part_compiles_into_one_graph(part, knobs):
    found = list(run_checks(bench_of(part.name), only="compiles into one graph"))
    assert [line.verdict for line in found] == ["pass"], found


# --- what takes two builds, or two parts


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


@pytest.mark.parametrize("part", parts(*LAYERS))
def test_swapping_a_part_leaves_what_the_arms_share_bit_equal(part):
    ours, theirs = tiny_gpt().state_dict(), tiny_gpt(**{part.kind: part.cls}).state_dict()
    shared = [name for name in ours if name in theirs and ours[name].shape == theirs[name].shape]
    assert "embed.weight" in shared and len(shared) > 5
    assert_same({name: ours[name] for name in shared}, {name: theirs[name] for name in shared})


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("vocab_size, dim", [(50, 32), (33, 12), (51, 6)])
@pytest.mark.parametrize("part", parts("init"))
def test_padding_the_vocabulary_leaves_the_first_rows_as_they_were(part, vocab_size, dim, tied):
    if tied and refuses_tied(part):
        pytest.skip(f"{part.name} refuses a tied output matrix")
    shape = dict(dim=dim, n_head=3 if dim % 3 == 0 else 4, position=CATALOG["NoPE"].cls, tie_embeddings=tied)
    bare = tiny_gpt(vocab_size, init=part.cls, pad_vocab_to=1, **shape)
    padded = tiny_gpt(vocab_size, init=part.cls, pad_vocab_to=64, **shape)
    ours, theirs = bare.state_dict(), padded.state_dict()
    tables = {name for name in ours if len(ours[name]) != len(theirs[name])}
    assert tables == ({"embed.weight"} if tied else {"embed.weight", "unembed.weight"})
    assert all((theirs[name][vocab_size:] == 0).all() for name in tables)
    assert_same(ours, {name: theirs[name][:vocab_size] if name in tables else theirs[name] for name in theirs})
    assert padded.padding == sum(p.numel() for p in padded.parameters()) - sum(p.numel() for p in bare.parameters())


def test_a_copy_of_a_model_drops_out_by_its_own_mode():
    model, ids = tiny_gpt(dropout=0.5), tokens(2, 13)
    quiet = copy.deepcopy(model).eval()
    assert torch.equal(quiet(ids)[0], model.eval()(ids)[0])
    model.train()
    assert torch.equal(quiet(ids)[0], quiet(ids)[0]) and not torch.equal(model(ids)[0], model(ids)[0])


# --- decoding with a cache, part by part


def decode(model: GPT, ids: torch.Tensor, chunks: list[int]) -> torch.Tensor:
    """Hidden states (B,T,C) of ids (B,T), fed through the cache in pieces of these lengths."""
    cache, start, out = model.init_cache(len(ids)), 0, []
    for chunk in ids.split(chunks, dim=1):
        out.append(model(chunk, Context(cache=cache, start=torch.tensor(start)))[0])
        start += chunk.shape[1]
    return torch.cat(out, dim=1)


MIXERS, POSITIONS, KERNELS = ([p.values[0] for p in parts(kind)] for kind in ("mixer", "position", "attention"))
PAIRS = [("mixer", mixer, position) for mixer in MIXERS for position in POSITIONS]
PAIRS += [("attention", kernel, position) for kernel in KERNELS for position in POSITIONS]
CACHED = [pytest.param(kind, part, position, id=f"{part.name}-{position.name}") for kind, part, position in PAIRS]


@pytest.mark.parametrize("kind, part, position", CACHED)
def test_decoding_with_a_cache_equals_the_full_forward_at_every_position(kind, part, position):
    if kind == "attention" and hasattr(position.cls, "score_bias") and not supports(part, "bias"):
        pytest.skip(f"{part.name} takes no score bias")
    model, ids = tiny_gpt(**{kind: part.cls}, position=position.cls).eval(), tokens(2, 32)
    if model.init_cache(2) is None:
        pytest.skip(f"{part.name} keeps no cache")
    torch.testing.assert_close(decode(model, ids, [5, 1, 7, 2, 17]), model(ids)[0], rtol=1e-4, atol=1e-4)


class Squared(nn.Module):
    """A score bias that is not linear: unlike ALiBi's, it changes when all distances are shifted."""

    def __init__(self, dim, n_head, head_dim, max_len):
        super().__init__()

    def score_bias(self, q_positions, k_positions):
        return -((q_positions[:, None] - k_positions - 3.0) ** 2).expand(4, -1, -1) / 8


def test_decoding_with_a_cache_keeps_a_score_bias_in_place():
    model, ids = tiny_gpt(position=Squared), tokens(2, 32)
    torch.testing.assert_close(decode(model, ids, [5, 1, 7, 2, 17]), model(ids)[0], rtol=1e-4, atol=1e-4)


def test_the_model_refuses_to_go_past_its_context():
    model = tiny_gpt(max_len=8)
    with pytest.raises(ValueError, match="context of 8"):
        model(tokens(1, 9))
    with pytest.raises(ValueError, match="context of 8"):
        model(tokens(1, 2), Context(cache=model.init_cache(1), start=torch.tensor(7)))


def test_the_model_refuses_streams_that_no_block_closes():
    with pytest.raises(ValueError, match="StreamsLeftOpen does not merge the streams"):
        tiny_gpt(block=StreamsLeftOpen)(tokens(1, 4))


# --- what a kernel does not support


class Bare(MathAttention):
    """A kernel that declares nothing."""

    supports = set()


BIASED = [p for p in parts("position") if hasattr(p.values[0].cls, "score_bias")]
NOT_BIAS, NOT_GQA = ([p for p in parts("attention") if not supports(p.values[0], w)] for w in ("bias", "gqa"))


@pytest.mark.parametrize("attention", [Bare, *(p.values[0].cls for p in NOT_BIAS)])
@pytest.mark.parametrize("part", BIASED)
def test_a_score_bias_is_refused_at_construction_by_a_kernel_that_can_not_add_it(part, attention):
    with pytest.raises(ValueError, match=rf"{part.name}.*{attention.__name__}.*use GPT.attention = @"):
        tiny_gpt(position=part.cls, attention=attention)
    with pytest.raises(ValueError, match=part.name):  # in one layer of two as well
        tiny_gpt(position=[RoPE, part.cls], attention=[MathAttention, attention])


@pytest.mark.parametrize("attention", [Bare, *(p.values[0].cls for p in NOT_GQA)])
def test_grouped_heads_are_refused_at_construction_by_a_kernel_without_them(attention):
    with pytest.raises(ValueError, match=rf"{attention.__name__}.*GPT.n_kv_head = 4"):
        tiny_gpt(attention=attention, n_kv_head=2)


def test_a_kernel_without_offsets_gets_no_cache():
    """Generation then computes every token again, instead of attending to the wrong keys."""
    assert tiny_gpt(attention=[MathAttention, Bare]).init_cache(1) is None


# --- schedules


@pytest.mark.parametrize("part", parts("schedule"))
def test_a_schedule_on_the_shelf_has_no_jumps(part):
    schedule = part.cls(777, **({"warmup_steps": 77} if "warmup_steps" in part.knobs else {}))
    values = [schedule(step) for step in range(777)]
    assert max(abs(after - before) for before, after in zip(values, values[1:], strict=False)) < 0.1


@pytest.mark.parametrize("steps, warmup", [(2, 0), (3, 1), (10, 3), (500, 0), (1000, 1), (1000, 998), (777, 100)])
def test_warmup_cosine_hits_the_peak_and_its_end_exactly(steps, warmup):
    for final in (0.0, 0.1, 0.3, 1.0):
        schedule = CATALOG["WarmupCosine"].cls(steps, warmup_steps=warmup, final_fraction=final)
        assert schedule(max(0, warmup - 1)) == 1.0 and schedule(warmup) == 1.0 and schedule(steps - 1) == final
