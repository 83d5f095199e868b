"""The main job: train, resume, branch, evaluate, generate; what lies in a run's folder; how a command ends."""

import json
import math
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import filelock
import pytest
import torch
from runs import arguments, command, facts, rows, small_run, weights
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import toolkit
from toolkit import evaluate, generate, run
from toolkit.loop import sampling
from toolkit.rundir.facts import peak_flops
from toolkit.store import checkpoint, journal
from toolkit.store.seal import unseal_text
from toolkit.training import Diverged

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A small run that came to its end; read, never written to."""
    runs = tmp_path_factory.mktemp("runs")
    assert small_run(runs, "straight") == 0
    return runs / "straight"


def test_a_run_leaves_what_the_contract_names(finished):
    names = {path.name for path in finished.iterdir()}
    assert names >= {"config.gin", "bindings.gin", "facts.json", "status.json", "metrics.jsonl", "samples.md"}
    assert names >= {"curve.png", "tokenizer", "checkpoints"} and any(
        n.startswith("events.out.tfevents") for n in names
    )
    assert {p.name for p in (finished / "checkpoints").iterdir()} == {"best", "step-00000008", "step-00000012"}
    for folder in (finished / "checkpoints").iterdir():
        assert {p.name for p in folder.iterdir()} == {"model.safetensors", "state.pt", "manifest.json"}
        assert checkpoint.problem(folder) is None
    status = json.loads((finished / "status.json").read_text())
    assert (status["state"], status["step"]) == ("done", 12)


def test_weights_that_break_before_a_sample_end_as_diverged(tmp_path):
    more = ("AdamW.lr = 1e36", "Experiment.clip = None", "Experiment.sample_every = 1")
    assert small_run(tmp_path, "a", bindings=more) == 3
    assert json.loads((tmp_path / "a" / "status.json").read_text())["state"] == "diverged"
    assert "the model's logits are not finite" in (tmp_path / "a" / "samples.md").read_text()


def test_metrics_have_the_names_that_others_read(finished):
    train_rows = [row for row in journal.read(finished / "metrics.jsonl") if "train/loss_nats" in row]
    keys = {"step", "tokens", "train/loss_nats", "lr", "grad_norm", "time/step_ms", "time/tokens_per_s"}
    assert [set(row) for row in train_rows] == [keys] * 12
    assert [row["tokens"] for row in train_rows] == [step * 4 * 32 for step in range(12)]
    evaluations = [row for row in rows(finished) if "val/loss_nats" in row]
    assert [row["step"] for row in evaluations] == [0, 6, 12]
    assert set(evaluations[0]) == {"step", "val/loss_nats", "val/bits_per_byte"}
    assert evaluations[2]["val/loss_nats"] < evaluations[0]["val/loss_nats"]
    # every token is a byte but the ends of documents, so bits per byte are a little over nats / ln 2
    bits, nats = evaluations[2]["val_full/bits_per_byte"], evaluations[2]["val_full/loss_nats"]
    assert 1.0 < bits * math.log(2) / nats < 1.02


def test_the_facts_are_a_receipt(finished):
    known = facts(finished)
    assert known["parameters"]["total"] == sum(v.numel() for v in weights(finished, 12).values()) - 127 * 32
    assert known["config"]["GPT.dim"] == 32 and known["config"]["Experiment.steps"] == 12
    assert known["tokens"] == 12 * 4 * 32 and known["seconds"] > 0 and known["peak_memory_bytes"] > 1e7
    assert known["attention"].startswith("FlashAttention: products over blocks of 64 queries")
    manifest = json.loads((finished / "checkpoints" / "step-00000012" / "manifest.json").read_text())
    assert known["weights_sha256"] == manifest["files"]["model.safetensors"]["sha256"]
    assert (finished / "bindings.gin").read_text().splitlines()[-1] == "warmup_steps = 2"


def test_peak_memory_is_that_of_the_process_and_not_of_what_started_it():
    told = "import torch; from toolkit.rundir.facts import peak_memory; print(peak_memory(torch.device('cpu')))"
    large = f"import subprocess, sys; kept = b'x' * 10**9; subprocess.run([sys.executable, '-c', {told!r}], check=True)"
    done = subprocess.run([sys.executable, "-c", large], cwd=ROOT, capture_output=True, text=True, check=True)
    assert 5e7 < int(done.stdout) < 8e8


def test_tensorboard_shows_scalars_text_and_each_step_once(finished):
    events = EventAccumulator(str(finished), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    assert [event.step for event in events.Scalars("train/loss_nats")] == list(range(12))
    assert [event.step for event in events.Scalars("val/loss_nats")] == [0, 6, 12]
    assert any(tag.startswith("sample") for tag in events.Tags()["tensors"])
    assert any(tag.startswith("config") for tag in events.Tags()["tensors"])


def test_a_finished_run_resumes_as_nothing(finished, capsys):
    before = (finished / "metrics.jsonl").read_bytes()
    assert small_run(finished.parent, "straight", "--resume") == 0
    assert "is done; nothing to resume" in capsys.readouterr().out
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_resume_without_files_takes_the_runs_own_config(tmp_path):
    small_run(tmp_path, "a", "--stop-at", "4")
    assert run.main(["--runs", str(tmp_path), "--name", "a", "--resume"]) == 0
    assert rows(tmp_path / "a")[-1]["step"] == 12


def test_a_run_is_repeated_from_its_saved_config(finished, tmp_path):
    assert run.main(["--base", str(finished / "config.gin"), "--runs", str(tmp_path), "--name", "again"]) == 0
    assert rows(tmp_path / "again") == rows(finished)
    saved, repeated = (unseal_text((folder / "config.gin").read_text()) for folder in (finished, tmp_path / "again"))
    assert repeated.text == saved.text and repeated.problem is saved.problem is None


def test_resuming_with_another_config_is_refused_with_the_difference(tmp_path):
    small_run(tmp_path, "a", "--stop-at", "4")
    changed = ("GPT.norm = @RMSNorm",)
    with pytest.raises(
        ValueError, match=r"(?s)another config.*--allow-change.*GPT.norm: was @LayerNorm, is now @RMSNorm"
    ):
        small_run(tmp_path, "a", "--resume", bindings=changed)
    allowed = ("Experiment.eval_windows = 7",)
    assert small_run(tmp_path, "a", "--resume", "--allow-change", bindings=allowed) == 0
    assert facts(tmp_path / "a")["resumed"] == [{"step": 4, "changed": {"Experiment.eval_windows": [10, 7]}}]


def test_a_resume_without_any_checkpoint_starts_at_0(tmp_path):
    small_run(tmp_path, "a", "--stop-at", "2")
    for folder in (tmp_path / "a" / "checkpoints").glob("step-*"):
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    assert small_run(tmp_path, "a", "--resume", "--stop-at", "3") == 0
    assert [row["step"] for row in rows(tmp_path / "a")] == [0, 0, 1, 2]


def test_a_new_run_branches_from_anothers_checkpoint(finished, tmp_path):
    source = finished / "checkpoints" / "step-00000008"
    assert small_run(tmp_path, "branch", "--from", str(source)) == 0
    assert rows(tmp_path / "branch")[-1] == rows(finished)[-1]  # weights, optimizer and step came along
    assert small_run(tmp_path, "fresh", "--from", str(source), "--weights-only", "--stop-at", "1") == 0
    first = rows(tmp_path / "fresh")[0]
    assert first["step"] == 0 and first["val/loss_nats"] < rows(finished)[0]["val/loss_nats"]
    with pytest.raises(ValueError, match="is of another architecture: .* tensors"):
        small_run(tmp_path, "wide", "--from", str(source), bindings=("GPT.dim = 64",))
    assert not (tmp_path / "wide").exists()


def test_accumulation_equals_the_large_batch(tmp_path):
    small_run(tmp_path, "large")
    small_run(tmp_path, "small", bindings=("Experiment.accumulate = 4",))
    for one, other in zip(rows(tmp_path / "large"), rows(tmp_path / "small"), strict=True):
        assert one == pytest.approx(other, rel=1e-5)


def test_two_processes_give_the_losses_of_one(finished, tmp_path):
    """Through Experiment.devices, which starts torchrun by itself."""
    bindings = ("Experiment.devices = 2", "Experiment.accumulate = 2")
    done = command("toolkit.run", *arguments(tmp_path, "two", bindings=bindings))
    assert done.returncode == 0, done.stderr
    assert facts(tmp_path / "two")["processes"] == 2
    for one, other in zip(rows(finished), rows(tmp_path / "two"), strict=True):
        assert one == pytest.approx(other, rel=1e-5)


def test_sigterm_finishes_the_step_saves_and_exits_75(tmp_path):
    bindings = ("Experiment.steps = 100_000", "Experiment.checkpoint_every = 100_000")
    args = arguments(tmp_path, "a", bindings=bindings)
    process = subprocess.Popen([sys.executable, "-m", "toolkit.run", *args], stdout=subprocess.DEVNULL)
    metrics = tmp_path / "a" / "metrics.jsonl"
    deadline = time.time() + 60
    while time.time() < deadline and not (metrics.exists() and len(metrics.read_text().splitlines()) > 5):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 75
    status = json.loads((tmp_path / "a" / "status.json").read_text())
    assert status["state"] == "preempted" and status["step"] >= 4
    saved = checkpoint.newest(tmp_path / "a" / "checkpoints")
    assert saved.name == f"step-{status['step']:08d}"


def test_numbers_gone_bad_stop_before_the_update(tmp_path, capsys):
    assert small_run(tmp_path, "a", bindings=("AdamW.lr = 1e30",)) == 3
    assert re.search(r"diverged at step \d+: loss .*, in training samples \d+ to \d+", capsys.readouterr().err)
    assert json.loads((tmp_path / "a" / "status.json").read_text())["state"] == "diverged"
    assert issubclass(Diverged, Exception)


def test_the_evaluate_command_repeats_the_runs_own_figure(finished, capsys):
    newest = finished / "checkpoints" / "step-00000012"
    assert evaluate.main([str(newest), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    final = [row for row in rows(finished) if "val_full/loss_nats" in row][0]
    assert told["loss_nats"] == pytest.approx(final["val_full/loss_nats"], rel=1e-5)
    assert told["bits_per_byte"] == pytest.approx(final["val_full/bits_per_byte"], rel=1e-5)
    assert evaluate.main([str(finished), "-p", "SyntheticStories.corpus_seed = 5"]) == 0
    assert "nats per token" in capsys.readouterr().out


def test_generation_with_a_cache_gives_the_tokens_without_it(finished):
    """Greedy and sampled, several at once, and past the context of 32, where the window slides."""
    model, tokenizer = toolkit.load(str(finished))
    ids = [int(i) for i in tokenizer.encode("Once upon")]
    for options in ({"temperature": 0}, {"num": 3, "seed": 5}, {"top_k": 5}, {"top_p": 0.9}):
        slid = []
        cached = torch.stack(list(sampling.stream(model, ids, 60, on_slide=lambda s=slid: s.append(1), **options)))
        plain = torch.stack(list(sampling.stream(model, ids, 60, cache=False, **options)))
        assert torch.equal(cached, plain) and slid == [1], options
    long = ids * 8  # a prompt beyond the context
    cached = list(sampling.stream(model, long, 5, temperature=0))
    assert cached == list(sampling.stream(model, long, 5, temperature=0, cache=False))


def test_top_k_and_top_p_leave_only_the_likeliest(finished):
    logits = torch.tensor([[4.0, 3.0, 2.0, 1.0, 0.0]]).repeat(400, 1)
    drawn = sampling._choose(logits, 1.0, 2, None, torch.Generator().manual_seed(0))
    assert set(drawn.tolist()) == {0, 1}
    drawn = sampling._choose(logits, 1.0, None, 0.7, torch.Generator().manual_seed(0))
    assert set(drawn.tolist()) == {0, 1}  # probabilities .636, .234: the second is needed to reach .7
    assert sampling._choose(logits, 0, None, None, None).unique().tolist() == [0]


def test_the_generate_command_prints_samples(finished, capsys):
    assert generate.main([str(finished), "--prompt", "Once", "--max-tokens", "20", "--num", "2"]) == 0
    out = capsys.readouterr().out
    assert "--- 1 of 2 ---\nOnce" in out and "--- 2 of 2 ---\nOnce" in out
    assert generate.main([str(finished), "--prompt", "Once", "--max-tokens", "40", "--temperature", "0"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("Once") and "the window slides" in captured.err


BAD_INPUT = {
    "--name ../x": (2, "a run's name is 1 to 120 letters"),
    "--base nowhere.gin": (2, "nowhere.gin: file not found"),
    "-p GPT.n_head=5": (2, "GPT.dim = 768 is not a multiple of GPT.n_head = 5"),
    "-p Experiment.batch_size=7 -p Experiment.accumulate=2": (
        2,
        "is not a multiple of Experiment.accumulate x devices = 2",
    ),
    "gin/position/alibi.gin -p GPT.attention=@FlashAttention": (2, "use GPT.attention = @MathAttention or @SDPA"),
    "-p Experiment.mask_documents=True": (
        2,
        "FlashAttention can't keep documents apart; use another GPT.attention, such as @MathAttention",
    ),
    "gin/data/text_files.gin -p TextFiles.paths=['no/such.txt']": (2, "no/such.txt"),
    "-p WarmupCosine.warmup_steps=100_000": (2, "set WarmupCosine.warmup_steps below 100000"),
    "-p AdamW.no_decay=['emb']": (2, "no_decay pattern 'emb' matches no parameter"),
    "--resume --name missing": (2, "run not found"),
    "--weights-only": (2, "--weights-only can only be used with --from"),
    "--import nowhere.py": (2, "Python file not found"),
}


@pytest.mark.parametrize("line", BAD_INPUT)
def test_bad_input_ends_in_its_exit_code_with_a_remedy_and_leaves_nothing(line, tmp_path):
    done = command(
        "toolkit.run", *line.split(), "--runs", str(tmp_path / "runs"), TOOLKIT_CACHE=str(tmp_path / "cache")
    )
    code, said = BAD_INPUT[line]
    assert (done.returncode, "Traceback" in done.stderr) == (code, False), done.stderr
    assert said in done.stderr
    assert not list(tmp_path.glob("runs/*"))


def test_an_existing_run_is_refused_with_a_free_name(finished):
    with pytest.raises(
        ValueError, match="already exists: continue it with --resume, or start a new run with --name straight-2"
    ):
        small_run(finished.parent, "straight")


def test_a_place_that_can_not_be_written_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OSError, match="choose another folder with --runs"):
        small_run(tmp_path / "file", "a")


def test_a_second_process_on_one_run_is_refused(tmp_path):
    small_run(tmp_path, "a", "--stop-at", "2")
    with filelock.FileLock(tmp_path / "a" / ".lock"):
        done = command("toolkit.run", *arguments(tmp_path, "a", "--resume"))
    assert done.returncode == 2 and "another process is using" in done.stderr
    assert small_run(tmp_path, "a", "--resume") == 0  # a lock file that nobody holds is no obstacle


def test_help_is_quick_and_names_every_flag():
    began = time.perf_counter()
    done = command("toolkit.run", "--help")
    assert done.returncode == 0 and time.perf_counter() - began < 5
    for flag in ("--base", "--import", "--name", "--runs", "--resume", "--allow-change", "--from", "--weights-only"):
        assert flag in done.stdout
    probe = "import sys, toolkit.run; sys.exit('torch' in sys.modules or 'gin' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", probe], check=False).returncode == 0, "help must not wait for torch"


def test_a_dry_run_needs_neither_data_nor_vocabulary_nor_network(tmp_path):
    done = command(
        "toolkit.run", "--dry-run", "--json", TOOLKIT_CACHE=str(tmp_path / "cache"), TIKTOKEN_CACHE_DIR="/dev/null"
    )
    told = json.loads(done.stdout)
    assert told["parameters"] == 161_985_792 and told["parameters_non_embedding"] == 84_973_056
    assert told["flops_per_token"] == 6 * (84_934_656 + 100_277 * 768) + 6 * 12 * 768 * 1024
    assert set(told["memory_bytes"]) == {"weights", "gradients", "optimizer", "activations"}
    assert not (tmp_path / "cache").exists()
    done = command("toolkit.run", "--dry-run", "--json", "gin/model/gpt2_vocab.gin")
    assert json.loads(done.stdout)["parameters"] == 123_570_432


def test_gins_own_spellings_work(finished, tmp_path):
    args = arguments(tmp_path, "a", "--stop-at", "1")
    args = ["--gin_param" if word == "-p" else word for word in args[1:]]
    assert run.main(["--gin_file", "gin/model/tiny.gin", *args]) == 0


def test_a_checkpoint_that_is_not_sound_is_walked_past_and_named(tmp_path, caplog):
    small_run(tmp_path, "a", "--stop-at", "8")
    broken = tmp_path / "a" / "checkpoints" / "step-00000008" / "model.safetensors"
    data = bytearray(broken.read_bytes())
    data[len(data) // 2] ^= 1
    broken.write_bytes(data)
    assert checkpoint.newest(tmp_path / "a" / "checkpoints").name == "step-00000004"
    assert "step-00000008: model.safetensors is not what was written" in caplog.text
    with pytest.raises(ValueError, match="is not what was written"):
        generate.main([str(broken.parent)])


def test_steps_are_traced_into_the_runs_folder(tmp_path):
    assert small_run(tmp_path, "a", overlays=("gin/profiler.gin",), bindings=("Experiment.profile_steps = 1",)) == 0
    (trace,) = (tmp_path / "a").glob("*.pt.trace.json")
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert {"aten::mm", "Optimizer.step#AdamW.step"} <= names
    assert {name for name in names if str(name).startswith("ProfilerStep")} == {"ProfilerStep#10"}


def test_the_share_of_the_peak_is_told_where_a_peak_is_known(finished):
    names = {"NVIDIA H100 PCIe": 756e12, "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H200": 989e12, "NVIDIA L40": None}
    assert {name: peak_flops(name, torch.bfloat16) for name in names} == names
    assert peak_flops("NVIDIA H200", torch.float32) is None
    assert facts(finished)["peak_tokens_per_s"] is None and "time/mfu" not in rows(finished)[1]
