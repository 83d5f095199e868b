"""The command ``convert``: models go out to transformers and come in from it, and each result is proven or not kept."""

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from exchanged import CASES, VOCAB, our_run, rope, their_config, their_folder, their_model
from runs import small_run
from safetensors.torch import load_file, save_file
from test_layout import imports

from toolkit import compare, convert, evaluate, generate, run
from toolkit.architectures import ARCHITECTURES, Rule
from toolkit.command import run_command
from toolkit.compose import open_run
from toolkit.exchange import fresh, incoming, library, outgoing, proof

ROOT = Path(__file__).parent.parent
BEST = Path("checkpoints") / "best"
NUMBERED = [pytest.param(*case, id=f"{case[0]}-{number}") for number, case in enumerate(CASES)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of the toolkit's default parts, small."""
    runs = tmp_path_factory.mktemp("trained")
    small_run(runs, "a")
    return runs / "a"


@pytest.fixture
def theirs(tmp_path):
    """A small Llama in a folder."""
    return their_folder(tmp_path / "theirs", their_config("llama", {}))


@pytest.fixture
def here(monkeypatch):
    """transformers loads folders in this process."""
    monkeypatch.setattr(proof, "measure_fresh", proof.measure_here)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def exit_code(*words: str, capsys) -> tuple[int, str]:
    """The exit code of the command, run in this process, and what it says on standard error."""
    with pytest.raises(SystemExit) as caught:
        run_command(lambda: convert.main(list(words)))
    return caught.value.code, capsys.readouterr().err


def flags(*bindings: str) -> list[str]:
    return [word for binding in bindings for word in ("-p", binding)]


def test_a_run_goes_out_and_comes_in_again_with_the_same_weights(trained, tmp_path, capsys):
    """The whole command, with transformers in processes of its own."""
    assert convert.main([str(trained), "--to", "hf", "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "as stablelm, in float32" in said and "24 of 24 greedy tokens equal" in said
    written = {path.name for path in (tmp_path / "out").iterdir()}
    tokenizer_files = {"tokenizer.json", "tokenizer_config.json"}
    assert written == {"config.json", "generation_config.json", "model.safetensors", "README.md"} | tokenizer_files
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| data | SyntheticStories (" in card and "GPT.dim = 32" in card and "val/loss_nats" in card
    again = ["--from", "hf", "--name", "b", "--runs", str(tmp_path / "runs")]
    assert convert.main([str(tmp_path / "out"), *again]) == 0
    folder = tmp_path / "runs" / "b"
    ours = weights_of(trained / BEST)
    back = weights_of(folder / "checkpoints" / "step-00000000")
    assert ours.keys() == back.keys()
    assert [name for name in ours if not torch.equal(ours[name], back[name])] == []
    assert "GPT.block = @PreNorm" in (folder / "bindings.gin").read_text()


def test_a_run_that_came_in_generates_evaluates_and_trains_on(here, theirs, tmp_path, capsys):
    runs, folder = tmp_path / "runs", tmp_path / "runs" / "a"
    assert convert.main([str(theirs), "--from", "hf", "--name", "a", "--runs", str(runs)]) == 0
    assert generate.main([str(folder), "--max-tokens", "3"]) == 0
    stories = [
        "Experiment.data = @SyntheticStories",
        "SyntheticStories.stories = 40",
        "SyntheticStories.val_stories = 5",
    ]
    assert evaluate.main([str(folder), *flags(*stories)]) == 0
    short = ["WarmupCosine.warmup_steps = 1", "Experiment.steps = 2", "Experiment.eval_windows = 2"]
    train = ["--base", str(folder / "config.gin"), *flags(*stories, *short), "--runs", str(runs), "--from", str(folder)]
    assert run.main([*train, "--name", "b"]) == 0
    with pytest.raises(ValueError, match="of another architecture"):
        run.main([*train, "--name", "c", "-p", "GPT.block = @Sandwich", "--weights-only"])
    assert run.main([*train, "--name", "d", "-p", "GPT.position = @NoPE", "--weights-only"]) == 0  # another part
    capsys.readouterr()


@pytest.mark.slow
def test_the_ablation_of_a_pretrained_model_on_the_page_runs(here, theirs, tmp_path, monkeypatch, capsys):
    """The commands of docs/exchange.md, with a small random Llama, three steps and two seeds."""
    page = (ROOT / "docs" / "exchange.md").read_text(encoding="utf-8")
    section = page.partition("### An ablation of a pretrained model")[2].partition("\n### ")[0]
    tune, script = re.findall(r"```\n(.*?)```", section, re.DOTALL)[:2]
    for long, short in {"steps = 300": "steps = 3", "every = 100": "every = 3", "steps = 20": "steps = 1"}.items():
        assert long in tune
        tune = tune.replace(long, short)
    more = ["SyntheticStories.stories = 40", "SyntheticStories.val_stories = 5", "Experiment.eval_windows = 2"]
    (tmp_path / "tune.gin").write_text(tune + "\n".join(more) + "\n")
    monkeypatch.chdir(tmp_path)
    commands = {"convert": convert.main, "run": run.main, "compare": compare.main}
    ran = []
    for line in script.splitlines():
        line = line.replace("HuggingFaceTB/SmolLM2-135M", str(theirs)).replace("--seq-len 512", "--seq-len 16")
        line = line.replace("gin/norm/", f"{ROOT}/gin/norm/")
        for seed in "01" if "$seed" in line else "0":
            words = shlex.split(line.replace("$seed", seed))
            if words[:2] == ["python", "-m"]:
                name = words[2].removeprefix("toolkit.")
                assert commands[name](words[3:]) == 0, line
                ran.append(name)
    assert ran == ["convert", *["run"] * 4, "compare"]
    shown = capsys.readouterr().out
    assert "layernorm" in shown and "started from" in shown


def test_rows_of_the_vocabulary_without_an_id_are_kept_as_padding(here, tmp_path):
    config = their_config("llama", dict(vocab_size=300))
    model = their_model(config)
    result = incoming.bring_in(str(their_folder(tmp_path / "theirs", config, model)), tmp_path, "a")
    embedded = weights_of(result.folder / "checkpoints" / "step-00000000")["embed.weight"]
    assert torch.equal(embedded, model.model.embed_tokens.weight)
    out = outgoing.export(open_run(result.folder, device="cpu"), tmp_path / "out")
    assert torch.equal(weights_of(out.folder)["model.embed_tokens.weight"], embedded[:VOCAB])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_types_are_proven_twice_and_large_models_are_sharded(dtype, trained, here, tmp_path, monkeypatch):
    monkeypatch.setattr(outgoing, "SHARD", "40KB")
    result = outgoing.export(open_run(trained, device="cpu"), tmp_path / "out", dtype)
    assert result.proofs.keys() == {"float32", dtype}
    assert result.proofs["float32"].largest < 1e-5 < result.proofs[dtype].largest < proof.HALF_TOLERANCE[dtype]
    shards = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(shards) > 1 and (tmp_path / "out" / "model.safetensors.index.json").is_file()
    assert {tensor.dtype for shard in shards for tensor in load_file(shard).values()} == {getattr(torch, dtype)}
    again = incoming.bring_in(str(tmp_path / "out"), tmp_path, "a").folder
    once, before = (weights_of(folder) for folder in (again / "checkpoints" / "step-00000000", trained / BEST))
    assert [
        name for name in before if not torch.equal(once[name], before[name].to(getattr(torch, dtype)).float())
    ] == []


def test_a_wrong_result_ends_with_exit_code_2_and_leaves_nothing(trained, here, tmp_path, capsys, monkeypatch):
    folder = their_folder(tmp_path / "theirs", their_config("stablelm", rope(1.0)))
    names = {"k_proj": "v_proj", "v_proj": "k_proj"}

    def exchanged(rule):
        for name, other in names.items():
            if isinstance(rule, Rule) and name in rule.theirs:
                return replace(rule, theirs=rule.theirs.replace(name, other))
        return rule

    cls = type(ARCHITECTURES["stablelm"])
    rules = cls.rules
    monkeypatch.setattr(cls, "rules", lambda self, config: [exchanged(rule) for rule in rules(self, config)])
    code, said = exit_code(str(trained), "--to", "hf", "--out", str(tmp_path / "out"), capsys=capsys)
    assert code == 2 and "the largest difference of logits is" in said
    assert list(tmp_path.iterdir()) == [folder]
    come_in = ("--from", "hf", "--name", "a", "--runs", str(tmp_path / "runs"))
    code, said = exit_code(str(folder), *come_in, capsys=capsys)
    assert code == 2 and "the run was deleted" in said and not (tmp_path / "runs" / "a").exists()


def test_a_model_without_an_architecture_lists_the_conditions_that_fail(trained, here, tmp_path, capsys):
    config = their_config("llama", {})
    arms = "GPT.block = @PostNorm", "GPT.attention = @SigmoidAttention"
    with pytest.raises(ValueError) as caught:
        outgoing.export(our_run(config, their_model(config), *arms), tmp_path / "out", tokenizer=False)
    said = str(caught.value)
    assert "llama: GPT.block is @PostNorm(), but must be @PreNorm()" in said
    assert "llama: GPT.attention is @SigmoidAttention(), but must be @FlashAttention() or" in said
    assert "others, with the number of conditions that fail: " in said
    words = str(trained), "--to", "hf", "--out", str(tmp_path / "out"), "--architecture", "gpt2"
    code, said = exit_code(*words, capsys=capsys)
    assert code == 2 and "gpt2: GPT.position is @RoPE(), but must be @Learned()" in said


# --- bad input


def edit(folder: Path, **entries) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def change_weights(folder: Path, change) -> None:
    values = weights_of(folder)
    change(values)
    save_file(values, folder / "model.safetensors", {"format": "pt"})


def fewer_rows(folder: Path) -> None:
    edit(folder, vocab_size=250)
    names = ("model.embed_tokens.weight", "lm_head.weight")
    change_weights(folder, lambda values: values.update({name: values[name][:250].clone() for name in names}))


def lie_about_the_size(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header[NORM]["shape"] = [10**10]
    changed = json.dumps(header).encode()
    path.write_bytes(len(changed).to_bytes(8, "little") + changed + content[end:])


def index(folder: Path, shard: str) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))


def link_out(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "elsewhere")
    (folder / "model.safetensors").symlink_to(folder.parent / "elsewhere")


DYNAMIC = dict(rope_type="dynamic", rope_theta=1e4, factor=8.0)
NORM = "model.norm.weight"
BAD_FOLDERS = {
    "no config": (lambda f: (f / "config.json").unlink(), "config.json can't be read"),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json can't be read"),
    "no model type": (lambda f: edit(f, model_type=None), "has no model_type"),
    "unknown type": (lambda f: edit(f, model_type="olmo2"), "'olmo2' has no mapping; known are .* nearest is"),
    "unknown activation": (lambda f: edit(f, hidden_act="mish"), "llama: the activation 'mish': it must be one of"),
    "a number as type": (lambda f: edit(f, model_type=3), "model_type is 3, but must be a string"),
    "odd added tokens": (lambda f: (f / "tokenizer.json").write_text('{"added_tokens": 5}'), "added_tokens must be a"),
    "no heads": (lambda f: edit(f, num_attention_heads=0), "refuses the config of a llama"),
    "no channels": (lambda f: edit(f, model_type="stablelm", hidden_size=0), "hidden_size is 0, but must be a whole"),
    "heads that do not fit": (
        lambda f: edit(f, model_type="stablelm", num_attention_heads=5),
        "stablelm: |can't build",
    ),
    "dynamic RoPE": (
        lambda f: edit(f, rope_parameters=DYNAMIC),
        "'dynamic': it must be default, linear, yarn or",
    ),
    "missing tensor": (lambda f: change_weights(f, lambda v: v.pop(NORM)), f"{NORM} is missing"),
    "surplus tensor": (lambda f: change_weights(f, lambda v: v.update(extra=torch.ones(2))), "extra is surplus"),
    "another shape": (lambda f: change_weights(f, lambda v: v.update({NORM: torch.ones(5)})), "norm.weight"),
    "broken file": (lambda f: (f / "model.safetensors").write_bytes(b"\0" * 50), "model.safetensors can't be read"),
    "a header that lies": (lie_about_the_size, "its header does not fit its length"),
    "too many layers": (lambda f: edit(f, num_hidden_layers=10**9), "num_hidden_layers is 1000000000, but the weights"),
    "too many channels": (lambda f: edit(f, hidden_size=10**10), "hidden_size is 10000000000, but the weights"),
    "a wide ffn": (lambda f: edit(f, intermediate_size=10**10), "describes a model of 1,440.* numbers, but the"),
    "too long a context": (lambda f: edit(f, max_position_embeddings=10**9), "give --seq-len 1048576 or less"),
    "a shard elsewhere": (
        lambda f: index(f, "../../x.safetensors"),
        "file of a is '../../x.safetensors', but must be the name of a file in",
    ),
    "a shard by its path": (lambda f: index(f, str(f / "model.safetensors")), "but must be the name of a file in"),
    "a link that leads out": (link_out, "is a link to .*, outside the folder"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has no weights"),
    "pickled weights": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        "only pickled weights, which can run code .* --pickle reads them as weights only",
    ),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer.json"),
    "fewer rows than ids": (fewer_rows, "has ids up to 256, but the model only has 250 rows"),
}


def test_a_folders_own_settings_for_generation_do_not_change_the_proof(theirs, tmp_path, here):
    """Qwen's folders have a repetition penalty."""
    (theirs / "generation_config.json").write_text('{"repetition_penalty": 5.0, "min_new_tokens": 3}')
    incoming.bring_in(str(theirs), tmp_path / "runs", "a")


def test_until_the_proof_has_passed_there_is_no_run_under_the_name(theirs, tmp_path, here, monkeypatch):
    """So a killed process leaves no run that looks proven, and another process's run of this name is not deleted."""
    runs = tmp_path / "runs"

    def begin_another(*arguments):
        assert not (runs / "a").exists()
        (runs / "a" / "checkpoints").mkdir(parents=True)
        return proof.measure_here(*arguments)

    monkeypatch.setattr(proof, "measure_fresh", begin_another)
    (runs / ".a.tmp-1" / "a").mkdir(parents=True)  # of a killed process
    with pytest.raises(ValueError, match="a already exists; choose another --name"):
        incoming.bring_in(str(theirs), runs, "a")
    assert [path.name for path in runs.iterdir()] == ["a"] and (runs / "a" / "checkpoints").is_dir()


def test_the_card_of_a_model_that_came_in_names_no_training_data(theirs, tmp_path, here):
    incoming.bring_in(str(theirs), tmp_path / "runs", "a")
    outgoing.export(open_run(tmp_path / "runs" / "a", device="cpu"), tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    card = text[: text.index("## Config")]
    assert "not trained here" in card and "TinyStories" not in card and "trained with" not in card


def test_the_list_of_architectures_fits_the_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert convert.main(["--list"]) == 0
    assert max(len(line) for line in capsys.readouterr().out.splitlines()) <= 80


@pytest.mark.parametrize("bad", BAD_FOLDERS)
def test_a_folder_that_can_not_come_in_is_refused_with_the_reason(bad, theirs, tmp_path, here):
    spoil, message = BAD_FOLDERS[bad]
    spoil(theirs)
    with pytest.raises(ValueError, match=message):
        incoming.bring_in(str(theirs), tmp_path / "runs", "a")
    assert not (tmp_path / "runs" / "a").exists()


def test_the_links_of_a_hub_cache_are_followed(theirs, tmp_path, here):
    """snapshots/COMMIT/NAME is a link to blobs/DIGEST."""
    snapshot, blobs = tmp_path / "models--a" / "snapshots" / "c0", tmp_path / "models--a" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(theirs.iterdir())):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(Path("..") / ".." / "blobs" / str(number))
    incoming.bring_in(str(snapshot), tmp_path / "runs", "a")


def test_what_is_written_can_be_read_by_whom_the_umask_says(trained, tmp_path, here):
    """The library safetensors writes through a temporary file that only its owner may read."""
    outgoing.export(open_run(trained, device="cpu"), tmp_path / "out")
    (tmp_path / "new").touch()
    files = [path for folder in (trained, tmp_path / "out") for path in folder.rglob("*") if path.is_file()]
    assert {"model.safetensors", "state.pt", "config.json", "config.gin"} <= {path.name for path in files}
    expected = (tmp_path / "new").stat().st_mode
    assert [path for path in files if path.stat().st_mode != expected] == []


def test_the_nearest_architecture_is_named_with_what_differs(theirs, tmp_path):
    edit(theirs, model_type="gemma3_text", query_pre_attn_scalar=8, sliding_window=5)
    with pytest.raises(ValueError, match=r"The nearest is gemma2\n  it has no .*"):
        incoming.bring_in(str(theirs), tmp_path / "runs", "a")


class Evil:
    """Runs code when it is read from a pickle."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_pickled_weights_come_in_when_asked_for_and_run_no_code(theirs, tmp_path, here):
    executed, values = tmp_path / "executed", weights_of(theirs)
    (theirs / "model.safetensors").unlink()
    torch.save(values | {"evil": Evil(str(executed))}, theirs / "pytorch_model.bin")
    with pytest.raises(ValueError, match="can't load the weights"):
        incoming.bring_in(str(theirs), tmp_path / "runs", "a", pickle=True)
    assert not executed.exists()
    torch.save(values, theirs / "pytorch_model.bin")
    assert incoming.bring_in(str(theirs), tmp_path / "runs", "a", pickle=True).proof.problem is None


def test_code_in_a_folder_is_never_executed(theirs, tmp_path, here):
    executed = tmp_path / "executed"
    (theirs / "modeling_evil.py").write_text(f"import os\nos.mkdir({str(executed)!r})\nclass Evil: pass\n")
    edit(theirs, auto_map={"AutoConfig": "modeling_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"})
    about = json.loads((theirs / "tokenizer_config.json").read_text())
    about["auto_map"] = {"AutoTokenizer": ["modeling_evil.Evil", "modeling_evil.Evil"]}
    (theirs / "tokenizer_config.json").write_text(json.dumps(about))
    incoming.bring_in(str(theirs), tmp_path / "runs", "a")
    edit(theirs, model_type="evil")
    with pytest.raises(ValueError, match="'evil' has no mapping"):
        incoming.bring_in(str(theirs), tmp_path / "runs", "b")
    assert not executed.exists()


def test_bad_commands_are_refused(trained, theirs, tmp_path, capsys):
    taken, out = str(theirs), str(tmp_path / "out")
    for words, message in (
        ((str(trained), "--to", "hf", "--out", taken), "already exists"),
        ((str(tmp_path), "--to", "hf", "--out", out), "neither a run"),
        (("no/such/place", "--from", "hf", "--name", "a"), "is no folder"),
        ((taken, "--from", "hf", "--name", "../a"), "a run's name is"),
        ((str(trained), "--to", "hf", "--out", out, "--architecture", "x"), "it has no mapping"),
        ((str(trained), "--to", "hf", "--out", "."), "is no name of a new folder"),
        ((str(trained), "--to", "hf", "--out", f"{taken}/config.json/x"), "config.json, which is no folder"),
    ):
        code, said = exit_code(*words, capsys=capsys)
        assert code == 2 and message in said, said
    without_effect = (
        (taken, "--to", "hf", "--out", out, "--pickle"),
        (taken, "--from", "hf", "--name", "a", "--out", out),
    )
    incomplete = ((), (taken, "--to", "hf"), (taken, "--from", "hf"), (taken, "--from", "hf", "--to", "hf"))
    for words in (*incomplete, *without_effect):
        with pytest.raises(SystemExit) as caught:
            convert.main(list(words))
        assert caught.value.code == 2


def test_a_name_on_the_hub_is_downloaded_without_code_and_a_failure_says_why(theirs, tmp_path, here, monkeypatch):
    import huggingface_hub

    asked = []

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        if name == "some/gated":
            raise OSError("401 Client Error\nand more")
        return str(theirs)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    result = incoming.bring_in("some/model", tmp_path / "runs", "a")
    assert json.loads((result.folder / "facts.json").read_text())["from"] == "some/model"
    assert asked == [("some/model", ["*.json", "*.safetensors", "*.safetensors.index.json"])]
    with pytest.raises(ValueError, match="some/gated is no folder, and the Hub can't send it: 401 Client Error$"):
        incoming.bring_in("some/gated", tmp_path / "runs", "b")


def test_a_shorter_context_is_taken_unless_the_positions_are_learned(theirs, tmp_path, here):
    result = incoming.bring_in(str(theirs), tmp_path / "runs", "a", seq_len=10)
    assert open_run(result.folder).model.max_len == 10
    learned = their_folder(tmp_path / "learned", their_config("gpt2", {}))
    with pytest.raises(ValueError, match="positions.0.table.weight takes .*: the sizes do not fit"):
        incoming.bring_in(str(learned), tmp_path / "runs", "b", seq_len=10)


def test_without_transformers_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setattr(library.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"python -m pip install .*\[hf\]"):
        library.require()


def test_help_imports_nothing_heavy():
    code = "import sys; from toolkit import convert as c\ntry: c.main(['-h'])\nfinally: print('MODULES', *sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    text, _, modules = done.stdout.partition("MODULES")
    assert "--from" in text and not {"torch", "transformers", "gin"} & set(modules.split())


def test_the_fresh_process_imports_nothing_of_ours():
    imported = {name.split(".")[0] for name in imports(Path(fresh.__file__))}
    assert "transformers" in imported and not imported & {"toolkit", "components"}


OWN = """
from components.architecture import Llama
from toolkit.architectures import architecture


@architecture
class Helium(Llama):
    "A mapping in a file of one's own."

    model_type = "helium"
"""


def test_a_file_of_ones_own_adds_an_architecture(tmp_path, monkeypatch, capsys):
    (tmp_path / "own_mapping.py").write_text(OWN)
    try:
        assert convert.main(["--list", "--import", str(tmp_path / "own_mapping.py")]) == 0
        assert "helium       A mapping in a file of one's own." in capsys.readouterr().out
    finally:
        ARCHITECTURES.pop("helium", None)


@pytest.mark.slow
@pytest.mark.parametrize("model_type, entries", NUMBERED)
def test_a_folder_comes_in_and_goes_out_with_the_same_weights(model_type, entries, tmp_path, here):
    """Their folder -> run -> folder. The library's tokenizer class of qwen2 gives other ids to any file but Qwen's."""
    config = their_config(model_type, entries)
    model = their_model(config)
    result = incoming.bring_in(str(their_folder(tmp_path / "theirs", config, model)), tmp_path, "a")
    opened = open_run(result.folder, device="cpu")
    out = outgoing.export(opened, tmp_path / "out", only=model_type, tokenizer=model_type != "qwen2")
    assert out.model_type == model_type
    loaded = library.tensors_of(library.model_class(config).from_pretrained(out.folder))
    for name, tensor in library.tensors_of(model).items():
        assert torch.equal(loaded[name], tensor[: len(loaded[name])]), name
