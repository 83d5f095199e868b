"""TOOLKIT_CPU: every part computes the same with the CPU room and without it, and "plain" uses nothing of the room."""

import collections
import re
from pathlib import Path

import pytest
import torch
from runs import arguments, command, facts, small_run

from toolkit.compose import compose
from toolkit.context import Context
from toolkit.cpu import allocator, blockwise, cores, openmp, products, rotation, switch, tiles
from toolkit.experiment import build

ROOT = Path(__file__).parent.parent
KINDS = ("attention", "block", "ffn", "init", "loss", "mixer", "model", "norm", "position")
SIZES = ("tiny", "check", "small", "gpt2_vocab")  # these overlays change nothing but sizes
OVERLAYS = [path for kind in KINDS for path in sorted((ROOT / "gin" / kind).glob("*.gin")) if path.stem not in SIZES]
OVERLAYS = [pytest.param(str(path.relative_to(ROOT)), id=f"{path.parent.name}/{path.stem}") for path in OVERLAYS]
TOLERANCE = 1e-5  # of the largest value of a tensor in any layer: the same sum can nearly cancel in one of them
ROOM = (  # the functions that do the room's work
    (blockwise, "_forward"),
    (products, "_few_rows"),
    (products, "_multiply"),
    (rotation, "_rotated"),
    (cores, "_place_threads"),
    (openmp, "_run_second_team"),
)


@pytest.fixture
def every_product(monkeypatch):
    """All matrix products use the room's code, whatever their size and the processor."""
    monkeypatch.setattr(products, "ONEDNN", hasattr(torch.ops.mkldnn, "_linear_pointwise"))
    monkeypatch.setattr(products, "SMALLEST", 1)
    monkeypatch.setattr(products, "LIGHT", 0)


@pytest.fixture
def plain(monkeypatch):
    """A function that switches the room off. From then on, a call of the room's functions is an error."""

    def refuse(*arguments, **keywords):
        raise AssertionError("the CPU room was used although it is switched off")

    def switch_off():
        monkeypatch.setattr(switch, "FAST", False)
        for module, name in ROOM:
            assert callable(getattr(module, name))
            monkeypatch.setattr(module, name, refuse)

    return switch_off


def computed(*overlays: str) -> dict[str, torch.Tensor]:
    """Loss and gradients of one batch, and the logits of a token that is decoded after others with a cache."""
    config, _ = compose(["gin/model/tiny.gin", *overlays], ["Experiment.seq_len = 96"])
    parts = build(config.build(), torch.device("cpu"))
    ids = torch.randint(97, 122, (3, 97), generator=torch.Generator().manual_seed(5))
    torch.manual_seed(7)
    objective, nats, count, _ = parts.objective(ids[:, :-1], ids[:, 1:])
    objective.backward()
    results = {"objective": objective.detach() / count, "nats": nats / count}
    results |= {name: p.grad for name, p in parts.objective.named_parameters() if p.grad is not None}
    with torch.no_grad():
        parts.model.eval()
        caches = parts.model.init_cache(1)
        for start, end in ((0, 5), (5, 6)) if caches else ((0, 6),):
            context = Context(cache=caches, start=torch.tensor(start), end=end) if caches else Context()
            hidden, head = parts.model(ids[:1, start:end], context)
        results["logits"] = head.logits(hidden)[:, -1]
    return results


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_part_computes_the_same_with_and_without_the_room(overlay, every_product, plain):
    fast = computed(overlay)
    plain()
    without = computed(overlay)
    assert fast.keys() == without.keys() and len(fast) >= 12
    layers = {name: re.sub(r"\.\d+\.", ".*.", name) for name in without}
    largest = collections.defaultdict(float)
    for name, expected in without.items():
        largest[layers[name]] = max(largest[layers[name]], expected.abs().max().item())
    for name, expected in without.items():
        error = (fast[name] - expected).abs().max().item()
        assert error <= TOLERANCE * largest[layers[name]], name


def test_the_default_uses_the_room_unless_it_is_switched_off(every_product, plain, monkeypatch):
    used = []
    for module, name in ROOM[:4]:
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, _f=function, _n=name, **k: (used.append(_n), _f(*a, **k))[1])
    fast = computed()
    assert set(used) == {name for _, name in ROOM[:4]}
    plain()
    assert any((fast[name] != without).any() for name, without in computed().items())


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_compiled_model_computes_the_same_without_the_room(every_product, plain):
    results = []
    for switch_off in (lambda: None, plain):
        switch_off()
        torch.compiler.reset()
        parts = build(compose(["gin/model/tiny.gin"])[0].build(), torch.device("cpu"))
        ids = torch.randint(97, 122, (2, 97), generator=torch.Generator().manual_seed(5))
        objective, *_ = torch.compile(parts.objective, backend="aot_eager", fullgraph=True)(ids[:, :-1], ids[:, 1:])
        objective.backward()
        results.append([objective.detach(), *(p.grad for p in parts.objective.parameters())])
    for fast, without in zip(*results, strict=True):
        assert (fast - without).abs().max() < TOLERANCE * without.abs().max()


def test_plain_leaves_memory_and_threads_to_pytorch(plain):
    plain()
    assert not allocator.keep_freed_memory() and not tiles._tiled(torch.zeros(1)) and "short" not in openmp.in_force()
    spin, few = openmp.ShortSpin(), cores.FewCores()
    spin.hold(), few.hold(1)
    assert not spin.held and not few.held


@pytest.mark.parametrize("chosen", [None, "fast", "plain"])
def test_the_facts_of_a_run_tell_which_it_was(chosen, tmp_path):
    environment = {} if chosen is None else {switch.VARIABLE: chosen}
    done = command("toolkit.run", *arguments(tmp_path, "run", bindings=("Experiment.steps = 3",)), **environment)
    assert done.returncode == 0, done.stderr
    assert facts(tmp_path / "run")["cpu"] == (chosen or "fast")
    if chosen == "plain":
        assert facts(tmp_path / "run")["attention"].startswith("FlashAttention: PyTorch")


def test_a_run_that_resumes_under_another_choice_says_so(tmp_path, monkeypatch, caplog):
    for chosen, stop in (("plain", "4"), ("fast", "6"), ("fast", "8"), ("plain", "10")):
        monkeypatch.setenv(switch.VARIABLE, chosen)
        small_run(tmp_path, "run", "--stop-at", stop, *([] if stop == "4" else ["--resume"]))
    assert facts(tmp_path / "run")["cpu"] == "plain, fast from step 4, plain from step 8"
    warnings = [message for message in caplog.messages if switch.VARIABLE in message]
    assert len(warnings) == 2 and "was trained with TOOLKIT_CPU=plain and continues with fast" in warnings[0]


def test_another_word_is_refused_in_one_line(tmp_path):
    refused = command("toolkit.run", *arguments(tmp_path, "run"), **{switch.VARIABLE: "slow"})
    assert refused.returncode == 2 and "Traceback" not in refused.stderr
    assert "TOOLKIT_CPU is 'slow'; write fast or plain, or unset it" in refused.stderr
    assert not list(tmp_path.iterdir())


def test_every_file_of_the_room_obeys_the_switch():
    for path in (ROOT / "toolkit" / "cpu").glob("*.py"):
        text = path.read_text(encoding="utf-8")
        obeys = "switch.FAST" in text or path.stem in ("__init__", "switch")
        assert obeys or path.stem == "neighbours", path  # neighbours decides when; openmp and cores then act
