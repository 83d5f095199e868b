"""``compare`` on a metric of an evaluator: intervals by item, files of items that can't be used, and what each metric
can tell apart. Run folders are written here; two real ones at the end."""

import io
import json
import shutil

import numpy as np
import pytest
from runs import small_run
from test_compare import METRIC, STEPS, arm, compared, fired, output, write_plan
from test_compare_output import comparison_of

from toolkit.comparison import figures, itemwise, record, screen
from toolkit.comparison.statistics import difference
from toolkit.evaluation import itemfile
from toolkit.measures import Score, mean
from toolkit.output.terminal import Terminal
from toolkit.store import journal
from toolkit.store.disk import read_json, write_json

NAME = "eval/Own/accuracy"
ITEMS = [f"own/{k:02d}" for k in range(40)]


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    """No pictures: they take most of the time."""
    monkeypatch.setattr(figures, "draw", lambda comparison: {})


def write_items(run, values, print_="f" * 64, more=None, vouched=True):
    """Give a run folder an evaluator "Own", as a real run leaves it: items, the metric, fingerprint and digest."""
    score = mean(dict(zip(ITEMS, map(float, values), strict=True)), "fraction")
    itemfile.write(run / itemfile.FOLDER, STEPS, {"Own": {"accuracy": score, **(more or {})}})
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    written = {f"eval/Own/{name}": each.value for name, each in {"accuracy": score, **(more or {})}.items()}
    rows = [row | (written if METRIC in row else {}) for row in rows]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, change in (
        ("facts.json", {"evaluators": {"Own": print_}}),
        ("status.json", {"journal": journal.measure(run, itemfile.names(run, STEPS))} if vouched else {}),
    ):
        write_json(run / name, json.loads((run / name).read_text()) | change)


def draw(shift, of_items, seeds=3, arms=("NoPE",)):
    """{arm: (seeds, items)} of values between 0 and 1, with a random shift of each item of an arm."""
    rng = np.random.default_rng(0)
    base = rng.uniform(0.3, 0.7, size=(seeds, len(ITEMS)))
    drawn = {"rope": base}
    for name in arms:
        effect = shift + of_items * rng.normal(size=len(ITEMS))
        drawn[name] = base + effect + 0.01 * rng.normal(size=base.shape) + 0.001 * rng.normal(size=(seeds, 1))
    return drawn


def plan_of(tmp_path, drawn, **more):
    """A plan whose metric is that of the evaluator."""
    seeds = range(len(drawn["rope"]))
    shifts = {name: 0.0 for name in drawn if name != "rope"}
    folder = write_plan(tmp_path, shifts, seeds=seeds, metric=NAME, higher_is_better=True, **more)
    for name, values in drawn.items():
        for seed in seeds:
            write_items(folder / f"{name}-s{seed}", values[seed])
    return folder


def shown(said, width=100):
    console = Terminal(file=io.StringIO(), width=width)
    screen.show(said, console, verbose=True)
    return console.file.getvalue()


def recorded(folder):
    """The record of a comparison of which nothing is written."""
    return record.record(comparison_of(folder))


def notes_on_items(said):
    return [note for note in said["notes"] if "like these" in note]


def words(text):
    return " ".join(text.split())


def test_both_intervals_are_in_every_output(tmp_path):
    drawn = draw(0.05, 0.01, arms=("NoPE", "ALiBi"))
    folder = plan_of(tmp_path, drawn)
    said = compared(folder)
    expected = itemwise.itemwise(drawn["NoPE"], drawn["rope"])
    nope = arm(said, "NoPE")
    assert (nope["low"], nope["high"]) == pytest.approx((float(expected.low), float(expected.high)))
    assert (nope["low_like"], nope["high_like"]) == pytest.approx((float(expected.low_like), float(expected.high_like)))
    assert nope["items"] == 40 and nope["share_seeds"] + nope["share_items"] + nope["share_rest"] == pytest.approx(1)
    assert nope["low_like"] < nope["low"] and said["unit"] == "fraction" and not notes_on_items(said)
    by_seed = difference(drawn["NoPE"].mean(1).tolist(), drawn["rope"].mean(1).tolist(), True)
    assert nope["difference"] == pytest.approx(by_seed.mean) and nope["verdict"] == "better"  # by seeds, as ever
    assert arm(said, "rope")["items"] is None
    ends = [f"{nope[end]:+.4f}" for end in ("low", "high", "low_like", "high_like")]
    for text in (shown(said), output(folder, "report.md"), output(folder, "compare.html")):
        assert all(end in text for end in ends) and "items like these" in text
    assert "## By item" in output(folder, "report.md") and "<h2>By item</h2>" in output(folder, "compare.html")
    assert "For items like these 40, the interval is" in output(folder, "report.md")
    head, _, row, _ = output(folder, "compare.csv").splitlines()
    by_column = dict(zip(head.split(","), row.split(","), strict=True))
    assert float(by_column["low_like"]) == nope["low_like"] and by_column["items"] == "40"


@pytest.mark.parametrize("width", [80, 120])
def test_the_tables_fit_the_terminal(tmp_path, width):
    said = recorded(plan_of(tmp_path, draw(0.05, 0.3, arms=("NoPE", "a-long-name-of-an-arm-that-nobody-wants"))))
    lines = shown(said, width).splitlines()
    assert all(len(line.rstrip()) <= width for line in lines)
    head = next(line for line in lines if "these items" in line and "difference" in line)
    assert "items like these" in head and ("var: rest" in head) == (width == 120)
    head = next(line for line in lines if "arms apart" in line)
    assert all(title in head for title in ("metric", "noise sd", "finds", "largest"))


def test_a_difference_of_these_items_only_is_said_to_be_one(tmp_path, capsys):
    folder = plan_of(tmp_path, draw(0.05, 0.6))
    said = compared(folder)
    nope = arm(said, "NoPE")
    assert nope["verdict"] in ("better", "worse") and nope["low_like"] < 0 < nope["high_like"]
    note = f"NoPE: {nope['verdict']} on these 40 items, but that is not shown for items like these"
    for text in (capsys.readouterr().out, output(folder, "report.md"), output(folder, "compare.html")):
        assert note in words(text)
    few = recorded(plan_of(tmp_path / "equal", draw(0.0, 0.05), effect=0.05))
    assert arm(few, "NoPE")["verdict"] == "equivalent" and notes_on_items(few) == []
    few = recorded(plan_of(tmp_path / "unequal", draw(0.0, 0.6), effect=0.15))
    assert arm(few, "NoPE")["verdict"] == "equivalent"
    assert (
        "NoPE: equivalent on these 40 items" in notes_on_items(few)[0]
        and "is not inside ±0.15" in notes_on_items(few)[0]
    )
    assert notes_on_items(recorded(plan_of(tmp_path / "sure", draw(0.05, 0.01)))) == []


def remove(run):
    itemfile.path(run / itemfile.FOLDER, "Own", STEPS).unlink()


def flip(run):
    """One item has another value; the digest does not match."""
    file = itemfile.path(run / itemfile.FOLDER, "Own", STEPS)
    file.write_text(file.read_text().replace('"accuracy": 0.', '"accuracy": 1.', 1))


def unseal(run):
    """A run whose files nothing vouches for."""
    write_json(run / "status.json", {k: v for k, v in read_json(run / "status.json").items() if k != "journal"})


def flip_unsealed(run):
    unseal(run)
    flip(run)


def cut(run):
    unseal(run)
    file = itemfile.path(run / itemfile.FOLDER, "Own", STEPS)
    file.write_text(file.read_text()[:-30])


def twice(run):
    unseal(run)
    file = itemfile.path(run / itemfile.FOLDER, "Own", STEPS)
    file.write_text(file.read_text() + file.read_text().splitlines(keepends=True)[0])


def other_items(run):
    unseal(run)
    file = itemfile.path(run / itemfile.FOLDER, "Own", STEPS)
    file.write_text(file.read_text().replace("own/00", "own/99"))


def other_print(run):
    write_json(run / "facts.json", read_json(run / "facts.json") | {"evaluators": {"Own": "e" * 64}})


def not_finite(run):
    unseal(run)
    file = itemfile.path(run / itemfile.FOLDER, "Own", STEPS)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[3]["accuracy"] = float("nan")
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


BROKEN = {
    "missing": (remove, "no interval for items like these: NoPE-s1 has no items of Own at step 100"),
    "changed": (flip, "step-00000100.jsonl is not what was written"),
    "changed, not vouched": (flip_unsealed, "in metrics.jsonl, but the mean of its items is"),
    "cut": (cut, "step-00000100.jsonl:40: not a line of items"),
    "an item twice": (twice, "step-00000100.jsonl:41: an item must have a name of its own"),
    "other items": (other_items, "NoPE-s1 has other items than rope-s0: they differ in 2, such as own/00"),
    "another fingerprint": (other_print, "Own has other items or knobs than in the baseline's runs"),
    "not finite": (not_finite, "accuracy is not a finite number for every item"),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A plan whose items can all be used, and its record."""
    folder = plan_of(tmp_path_factory.mktemp("whole"), draw(0.05, 0.01, arms=("NoPE", "ALiBi")))
    return folder, recorded(folder)


@pytest.mark.parametrize("fault", BROKEN)
def test_items_that_can_not_be_used_are_a_note(tmp_path, whole, fault):
    folder, sound = tmp_path / "position", whole[1]
    shutil.copytree(whole[0], folder)
    change, message = BROKEN[fault]
    change(folder / "NoPE-s1")
    said = recorded(folder)
    notes = notes_on_items(said)
    assert len(notes) == 1 and notes[0].startswith("NoPE: ") and message in notes[0]
    nope, before = arm(said, "NoPE"), arm(sound, "NoPE")
    assert nope["items"] is nope["low_like"] is None
    assert all(nope[key] == before[key] for key in ("verdict", "low", "high", "p_holm"))
    assert arm(said, "ALiBi")["low_like"] == arm(sound, "ALiBi")["low_like"] is not None


def test_a_metric_that_is_no_mean_of_its_items_is_not_averaged(tmp_path):
    drawn = draw(0.05, 0.01, arms=("NoPE", "ALiBi"))
    folder = write_plan(
        tmp_path, {"NoPE": 0, "ALiBi": 0}, seeds=range(3), metric="eval/Own/ratio", higher_is_better=True
    )
    for name, values in drawn.items():
        for seed in range(3):
            ratio = Score(1.01 * values[seed].mean(), "ratio", dict(zip(ITEMS, values[seed], strict=True)))
            write_items(folder / f"{name}-s{seed}", values[seed], more={"ratio": ratio, "alone": Score(0.3, "x")})
    said = recorded(folder)
    notes = notes_on_items(said)
    assert len(notes) == 1 and notes[0].startswith("NoPE, ALiBi: ") and "no mean over items" in notes[0]
    assert arm(said, "NoPE")["verdict"] == "better" and arm(said, "NoPE")["items"] is None
    plan = json.loads((folder / "plan.json").read_text())
    (folder / "plan.json").write_text(json.dumps(plan | {"metric": "eval/Own/alone"}))
    assert any("eval/Own/alone is not measured item by item" in note for note in recorded(folder)["notes"])


def test_runs_without_items_compare_as_before(tmp_path):
    said = recorded(write_plan(tmp_path / "loss", {"NoPE": 0.3}))
    assert arm(said, "NoPE")["items"] is None and not any("items" in note for note in said["notes"])
    drawn = draw(0.05, 0.01)
    with_items = recorded(plan_of(tmp_path / "with", drawn))
    folder = plan_of(tmp_path / "without", drawn)
    for run in folder.glob("*-s*"):
        remove(run)
        (run / "evaluations" / "Own" / "units.json").unlink()
        unseal(run)
    old = recorded(folder)
    assert old["unit"] == NAME and old["headline"] == with_items["headline"] and fired(old) == fired(with_items)
    assert sum("has no items of Own" in note for note in old["notes"]) == 1
    for key in ("verdict", "difference", "low", "high", "p", "p_holm", "needs"):
        assert arm(old, "NoPE")[key] == arm(with_items, "NoPE")[key]


def test_unpaired_runs_and_single_seeds_have_no_interval_for_other_items(tmp_path):
    folder = plan_of(tmp_path / "welch", draw(0.05, 0.01), arms={"NoPE": {"commit": "fedcba98"}})
    said = recorded(folder)
    assert arm(said, "NoPE")["low_like"] is None and any("not paired by seed" in note for note in said["notes"])
    said = recorded(plan_of(tmp_path / "one", draw(0.05, 0.01, seeds=1)))
    assert arm(said, "NoPE")["low_like"] is None and arm(said, "NoPE")["items"] == 40
    assert "items like these" not in shown(said)


@pytest.mark.parametrize("metric", ["eval/", "eval/Own", "eval/../x", "eval//x", "eval/./x"])
def test_odd_names_of_metrics_are_no_paths(tmp_path, metric):
    folder = write_plan(tmp_path, {"NoPE": 0.3}, seeds=range(3), metric=metric, higher_is_better=True)
    for path in folder.glob("*/metrics.jsonl"):
        path.write_text(path.read_text().replace(METRIC, metric))
        value = json.loads(path.read_text().splitlines()[-2])[metric]
        (path.parent / "evaluations").mkdir()
        for elsewhere in (path.parent, path.parent / "evaluations"):
            rows = [json.dumps({"item": item, "x": value}) + "\n" for item in ("a", "b")]
            (elsewhere / f"step-{STEPS:08d}.jsonl").write_text("".join(rows))
    said = recorded(folder)
    assert arm(said, "NoPE")["verdict"] == "better" and any("has no items of" in note for note in said["notes"])


# ------------------------------------------------------------------------------------------------------- resolution


def of_metric(said, metric):
    return next(one for one in said["resolution"] if one["metric"] == metric)


def test_each_metric_says_what_it_can_tell_apart(tmp_path):
    """The loss tells the arms apart, the accuracy does not."""
    drawn = draw(0.0, 0.0, arms=("NoPE", "ALiBi"))
    for name in drawn:
        drawn[name] = drawn["rope"] + 0.01 * np.random.default_rng(len(name)).normal(size=drawn["rope"].shape)
    folder = write_plan(tmp_path, {"NoPE": 0.3, "ALiBi": -0.1}, seeds=range(3))
    for name, values in drawn.items():
        for seed in range(3):
            write_items(folder / f"{name}-s{seed}", values[seed])
    said = compared(folder)
    assert [one["metric"] for one in said["resolution"]] == [METRIC, "val_full/bits_per_byte", NAME]
    loss, accuracy = of_metric(said, METRIC), of_metric(said, NAME)
    assert (
        loss["tells_apart"] and loss["between"] == ["NoPE", "ALiBi"] and loss["largest"] == pytest.approx(0.4, abs=0.01)
    )
    assert (
        loss["noise_sd"] == pytest.approx(said["noise_sd"])
        and loss["items"] is None
        and loss["unit"] == "nats per token"
    )
    assert not accuracy["tells_apart"] and (accuracy["items"], accuracy["seeds"], accuracy["unit"]) == (
        40,
        3,
        "fraction",
    )
    sentence = (
        f"{NAME} tells no two of the 3 arms apart at this size (p = {accuracy['p']:.3f}; 3 seeds, 40 items): "
        f"the largest difference is {accuracy['largest']:.4f} fraction, and 3 seeds find "
        f"{accuracy['detectable']:.4f} with 80 % power."
    ).replace("0.", ".", 1)
    for text in (shown(said), output(folder, "compare.html")):
        assert sentence in words(text) and f"{METRIC} tells no two" not in text
    assert "What each metric can tell apart" in output(folder, "report.md")


def test_what_two_arms_need_is_what_the_verdict_says(tmp_path):
    """With two arms, the resolution of the metric is the verdict's own test and power."""
    said = recorded(write_plan(tmp_path, {"NoPE": 0.004}))
    own, nope = of_metric(said, METRIC), arm(said, "NoPE")
    assert (own["p"], own["detectable"]) == pytest.approx((nope["p"], nope["detectable"]))


def test_a_verdict_is_not_contradicted(tmp_path):
    """An arm better than the baseline, but not by the test over all pairs: the table says so."""
    noise = {name: np.random.default_rng(k).normal(size=3) for k, name in enumerate("abcdef")}
    values = {f"{name}-s{seed}": {"value": 2 + 0.1 * n[seed]} for name, n in noise.items() for seed in range(3)}
    values |= {f"rope-s{seed}": {"value": 2 + 0.1 * seed} for seed in range(3)}
    values |= {f"good-s{seed}": {"value": 1.7 + 0.1 * seed + 0.022 * (-1) ** seed} for seed in range(3)}
    said = recorded(write_plan(tmp_path, dict.fromkeys(["good", *noise], 0.0), seeds=range(3), broken=values))
    own = of_metric(said, METRIC)
    assert arm(said, "good")["verdict"] == "better" and own["p"] > 0.05 and own["by_verdict"]
    assert "by verdict" in shown(said, 120) and "the verdicts tell arms from the baseline" in words(shown(said, 120))


def test_identical_arms_and_lost_runs_do_not_count(tmp_path):
    broken = {"lost-s0": {"state": "diverged"}, "lost-s1": {"state": "diverged"}, "lost-s2": {"state": "diverged"}}
    folder = write_plan(tmp_path, {"again": 0.0, "NoPE": 0.3, "lost": 0.1}, seeds=range(3), broken=broken)
    for seed in range(3):
        source, target = folder / f"rope-s{seed}", folder / f"again-s{seed}"
        for name in ("metrics.jsonl", "facts.json"):
            (target / name).write_text((source / name).read_text())
    said = recorded(folder)
    assert arm(said, "again")["verdict"] == "identical" and of_metric(said, METRIC)["arms"] == 2


def test_one_seed_tests_nothing(tmp_path):
    said = recorded(write_plan(tmp_path, {"NoPE": 0.3}, seeds=[0]))
    own = of_metric(said, METRIC)
    assert own["tells_apart"] is own["p"] is own["detectable"] is None and own["largest"] == pytest.approx(
        0.3, abs=0.01
    )
    assert f"{METRIC} is not tested: the test needs two seeds in each arm (1 seeds)." in words(shown(said, 120))


# -------------------------------------------------------------------------------------------------------- real runs


def test_real_runs_are_compared_item_by_item(tmp_path):
    folder, jobs = tmp_path / "plan", []
    for name, dim in (("narrow", 16), ("wide", 32)):
        for seed in range(2):
            bindings = (f"GPT.dim = {dim}", f"Experiment.seed = {seed}", "Experiment.final_evaluators = [@Induction]")
            bindings += ("Induction.length = 8", "Induction.sequences = 5")
            assert small_run(folder, f"{name}-s{seed}", bindings=bindings) == 0
            jobs.append({"arm": name, "seed": seed, "run": f"{name}-s{seed}"})
    plan = {
        "name": "plan",
        "baseline": "narrow",
        "arms": {"narrow": {}, "wide": {}},
        "jobs": jobs,
        "factor": ["GPT.dim"],
    }
    write_json(folder / "plan.json", plan | {"metric": "eval/Induction/nats_second_half", "higher_is_better": False})
    assert "evaluations/Induction/step-00000012.jsonl" in read_json(folder / "wide-s1" / "status.json")["journal"]
    said = recorded(folder)
    wide, own = arm(said, "wide"), of_metric(said, said["metric"])
    assert wide["items"] == own["items"] == 5 and said["unit"] == own["unit"] == "nats/token"
    assert wide["low_like"] <= wide["low"] < wide["high"] <= wide["high_like"]
    assert not any("like these" in note for note in said["notes"])
