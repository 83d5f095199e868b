"""Every overlay under gin/: it changes what it says, and a run of 30 steps with it learns. Layers that differ."""

import functools
import json
import math
import re
from pathlib import Path

import pytest
import torch
from runs import facts, rows, small_run

from toolkit.compose import compose
from toolkit.registry import CATALOG

ROOT = Path(__file__).parent.parent
SIZES = [("model", name) for name in ("tiny", "check", "small", "gpt2_vocab")]  # bases of other runs rather than parts
OVERLAYS = sorted(
    path.relative_to(ROOT) for path in ROOT.glob("gin/*/*.gin") if (path.parent.name, path.stem) not in SIZES
)
OVERLAYS = [pytest.param(str(path), id=f"{path.parent.name}/{path.stem}") for path in OVERLAYS]
LAYERS = ("block", "mixer", "position", "attention", "norm", "ffn")
SHORT = ["Experiment.steps = 30", "Experiment.batch_size = 8", "Experiment.eval_every = 30", "GPT.dim = 64"]
SHORT += ["Experiment.sample_every = 30", "Experiment.checkpoint_every = 30", "warmup_steps = 5"]
SHORT += ["Experiment.seq_len = 64", "Experiment.log_every = 1"]


@functools.cache
def default():
    return compose()[0].flat


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_is_short_and_fits_the_default_and_tiny(overlay):
    text = (ROOT / overlay).read_text(encoding="utf-8")
    assert text.startswith("#") or len(text.splitlines()) == 1
    assert compose([overlay])[0].flat != default()
    compose(["gin/model/tiny.gin", overlay])


def knobs(overlay, tmp_path):
    """What an overlay needs beyond itself to run here: its files, and no network."""
    if overlay.endswith("tokenizer/file.gin"):
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers

        learnt = Tokenizer(models.BPE())
        learnt.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        learnt.train_from_iterator(["the old hen ran home"] * 9, trainers.BpeTrainer(initial_alphabet=alphabet))
        learnt.save(str(tmp_path / "tokenizer.json"))
        return [f"TokenizerFile.path = '{tmp_path}/tokenizer.json'"]
    if overlay.endswith("lm_eval.gin"):
        pytest.importorskip("lm_eval")
        (tmp_path / "own.jsonl").write_text('{"context": "The hen", "answer": "runs."}\n')
        task = {"task": "own", "dataset_path": "json", "output_type": "loglikelihood", "validation_split": "validation"}
        task |= {"dataset_kwargs": {"data_files": {"validation": f"{tmp_path}/own.jsonl"}}}
        task |= {"doc_to_text": "{{context}}", "doc_to_target": " {{answer}}", "metric_list": [{"metric": "acc"}]}
        (tmp_path / "own.yaml").write_text(json.dumps(task))
        return ["LMEval.tasks = ['own']", f"LMEval.include_path = '{tmp_path}'"]
    if overlay.endswith(("text_files.gin", "hub_dataset.gin", "shakespeare.gin")):
        pytest.skip("needs data that tests don't fetch; tests/test_data.py reads local files the same way")
    if overlay.endswith("wandb.gin"):
        pytest.importorskip("wandb")
        return ["WandB.mode = 'offline'"]
    return ["BPE.vocab_size = 512"] if overlay.endswith("bpe.gin") else []


@pytest.mark.slow
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_thirty_steps_with_the_overlay_learn(overlay, tmp_path, record_property):
    options = {
        "warmup": "one_cycle" not in overlay,
        "stories": not overlay.startswith("gin/data/") or "synth" in overlay,
    }
    bindings = (*SHORT, *knobs(overlay, tmp_path))
    before = torch.get_num_threads()
    assert small_run(tmp_path, "run", overlays=(overlay,), bindings=bindings, **options) == 0
    torch.set_num_threads(before)
    found = rows(tmp_path / "run")
    losses = [row["train/loss_nats"] for row in found if "train/loss_nats" in row]
    judged = [row["val/loss_nats"] for row in found if "val/loss_nats" in row]
    assert len(losses) == 30 and all(map(math.isfinite, losses + judged))
    assert judged[-1] < judged[0] and sum(losses[-3:]) < sum(losses[:3])
    config = facts(tmp_path / "run")["config"]
    for name in re.findall(r"@(?:\w+/)?(\w+)", (ROOT / overlay).read_text(encoding="utf-8")):
        assert name in CATALOG and any(
            f"@{name}" in str(value) or f"/{name}" in str(value) for value in config.values()
        )
    record_property("overlay", (overlay, judged[0], judged[-1]))


# --- layers that differ


OTHER = {
    "block": ("[@PreNorm, @a/LayerScale]", {"a/LayerScale.initial": "0.25"}, ("LayerScale", "mixer_gain", 0.25)),
    "mixer": (
        "[@SelfAttention, @a/ShortConvolution]",
        {"a/ShortConvolution.width": "3"},
        ("ShortConvolution", "width", 3),
    ),
    "position": ("[@RoPE, @a/RoPE]", {"a/RoPE.theta": "500.0"}, ("RoPE", "theta", 500.0)),
    "attention": ("[@SDPA, @a/SlidingWindow]", {"a/SlidingWindow.window": "7"}, ("SlidingWindow", "window", 7)),
    "norm": ("[@LayerNorm, @a/RMSNorm]", {"a/RMSNorm.eps": "0.5"}, ("RMSNorm", "eps", 0.5)),
    "ffn": ("[@SwiGLU, @a/GELU, @a/SwiGLU]", {"a/GELU.hidden": "24", "a/SwiGLU.hidden": "16"}, ("GELU", "hidden", 24)),
}


@pytest.mark.parametrize("slot", LAYERS)
def test_layers_differ_by_a_tiled_list_with_scopes_that_config_gin_keeps(slot, tmp_path):
    listed, scoped, (name, knob, value) = OTHER[slot]
    bindings = [f"GPT.{slot} = {listed}", *(f"{key} = {text}" for key, text in scoped.items())]
    config, _ = compose(["gin/model/check.gin"], [*bindings, "GPT.n_layer = 5"])
    torch.manual_seed(0)
    model = config.build().model(50, 32)
    (tmp_path / "config.gin").write_text(config.text)
    again, _ = compose(base=tmp_path / "config.gin")
    assert again.flat == config.flat and again.text == config.text
    torch.manual_seed(0)
    rebuilt = again.build().model(50, 32)
    assert {n: v.shape for n, v in rebuilt.state_dict().items()} == {n: v.shape for n, v in model.state_dict().items()}
    assert all(torch.equal(v, model.state_dict()[n]) for n, v in rebuilt.state_dict().items())

    def held(model):
        """What stands in the slot, layer by layer."""
        for block in model.blocks:
            yield {
                "block": block,
                "mixer": block.mixer,
                "attention": getattr(block.mixer, "attention", None),
                "position": model.positions[getattr(block.mixer, "position", 0)],
                "norm": block.mixer_norm,
                "ffn": block.ffn,
            }[slot]

    written = re.findall(r"@(?:a/)?(\w+)", listed)
    for built in (model, rebuilt):
        parts = list(held(built))
        assert [type(part).__name__ for part in parts] == [written[i % len(written)] for i in range(5)]
        for index, part in enumerate(parts):
            if index % len(written) == 1:
                found = part.up.out_features if knob == "hidden" else getattr(part, knob)
                assert (found == value).all() if torch.is_tensor(found) else found == value
            elif type(part).__name__ == name and slot == "position":
                assert part.theta == 10_000.0  # the scope reaches its own part alone
    model(torch.zeros(1, 8, dtype=torch.int64))
