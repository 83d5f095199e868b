"""What ``compare`` and ``ablate`` show: the answer first, an arm a line, on any terminal and for many arms."""

import io
import json
import re

import numpy as np
import pytest
from matplotlib import rc_context
from rich.cells import cell_len
from test_compare import compared, output, with_rates, write_plan

from toolkit import ablate, compare
from toolkit.ablation import display
from toolkit.ablation.jobs import JobProgress, JobQueue
from toolkit.comparison import assemble, drawing, figures, page, record, runs, screen, text
from toolkit.output.terminal import Column, Terminal, grid

LONG = "post-layernorm-with-a-name-that-nobody-wants-to-read"


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    """No pictures: they take most of the time."""
    monkeypatch.setattr(figures, "draw", lambda comparison: {})


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A plan of forty arms: a third have another number of parameters, the others another learning rate."""
    rng = np.random.default_rng(0)
    names = [f"{optimizer}-{k}" for optimizer in ("muon", "adamw", "sgd-momentum") for k in range(13)]
    arms = {
        name: {"parameters": {"total": 101_500 + i}} if i % 3 == 0 else {"config": {"AdamW.lr": 0.01}}
        for i, name in enumerate(names)
    }
    shifts = {name: float(rng.normal(0, 0.05)) for name in names}
    return write_plan(tmp_path_factory.mktemp("many"), shifts, seeds=range(3), arms=arms)


def comparison_of(folder):
    plan, found = runs.find([str(folder)], None, None)
    return assemble.compare(plan, found, (), None)


def shown(said, width, verbose=False):
    console = Terminal(file=io.StringIO(), width=width)
    screen.show(said, console, verbose)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


@pytest.mark.parametrize("width", [40, 60, 80, 100, 120])
@pytest.mark.parametrize("shifts", [{"NoPE": 0.3}, {LONG: 0.3, "b": -0.1, "c": 0.016, "x" * 60: 0.0}], ids=["two", "5"])
def test_no_word_and_no_number_is_broken(tmp_path, width, shifts):
    said = record.record(comparison_of(write_plan(tmp_path, shifts, seeds=range(3))))
    lines = shown(said, width)
    assert all(cell_len(line) <= width for line in lines)
    for arm in said["arms"]:
        assert any(line.split()[:1] == [arm["verdict"]] for line in lines)
        if arm["difference"] is not None:
            assert any(text.number(arm["difference"], "+") in line.split() for line in lines)
    table = " ".join(line for line in lines if line.startswith(("worse", " ")))
    words = [word for word in re.findall(r"[a-z]+", LONG)]
    assert LONG not in shifts or "…" in table or all(word in re.split(r"[\s-]+", table) for word in words)


def test_columns_give_way_in_their_order(tmp_path):
    said = record.record(comparison_of(with_rates(tmp_path, {"rope": 3e-3, "NoPE": 1e-2})))
    dropped = []
    for width in range(120, 20, -1):
        found = re.search(r"columns left out to fit the terminal: (.*?)  ", " ".join(shown(said, width)))
        now = found[1].split(", ") if found else []
        dropped += [title for title in now if title not in dropped]
    assert dropped == ["95% interval", "p Holm", "sd", "best lr", "n", "mean"]


def test_a_grid_keeps_what_fits_and_names_take_the_rest():
    columns = [Column("arm", name=True), Column("value", True), Column("more", True, gives_way=1)]
    for width, titles in ((60, []), (30, ["more"])):
        table, dropped = grid(columns, [["a-name-of-some-length", "1.2345", "9" * 20]], width)
        console = Terminal(file=io.StringIO(), width=width)
        console.print(table)
        assert dropped == titles and "1.2345" in console.file.getvalue()
        assert "a-name-of-some-length" in console.file.getvalue()


def test_forty_arms_are_a_sentence_and_a_line_each(many):
    said = record.record(comparison_of(many))
    counts = [sum(arm["verdict"] == word for arm in said["arms"]) for word in ("better", "worse")]
    best = min(said["arms"][1:], key=lambda arm: arm["difference"])
    assert said["headline"].startswith(f"Of 39 arms: {counts[0]} better than rope (the furthest: {best['arm']}, ")
    assert f"; {counts[1]} worse than rope (" in said["headline"] and len(said["headline"]) < 320
    for width in (80, 120):
        lines = shown(said, width)
        assert len(lines) < 70 and all(cell_len(line) <= width for line in lines)
        head = next(i for i, line in enumerate(lines) if line.startswith("verdict "))
        rows = [line.split()[1] for line in lines[head + 1 : head + 41]]
        assert rows == [arm["arm"] for arm in said["arms"]]


def test_few_arms_are_named_in_the_first_sentence(tmp_path):
    said = compared(write_plan(tmp_path, {"a": 0.3, "b": 0.3, "c": -0.1}, seeds=range(3)))
    assert said["headline"] == "c: better than rope; a, b: worse than rope."


def test_banners_that_say_the_same_of_many_arms_are_one_and_lose_nothing(many):
    said = compared(many)
    assert len(said["banners"]) == 39
    out = "\n".join(shown(said, 100))
    assert out.count("! config") == 1 and out.count("! parameters") == 1 and "2 guards fired" in out
    assert "the same for muon-2" in out and "similar, with other numbers: muon-3" in out and " and 19 more" in out
    assert "\n".join(shown(said, 100, verbose=True)).count("! config") == 26
    html, report = output(many, "compare.html"), output(many, "report.md")
    assert html.count("<details>") == 2 and all(page.html("{}", one["text"]) in html for one in said["banners"])
    guards = report[report.index("## Guards") : report.index("## Notes")]
    assert len(guards.strip().splitlines()) == 6 and "and 19 more (each in compare.html)" in guards


def test_the_answer_comes_first_and_details_when_asked_for(tmp_path, capsys):
    noisy = {f"unsure-s{seed}": {"value": value} for seed, value in enumerate((2.2, 1.9, 2.0))}
    folder = write_plan(tmp_path, {"NoPE": 0.3, "unsure": 0.0}, seeds=range(3), broken=noisy)
    compare.main([str(folder)])
    brief = capsys.readouterr().out
    assert brief.splitlines()[:2] == ["Which position encoding?", "NoPE: worse than rope; unsure: inconclusive."]
    assert brief.index("verdict ") < brief.index("no guard fired") < brief.index("--verbose")
    assert "needs n" in brief and "paired by seed" not in brief and "baseline's last loss" not in brief
    assert len(brief.splitlines()) < 20
    compare.main([str(folder), "--verbose"])
    whole = capsys.readouterr().out
    for words in ("paired by seed", "to the baseline's last loss", "rule out neither", "noise between seeds"):
        assert words in " ".join(whole.split())
    assert whole.startswith(brief[: brief.index("no guard fired")])


def test_a_long_banner_is_cut_where_nothing_more_is_asked_for(tmp_path):
    arms = {"NoPE": {"config": {f"GPT.knob_{i}": i for i in range(40)}}}
    said = compared(write_plan(tmp_path, {"NoPE": 0.3}, seeds=range(2), arms=arms))
    assert len(said["banners"][0]["text"]) > 2 * screen.MAX_BANNER_LENGTH
    lines = shown(said, 2000)
    assert all(len(line) <= screen.MAX_BANNER_LENGTH + 20 for line in lines) and any("…" in line for line in lines)
    assert any(said["banners"][0]["text"] in line for line in shown(said, 4000, verbose=True))


def test_ablate_ends_with_the_answer(many, capsys, monkeypatch, caplog):
    monkeypatch.setattr("toolkit.rundir.report.console", Terminal(width=100))
    ablate._print_verdicts(many)
    out = capsys.readouterr().out
    assert "Of 39 arms: " in out and sum(line.startswith(("better", "worse")) for line in out.splitlines()) > 5
    assert "guards fired: config, parameters" in out
    (many / "plan.json").rename(many / "plan.kept")
    try:
        (many / "plan.json").write_text("{")
        ablate._print_verdicts(many)
    finally:
        (many / "plan.kept").replace(many / "plan.json")
    assert "can't be compared: ValueError" in caplog.text


def test_the_live_table_keeps_a_line_for_a_job(monkeypatch):
    class Job:
        run, arm, seed, lr, purpose = "x-s0", LONG, 0, None, "judged"

    class Plan:
        rates, arms, jobs = None, {LONG: type("Arm", (), {"steps": 100})}, [Job]

    queue = JobQueue.__new__(JobQueue)
    queue.plan, queue.jobs, queue.launcher = Plan, [Job], type("Launcher", (), {"slots": 1})
    queue.progress = {"x-s0": JobProgress("running", 5, 2.5)}
    console = Terminal(file=io.StringIO(), width=60, height=30)
    monkeypatch.setattr("toolkit.rundir.report.console", console)
    console.print(display.table(queue))
    lines = [line.rstrip() for line in console.file.getvalue().splitlines()]
    assert len(lines) == 3 and "post" in lines[1] and "5/100" in lines[1] and "2.5000" in lines[1]


def test_a_job_whose_files_hold_other_kinds_of_value_stands_somehow(tmp_path):
    from toolkit.ablation.progress import read_progress

    folder = write_plan(tmp_path, {}, seeds=[0]) / "rope-s0"
    for status in ({"state": ["done"], "step": "x"}, {"state": "running", "step": None}, {"state": {}, "step": 1.5}):
        (folder / "status.json").write_text(json.dumps(status))
        with open(folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": "<b>", "train/loss_nats": "nan?", "time/step_ms": {}, "m": []}) + "\n")
        found = read_progress(folder, "m")
        assert isinstance(found.state, str) and isinstance(found.step, int) and found.metric is None


def test_of_many_arms_the_furthest_have_a_colour_and_a_name(many):
    comparison = comparison_of(many)
    with rc_context(drawing.STYLE):
        for make in (figures.curves, figures.flops):
            labels = [text.get_text() for text in make(comparison).legends[0].get_texts()]
            assert len(labels) == 2 + drawing.FURTHEST and labels[-1] == "31 arms nearer to the baseline"
            assert "rope (baseline)" in labels
        names = [label.get_text() for label in figures.forest(comparison).axes[0].get_yticklabels()]
    assert len(names) == 39
    distances = {arm.name: abs(arm.difference.mean) for arm in comparison.arms[1:]}
    assert set(labels) >= set(sorted(distances, key=distances.get)[-drawing.FURTHEST :])
