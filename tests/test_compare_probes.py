"""``compare --probes`` on run folders that are written here, and probes.html of a run."""

import json
import re
import shutil

import numpy as np
import pytest
from rich.cells import cell_len
from runs import small_run
from test_compare import write_plan

from toolkit import compare
from toolkit.comparison import board, figures
from toolkit.probed import drawing
from toolkit.probed.rows import Key, model_order, parse, place, read
from toolkit.rundir import probes

MODULES = ["embed", *(f"blocks.{i}{part}" for i in range(3) for part in ("", ".mixer", ".ffn")), "norm"]


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    """No other pictures: they take most of the time."""
    monkeypatch.setattr(figures, "draw", lambda comparison: {})
    monkeypatch.setattr(board, "write", lambda comparison, folder: None)


def add_probes(run, rng, factor=None, modules=MODULES, noise=0.05, steps=range(0, 101, 10), more=None):
    """Append rows of probes to a run. ``factor(step, module)`` multiplies the rms."""
    with open(run / "metrics.jsonl", "a") as file:
        for step in steps:
            row = {"step": step, "probe/LogitScale/rms": float(np.exp(noise * rng.normal()))}
            for module in modules:
                value = np.exp(noise * rng.normal()) * (factor(step, module) if factor else 1.0)
                row[f"probe/Activations/rms/{module}"] = float(value)
                row[f"probe/Activations/kurtosis/{module}"] = float(3 + 0.1 * rng.normal())
            file.write(json.dumps(row | (more or {})) + "\n")


def plan_with_probes(root, n=5, paired_noise=True, **arms):
    """A plan with the arms rope, broken (from step 30 on, the rms of blocks.1.ffn is doubled) and same."""
    folder = write_plan(root, {"broken": 0.1, "same": 0.0}, seeds=range(n))
    rng = np.random.default_rng(1)
    for run in sorted(folder.glob("*-s*")):
        arm = run.name.split("-")[0]
        options = {"factor": (lambda s, m: 2.0 if s >= 30 and m == "blocks.1.ffn" else 1.0)} if arm == "broken" else {}
        add_probes(run, rng, **options | arms.get(arm, {}))
    return folder


def probes_of(folder, capsys, *more, code=0):
    capsys.readouterr()
    assert compare.main([str(folder), "--probes", "--json", *more]) == code
    return json.loads(capsys.readouterr().out)["probes"]


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    return plan_with_probes(tmp_path_factory.mktemp("probes"))


def test_the_planted_change_is_located_and_the_same_arm_is_silent(plan, capsys):
    record = probes_of(plan, capsys)
    assert record["alpha"] == 0.025  # two arms share the plan's alpha
    broken, same = record["arms"]
    cell = broken["first"][0]
    assert (cell["step"], cell["probe"], cell["statistic"], cell["module"]) == (
        30,
        "Activations",
        "rms",
        "blocks.1.ffn",
    )
    assert cell["arm_mean"] == pytest.approx(2 * cell["baseline_mean"], rel=0.1) and cell["size_sd"] > 5
    assert broken["paired"] and broken["origin"] is None and broken["seeds"] == 5 and broken["cells"] == 11 * 23
    assert same["first"] == [] and same["count"] == 0 and not same["notes"]
    assert broken["steps"] == list(range(0, 101, 10))


def test_every_output_says_it_and_without_the_flag_nothing_changes(plan, capsys, tmp_path):
    def outputs(*flags):
        compare.main([str(plan), "--out", str(tmp_path / "out"), *flags])
        return {path.name: path.read_text() for path in (tmp_path / "out").iterdir() if path.is_file()}

    before = outputs()
    assert "probes.html" not in before and "probes" not in json.loads(before["compare.json"])
    capsys.readouterr()
    with_probes = outputs("--probes")
    out = " ".join(capsys.readouterr().out.split())
    sentence = "broken: changed first at step 30 in blocks.1.ffn: Activations/rms is "
    assert sentence in out and "same: no change beyond the noise of 5 seeds in 253 values (steps 0 to 100)." in out
    assert all(sentence in with_probes[name] for name in ("report.md", "compare.html", "probes.html"))
    page = with_probes["probes.html"]
    assert page.count("<image") == 2 * (2 * 5 + 1) and page.count("<polyline") == 2 and 'class="mark"' in page
    assert 'href="probes.html"' in with_probes["compare.html"]
    assert "<script" not in page and not re.search(r'(src|href)="(?!data:)', page)
    (tmp_path / "out" / "probes.html").unlink()
    assert outputs() == before


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_table_fits_the_terminal(plan, capsys, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    compare.main([str(plan), "--probes", "--verbose"])
    lines = capsys.readouterr().out.splitlines()
    assert all(cell_len(line) <= width for line in lines if "compare.html" not in line)
    row = next(line for line in lines if line.split()[:2] == ["broken", "30"])
    assert "blocks.1.ffn" in row and "Activations/rms" in row and re.search(r"\+\d+\.\d", row)


def test_arms_with_other_modules_are_compared_where_they_agree(tmp_path, capsys):
    options = {"modules": [*MODULES, "blocks.3", "blocks.3.gate"], "more": {"probe/Own/share": 1.0}}
    broken = probes_of(plan_with_probes(tmp_path, broken=options), capsys)["arms"][0]
    assert (broken["only_in_arm"], broken["only_in_baseline"]) == (5, 0) and broken["cells"] == 253
    compare.main([str(tmp_path / "position"), "--probes"])
    assert "5 statistics of modules are only in this arm, 0 only in the baseline" in " ".join(
        capsys.readouterr().out.split()
    )


def test_equal_runs_and_where_their_bits_part(tmp_path, capsys):
    def same_noise(run):
        return np.random.default_rng(int(run.name[-1]))

    folder = write_plan(tmp_path, {"broken": 0.1, "same": 0.0}, seeds=range(3))
    for run in folder.glob("*-s*"):
        sign = 1 - 2 * (int(run.name[-1]) % 2)
        changed = {"factor": lambda s, m, sign=sign: 1 + 0.001 * sign if m[:8] in ("blocks.1", "blocks.2") else 1.0}
        add_probes(run, same_noise(run), **changed if run.name.startswith("broken") else {})
    broken, same = probes_of(folder, capsys)["arms"]
    assert (broken["origin"]["module"], broken["origin"]["step"], broken["first"]) == ("blocks.1.mixer", 0, [])
    assert same["cells"] == 0 and same["equal_cells"] == 253
    compare.main([str(folder), "--probes"])
    out = " ".join(capsys.readouterr().out.split())
    assert (
        "broken: changed first at step 0 in blocks.1.mixer: " in out
        and "equal to the last bit. No value differs" in out
    )
    assert "same: every value is equal to the baseline's (253 values, steps 0 to 100)." in out


def test_one_seed_gives_no_verdict(tmp_path, capsys):
    record = probes_of(plan_with_probes(tmp_path, n=1), capsys)["arms"][0]
    assert record["first"] == [] and record["cells"] == 0 and "one seed can't tell" in record["notes"][0]
    compare.main([str(tmp_path / "position"), "--probes"])
    assert "broken: no verdict, since one seed can't tell a change from noise." in " ".join(
        capsys.readouterr().out.split()
    )


def test_a_short_run_damaged_rows_and_values_that_are_not_finite(tmp_path, capsys):
    folder = plan_with_probes(tmp_path, same={"more": {"probe/Activations/rms/norm": float("nan")}})
    short = folder / "broken-s1" / "metrics.jsonl"
    lines = short.read_text().splitlines()
    lines = [line for line in lines if "probe/" not in line or json.loads(line)["step"] < 40]
    short.write_text("\n".join([*lines, '{"step": 50, "probe/Activations/rms/nor']) + "\n")
    with open(folder / "broken-s2" / "metrics.jsonl", "a") as file:
        for value in ('"text"', "null", "true", "1e999", "1" * 400, "[1]", "{}"):
            file.write(f'{{"step": 100, "probe/Activations/rms/embed": {value}}}\n')
        file.write('{"step": 100, "probe/": 1, "probe/x": 2, "probe//y": 3}\n')
    broken, same = probes_of(folder, capsys)["arms"]
    assert broken["first"][0]["module"] == "blocks.1.ffn" and broken["first"][0]["step"] == 30
    assert "broken-s1" in " ".join(broken["notes"]) and "not finite" in " ".join(broken["notes"])
    assert "Activations/rms/norm" in " ".join(same["notes"]) and same["first"] == []


def test_runs_without_rows_of_probes_are_named_with_what_to_write(tmp_path, capsys):
    folder = write_plan(tmp_path, {"broken": 0.1}, seeds=range(2))
    with pytest.raises(ValueError, match="no run of the baseline rope has rows of probes; .*gin/probe/all.gin"):
        compare.main([str(folder), "--probes"])
    for run in folder.glob("rope-*"):
        add_probes(run, np.random.default_rng(0))
    with pytest.raises(ValueError, match="beside those of rope has rows of probes"):
        compare.main([str(folder), "--probes"])
    assert not (folder / "compare").exists()
    add_probes(folder / "broken-s0", np.random.default_rng(0))
    record = probes_of(folder, capsys)["arms"][0]
    assert any("broken-s1" in note for note in record["notes"])


def test_names_from_a_stranger_are_text_in_every_output(tmp_path, capsys):
    evil = "<script>alert(1)</script>|`x`\x1b[31m"
    folder = plan_with_probes(tmp_path, **{arm: {"modules": [evil, "b"]} for arm in ("rope", "broken", "same")})
    for run in folder.glob("broken-*"):
        add_probes(run, np.random.default_rng(int(run.name[-1])), modules=[evil, "b"], factor=lambda s, m: 9.0)
    compare.main([str(folder), "--probes"])
    assert "\x1b[31m" not in capsys.readouterr().out
    for name in ("probes.html", "compare.html", "report.md"):
        text = (folder / "compare" / name).read_text()
        assert not re.search(r"(?<!\\)<script", text) and "\x1b" not in text and "alert(1)" in text
    page = probes.draw(folder / "broken-s0").read_text()
    assert "<script" not in page and "alert(1)" in page


def test_metric_names_and_the_order_of_the_model():
    assert parse("probe/deep-Activations/rms/blocks.3.ffn") == Key("deep-Activations", "rms", "blocks.3.ffn")
    assert parse("probe/LogitScale/rms") == Key("LogitScale", "rms", "") and parse("val/loss_nats") is None
    assert parse("probe/x") is None and parse("probe/a/b/c/d") == Key("a", "b", "c/d")
    names = ["embed", "blocks.0", "blocks.0.mixer", "blocks.0.ffn", "blocks.10.ffn", "blocks.2.mixer", "norm", ""]
    order = model_order(names)
    assert sorted(names, key=order.get) == [
        *("embed", "blocks.0.mixer", "blocks.0.ffn", "blocks.0", "blocks.2.mixer", "blocks.10.ffn", "norm", "")
    ]
    assert place("blocks.3.experts.2.up") == ("blocks.*.experts.2.up", 3) and place("norm") == ("norm", None)


def test_a_later_row_of_a_step_counts_and_gaps_are_nan():
    rows = [{"step": 5, "probe/a/b": 1.0}, {"step": 0, "probe/a/c/m": 2.0}, {"step": 5, "probe/a/b": 3}]
    table = read(rows)
    assert table.steps == (0, 5) and table.keys == (Key("a", "b"), Key("a", "c", "m"))
    assert np.array_equal(table.values, [[np.nan, 2.0], [3.0, np.nan]], equal_nan=True)


def test_the_map_shows_the_values(monkeypatch):
    """The image is decoded again: rows are layers, columns steps, dark is small, bright large, no value is clear."""
    import base64
    import io

    from matplotlib.image import imread

    values = np.array([[0.0, 1.0, 2.0], [3.0, np.nan, 4.0]])
    svg = drawing.depth_map("rms <b>", values, [0, 10, 20], [0, 1])
    image = imread(io.BytesIO(base64.b64decode(re.search(r"base64,([^\"]+)", svg)[1])))
    assert image.shape == (2, 3, 4) and image[1, 1, 3] == 0 and image[0, 0, 3] == 1
    assert image[0, 0, :3] == pytest.approx(np.array(drawing.VIRIDIS[0]) / 255)
    assert image[1, 2, :3] == pytest.approx(np.array(drawing.VIRIDIS[-1]) / 255)
    assert "rms &lt;b&gt;" in svg and "<b>" not in svg and ">4</text>" in svg and "step 0" in svg
    svg = drawing.difference_map("x", np.array([[-10.0, 0.0, 5.0]]), [0, 1, 2], [0], 10.0)
    image = imread(io.BytesIO(base64.b64decode(re.search(r"base64,([^\"]+)", svg)[1])))
    assert image[0, :, 3] == pytest.approx([1, 0, 0.5], abs=0.01) and image[0, 0, 2] > image[0, 0, 0] and "-10.0" in svg


def test_a_large_run_gives_a_small_page(tmp_path):
    modules = [f"blocks.{i}.{part}" for i in range(12) for part in "abcdefgh"]
    (tmp_path / "run").mkdir()
    add_probes(tmp_path / "run", np.random.default_rng(0), modules=modules, steps=range(0, 30_000, 50))
    page = probes.draw(tmp_path / "run")
    assert page.stat().st_size < 1_000_000 and page.read_text().count("<image") == 2 * 16


@pytest.mark.parametrize("rows", ["", '{"step": 1, "probe/a/b": null}\n', '{"step": 3, "train/loss_nats": 1}\n'])
def test_without_rows_of_probes_there_is_no_page(tmp_path, rows):
    (tmp_path / "metrics.jsonl").write_text(rows)
    assert probes.draw(tmp_path) is None and not (tmp_path / "probes.html").exists()


def test_a_run_ends_with_its_page_and_resuming_a_finished_run_draws_it_again(tmp_path, capsys):
    more = ("Experiment.probe_every = 5",)
    assert small_run(tmp_path, "probed", overlays=("gin/probe/activations.gin",), bindings=more) == 0
    page = tmp_path / "probed" / "probes.html"
    assert "Activations at 4 steps, 0 to 11" in page.read_text() and f"probes: {page}" in capsys.readouterr().out
    (tmp_path / "probed" / "curve.png").unlink()
    first = page.read_bytes()
    page.unlink()
    from toolkit import run

    assert run.main(["--runs", str(tmp_path), "--name", "probed", "--resume"]) == 0
    assert page.read_bytes() == first and (tmp_path / "probed" / "curve.png").is_file()
    assert small_run(tmp_path, "bare") == 0
    assert not (tmp_path / "bare" / "probes.html").exists()
    shutil.rmtree(tmp_path / "probed")
