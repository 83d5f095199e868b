"""Verdicts on tables that anybody wrote: published comparisons come out as published, bad tables are refused by line,
nothing that a table does not know is called checked, and what it says is text in every output."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from test_untrusted_text import FORBIDDEN, MARKS, assert_clean_page, assert_clean_report

from toolkit import compare
from toolkit.comparison import assemble, figures, origin, tables

ROOT = Path(__file__).parent.parent
VALUES = {"base": [2.01, 2.03, 2.00, 2.02, 2.04], "wide": [1.91, 1.92, 1.91, 1.93, 1.92]}


@pytest.fixture(autouse=True)
def here(request, tmp_path, monkeypatch):
    """In an empty folder, where the report goes; pictures only in the tests that look at them."""
    monkeypatch.chdir(tmp_path)
    if "pictures" not in request.fixturenames:
        monkeypatch.setattr(figures, "draw", lambda comparison: {})


@pytest.fixture
def pictures():
    """Asked for by a test of the pictures."""


def csv_of(values, seeds=True, name="t.csv"):
    """A CSV file with a row for each run."""
    rows = ["arm,seed,loss" if seeds else "arm,loss"]
    rows += [
        f"{arm},{seed},{x!r}" if seeds else f"{arm},{x!r}" for arm, xs in values.items() for seed, x in enumerate(xs)
    ]
    Path(name).write_text("\n".join(rows) + "\n", encoding="utf-8")
    return name


def compared(*words, code=0):
    """What compare.json says of a table."""
    assert compare.main(["--table", *map(str, words)]) == code
    return json.loads(Path("compare/compare.json").read_text())


def arm(said, name):
    return next(each for each in said["arms"] if each["arm"] == name)


def standardised(n, mean, sd):
    """n values with exactly this mean and sd: a t test depends on nothing else of them."""
    x = np.arange(n) - (n - 1) / 2
    return (mean + sd * x / x.std(ddof=1)).tolist()


# ---- published comparisons


PR_1967 = [1.05764, 1.05886, 1.05904, 1.05674]  # seeds 42, 0, 1234, and 42 again by somebody else


@pytest.mark.parametrize(
    "values, t, df",
    [(standardised(4, 1.05807, 0.00103), 4.19, 6.09), (PR_1967, 4.06, 5.84)],
    ids=["its summary", "its four values"],
)
def test_welch_of_parameter_golf_1967(values, t, df, capsys):
    """https://github.com/openai/parameter-golf/pull/1967, comment of 2026-04-30: four values with mean 1.05807 and sd
    .00103 against PR 1855 (n 6, mean 1.060755, sd .000933; its values are not given, and the test needs no more). It
    says t = 4.29, df about 6.0 and one-sided p about .0026. Its formula sqrt(.00103^2 / 4 + .000933^2 / 6) is .000641
    and not .000627 as it says, so t is 4.19; and the sd of its four values is .00108, so t is 4.06. The answer is the
    same. Seed 42 was run twice, so no column of seeds is named."""
    said = compared(
        csv_of({"PR1855": standardised(6, 1.060755, 0.000933), "PR1967": values}, seeds=False), "--metric", "loss"
    )
    one = arm(said, "PR1967")
    plan, runs = tables.read(Path("t.csv"), tables.Columns("arm", "loss"), None, None, None, [])
    (difference,) = [each.difference for each in assemble.compare(plan, runs, (), None).arms if each.difference]
    assert one["verdict"] == "better" and one["paired"] is False
    assert -one["difference"] == pytest.approx(0.00269, abs=6e-6)
    assert difference.df == pytest.approx(df, abs=0.005)
    assert stats.t.isf(one["p"] / 2, difference.df) == pytest.approx(t, abs=0.005)
    assert t == pytest.approx(4.29, abs=0.24) and df == pytest.approx(6.0, abs=0.2)  # as published, within its slips
    assert "no guard could be checked" in capsys.readouterr().out


SIGMA = 0.0013  # assumed known by the rule
TRACK_3 = {
    6: (3375, 3.2788, 20),
    8: (3250, 3.2778, 10),
    11: (3225, 3.2785, 16),
    12: (3325, 3.2790, 20),
    13: (3210, 3.2785, 10),
}


def rule(new, old):
    """modded-nanogpt, records/track_3_optimization/README.md, "Pairwise statistical significance": a difference of
    100 steps is worth .0045; significant from .004 on, which is a one-sided z test at p < .001."""
    (steps, loss, n), (old_steps, old_loss, old_n) = TRACK_3[new], TRACK_3[old]
    return (old_loss - loss + (old_steps - steps) / 100 * 0.0045) / (1 / n + 1 / old_n) ** 0.5


@pytest.mark.parametrize(
    "new, old, published, significant", [(12, 6, 0.00648, True), (13, 8, None, False), (13, 11, 0.00167, False)]
)
def test_the_rule_of_track_3_of_modded_nanogpt(new, old, published, significant):
    """The rule's answers, and the same answers from a table of runs with the published n and mean, the sd of the rule
    as sample sd, and the worth of the steps taken off the loss. (Its README computes #13 against #8 with n = 16, which
    is that of #11; with 10 and 10 runs the rule gives .0025 in place of .0027.)"""
    left = rule(new, old)
    assert published is None or left == pytest.approx(published, abs=6e-6)
    assert (left >= 0.004) == significant
    worth = (TRACK_3[old][0] - TRACK_3[new][0]) / 100 * 0.0045
    values = {
        f"#{old}": standardised(TRACK_3[old][2], TRACK_3[old][1], SIGMA),
        f"#{new}": standardised(TRACK_3[new][2], TRACK_3[new][1] - worth, SIGMA),
    }
    one = arm(compared(csv_of(values, seeds=False), "--metric", "loss"), f"#{new}")
    assert (one["difference"] < 0 and one["p"] / 2 < 0.001) == significant


# ---- what a table means


def test_seeds_are_paired_and_effects_are_only_those_that_were_named(capsys):
    name = csv_of(
        VALUES | {"same": [x + d for x, d in zip(VALUES["base"], (1e-4, -1e-4, 2e-4, 0.0, -1e-4), strict=True)]}
    )
    said = compared(name, "--metric", "loss", "--seed", "seed")
    assert [each["verdict"] for each in said["arms"]] == ["baseline", "better", "inconclusive"]
    assert arm(said, "wide")["paired"] and "is not known" in arm(said, "wide")["pairing"]
    assert arm(said, "same")["needs"] is None and said["effect"] is None and arm(said, "same")["p_equivalence"] is None
    out = capsys.readouterr().out
    assert "±" not in out and "no --effect" in out
    said = compared(name, "--metric", "loss", "--seed", "seed", "--effect", "0.02")
    assert [each["verdict"] for each in said["arms"]] == ["baseline", "better", "equivalent"]
    assert compared(name, "--metric", "loss")["arms"][1]["paired"] is False


def test_a_table_gives_what_its_numbers_give_in_run_folders(tmp_path):
    from test_compare import write_plan

    folder = write_plan(tmp_path / "x", {"NoPE": 0.3, "ALiBi": 0.004})
    assert compare.main([str(folder)]) == 0
    ours = json.loads((folder / "compare/compare.json").read_text())
    values = {each["arm"]: [run["value"] for run in ours["runs"] if run["arm"] == each["arm"]] for each in ours["arms"]}
    theirs = compared(csv_of(values), "--metric", "loss", "--seed", "seed", "--effect", "0.02")
    same = (
        "verdict",
        "n",
        "mean",
        "sd",
        "difference",
        "low",
        "high",
        "p",
        "p_holm",
        "p_equivalence",
        "correlation",
        "needs",
    )
    for one, other in zip(ours["arms"], theirs["arms"], strict=True):
        assert {key: one[key] for key in same} == {key: other[key] for key in same}


def test_a_metric_whose_direction_nobody_knows_is_refused():
    Path("t.csv").write_text("arm,acc\na,.5\na,.6\nb,.9\nb,.91\n")
    with pytest.raises(ValueError, match="lower better, or higher"):
        compared("t.csv", "--metric", "acc")
    assert arm(compared("t.csv", "--metric", "acc", "--higher-is-better"), "b")["difference"] > 0
    assert compared("t.csv", "--metric", "acc", "--lower-is-better")["lower_is_better"] is not False


def test_json_lines_with_nested_keys_and_rows_of_several_kinds():
    lines = [{"run": "x", "note": [1]}]
    lines = [
        {"setup": {"arm": a, "seed": s}, "m": {"val/loss": x}} for a, xs in VALUES.items() for s, x in enumerate(xs)
    ]
    Path("t.jsonl").write_text("".join(json.dumps(each) + "\n\n" for each in lines), encoding="utf-8-sig")
    said = compared("t.jsonl", "--arm", "setup.arm", "--seed", "setup.seed", "--metric", "m.val/loss")
    assert arm(said, "wide")["verdict"] == "better" and arm(said, "wide")["n"] == 5


def test_the_last_step_counts_and_a_run_that_ends_early_did_not_finish(pictures):
    rows = ["arm,seed,step,loss"]
    for name, values in VALUES.items():
        for seed, value in enumerate(values):
            last = 80 if (name, seed) == ("wide", 1) else 100
            rows += [f"{name},{seed},{step},{value + (100 - step) / 50!r}" for step in range(last, -1, -20)]
            rows += [f"{name},{seed},120,"]
    Path("t.csv").write_text("\n".join(rows))
    said = compared("t.csv", "--metric", "loss", "--seed", "seed", "--step", "step")
    assert arm(said, "base")["mean"] == pytest.approx(np.mean(VALUES["base"]))
    assert arm(said, "wide")["losses"] == "1 of 5 unfinished" and arm(said, "wide")["n"] == 4
    assert any("last value is at step 80 of 100" in run["reason"] for run in said["runs"])
    assert Path("compare/curves.png").stat().st_size > 10_000 and said["banners"] == []


def test_arms_that_end_at_different_steps_fire_a_guard():
    rows = [
        f"{name},{seed},{10 if name == 'base' else 20},{x}" for name, xs in VALUES.items() for seed, x in enumerate(xs)
    ]
    Path("t.csv").write_text("\n".join(["arm,seed,step,loss", *rows]))
    words = ("t.csv", "--metric", "loss", "--seed", "seed", "--step", "step")
    assert [each["guard"] for each in compared(*words)["banners"]] == ["budget"]
    compared(*words, "--strict", code=1)


def test_nan_is_diverged_and_empty_is_unfinished():
    Path("t.csv").write_text("arm,seed,loss\na,0,1.0\na,1,1.1\na,2,1.05\nb,0,nan\nb,1,.8\nb,2,.81\nb,3,\nb,4,-inf\n")
    said = compared("t.csv", "--metric", "loss", "--seed", "seed")
    assert arm(said, "b")["diverged"] == 2 and arm(said, "b")["unfinished"] == 1
    assert arm(said, "b")["verdict"] == "inconclusive" and [b["guard"] for b in said["banners"]] == ["unequal seeds"]
    assert any("1 cells of loss are empty" in note for note in said["notes"])


def test_runs_that_wandb_calls_crashed_are_unfinished():
    rows = [
        f'"r{k}","{s}",{a},{k},{1 + k / 100}'
        for k, (a, s) in enumerate(zip("aaabbb", ["finished"] * 5 + ["crashed"], strict=True))
    ]
    Path("t.csv").write_text('"Name","State","arm","seed","loss"\n' + "\n".join(rows))
    said = compared("t.csv", "--metric", "loss")
    assert arm(said, "b")["losses"] == "1 of 3 unfinished" and "its state is crashed" in said["runs"][-1]["reason"]
    Path("t.csv").write_text(Path("t.csv").read_text().replace("crashed", "Ohio"))
    assert arm(compared("t.csv", "--metric", "loss"), "b")["n"] == 3


# ---- what a table does not know


def test_every_guard_is_either_checked_or_not_known():
    """The names of the banners, as the code of the guards writes them, against the list."""
    text = "".join(path.read_text() for path in (ROOT / "toolkit/comparison").glob("*.py"))
    names = set(re.findall(r'Banner\(\s*"([^"]+)"', text)) | set(
        re.findall(r'report_differences\(\s*\w+, f?"([\w -]+)', text)
    )
    names |= set(re.findall(r'_report_far_from_baseline\(\s*plan, runs, "([^"]+)"', text)) | {
        "training FLOPs",
        "FLOPs per token",
    }
    names = {name.strip() for name in names}
    assert names == {*origin.CHECKED, *origin.NOT_KNOWN}
    table = origin.Table("t", "", (), None, None)
    assert table.checked == [] and set(table.not_known) == names


def test_no_output_calls_a_guard_passed(capsys):
    compared(csv_of(VALUES), "--metric", "loss", "--seed", "seed")
    texts = [capsys.readouterr().out, *(Path(f"compare/compare.{end}").read_text() for end in ("html",))]
    texts.append(Path("compare/report.md").read_text())
    for text in texts:
        words = " ".join(text.split())
        assert "not known, since a table holds no facts of the runs" in words and "evaluation set" in words
        assert "no difference was found except" not in words.lower() and "guards that a table allows" in words
    assert "Device, versions and code of the runs are not known" in texts[1]


# ---- bad tables

BAD = {
    "missing": ("arm,seed,lss\na,0,1\nb,0,2", "has no such column; did you mean 'lss'[?]; it has arm, seed, lss"),
    "empty": ("", "empty; its first line"),
    "blank": (" \n\n", "empty; its first line"),
    "header": ("arm,seed,loss\n", "no rows below"),
    "word": ("arm,seed,loss\na,0,1\nb,0,abc", "line 3: 'loss' is 'abc', not a number"),
    "comma": ("arm;seed;loss\na;0;1,5\nb;0;1,6", "line 2.*decimal point"),
    "percent": ("arm,seed,loss\na,0,1%\nb,0,2%", "percent sign"),
    "underscore": ("arm,seed,loss\na,0,1_000\nb,0,2", "line 2.*1_000"),
    "seed": ("arm,seed,loss\na,x,1\nb,0,2", "line 2: 'seed' is 'x', not a number"),
    "half": ("arm,seed,loss\na,0.5,1\nb,0,2", "line 2: 'seed' is '0.5', not an integer"),
    "far": ("arm,seed,loss\na,99999999999999999999,1\nb,0,2", "not an integer"),
    "seed nan": ("arm,seed,loss\na,nan,1\nb,0,2", "not an integer"),
    "twice": ("arm,seed,loss\na,0,1\nb,0,2\na,0.0,3", "lines 2 and 4: both are 'a seed 0'"),
    "one arm": ("arm,seed,loss\na,0,1\na,1,2", "only one arm, 'a'"),
    "no name": ("arm,seed,loss\n,0,1\nb,1,2", "line 2: 'arm' is empty"),
    "ragged": ("arm,seed,loss\na,0,1\nb,0,2,3", "line 3: 4 cells, but the first line names 3"),
    "short": ("arm,seed,loss\na,0,1\nb,0", "line 3: 2 cells"),
    "columns": ("arm,loss,loss,seed\na,0,1,0", "two columns are called 'loss'"),
    "list": ('[{"arm": 1}]', "a JSON list"),
    "json": ('{"arm": "a", "seed": 0, "loss": 1}\n{"arm": ', "line 2: not a JSON object"),
    "json 3": ('{"arm": "a", "seed": 0, "loss": 1}\n3', "line 2: a int, not a JSON object"),
    "bool": (
        '{"arm": "a", "seed": 0, "loss": true}\n{"arm": "b", "seed": 0, "loss": 1}',
        "line 1.*'True', not a number",
    ),
    "deep": ('{"arm": ' + "[" * 100_000, "line 1: not a JSON object"),
    "many": ("arm,seed,loss\n" + "\n".join(f"{k},0,1" for k in range(300)), "300 arms, at most 200"),
    "wide field": ("arm,seed,loss\na,0,1\nb,0," + "x" * 200_000, "not a CSV file: field larger"),
    "list cell": ('{"arm": ["a"], "seed": 0, "loss": 1}', "line 1: 'arm' is empty"),
}


@pytest.mark.parametrize("text, problem", BAD.values(), ids=BAD)
def test_a_bad_table_is_refused_with_its_line(text, problem):
    Path("t.csv").write_text(text)
    with pytest.raises(ValueError, match=problem) as caught:
        compared("t.csv", "--metric", "loss", "--seed", "seed")
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize(
    "content",
    [
        "arm,seed,loss\na,0,é\n".encode("latin-1"),
        "arm,loss\na,1\n".encode("utf-16"),
        b"PAR1\x00\xff\xfe",
        b"\x1f\x8b\x08\x00\xff",
    ],
)
def test_a_file_that_is_no_text_is_refused(content):
    Path("t.csv").write_bytes(content)
    with pytest.raises(ValueError, match="UTF-8"):
        compared("t.csv", "--metric", "loss")


def test_a_file_that_is_missing_or_a_folder_is_refused(tmp_path):
    for name in ("none.csv", "/dev/null"):
        with pytest.raises(ValueError, match="not found"):
            compared(name, "--metric", "loss")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="folder"):
        compared("folder", "--metric", "loss")


@pytest.mark.parametrize(
    "text", ["\ufeffarm;seed;loss\r\n", "arm\tseed\tloss\n", " arm , seed , loss \n", "arm|seed|loss\n"]
)
def test_marks_and_separators_of_spreadsheets_are_read(text):
    sign = next(each for each in ";\t|," if each in text)
    rows = "".join(sign.join([name, str(s), str(x)]) + "\n" for name, xs in VALUES.items() for s, x in enumerate(xs))
    Path("t.csv").write_text(text + rows, encoding="utf-8", newline="")
    assert arm(compared("t.csv", "--metric", "loss", "--seed", "seed"), "wide")["verdict"] == "better"


def test_flags_that_do_not_fit_are_refused(capsys):
    name = csv_of(VALUES)
    for words, problem in {
        ("runs/x", "--metric", "loss"): "--metric needs --table",
        ("runs/x", "--table", name, "--metric", "loss"): "either a table or runs",
        ("--table", name): "needs --metric",
        ("--table", name, "--metric", "loss", "--probes"): "does not go with --table",
        (): "name a plan's folder",
        ("--exit-arm", "a", "runs/x"): "needs --exit-verdict",
    }.items():
        with pytest.raises(SystemExit):
            compare.main(list(words))
        assert problem in capsys.readouterr().err
    for words, problem in {
        ("--baseline", "bse"): "not an arm; did you mean 'base'",
        ("--step", "step"): "name the seeds too",
        ("--seed", "loss"): "a column of its own",
        ("--exclude", "base", "--reason", "x"): "run not found; the runs are base run 1",
    }.items():
        with pytest.raises(ValueError, match=re.escape(problem)):
            compared(name, "--metric", "loss", *words)


def test_an_exclusion_and_the_command_that_repeats_it():
    name = csv_of(VALUES)
    words = ["--metric", "loss", "--seed", "seed", "--exclude", "base seed 3", "--reason", "a $(touch x) reason"]
    said = compared(name, *words)
    assert said["excluded"][0]["run"] == "base seed 3" and arm(said, "base")["n"] == 4
    assert shlex.split(said["table"]["command"])[3:] == ["--table", name, *words]


def test_a_table_of_200_000_rows_is_read(tmp_path):
    with open("t.csv", "w") as file:
        file.write("arm,seed,step,loss\n")
        for k in range(200_000):
            file.write(f"{'ab'[k % 2]},{k // 2 % 5},{k // 10},{3 - k / 1e5 + (k % 10) / 100}\n")
    said = compared("t.csv", "--metric", "loss", "--seed", "seed", "--step", "step")
    assert arm(said, "b")["n"] == 5 and said["table"]["step"] == "step"


# ---- what a table says is text


def test_names_full_of_marks_are_text_in_every_output(pictures, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    marks = MARKS.replace("\ud800", "").replace("\x00", "")
    metric = "=loss " + marks[:200].replace('"', "")
    lines = [
        {f"a{marks}": f"{'=+'[k % 2]}{marks}{k % 2}", "s": k // 2, metric: 1 + (k * 7 % 5) / 100 + k % 2}
        for k in range(8)
    ]
    Path("t.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    words = ["t.jsonl", "--arm", f"a{marks}", "--metric", metric, "--seed", "s", "--lower-is-better", "--verbose"]
    said = compared(*words)
    out = capsys.readouterr().out
    assert not FORBIDDEN.search(out) and "\\x1b" in out
    written = {end: Path(f"compare/{end}").read_text() for end in ("compare.html", "report.md", "compare.csv")}
    compared(csv_of({"a": [1.0, 1.2, 1.1], "b": [2.0, 2.3, 2.1]}), "--metric", "loss", "--seed", "seed")
    assert_clean_page(written["compare.html"], Path("compare/compare.html").read_text())
    report, clean = (
        re.sub(r"(?m)^!\[.*\]\(\w+\.png\)$", "", text)
        for text in (written["report.md"], Path("compare/report.md").read_text())
    )
    assert_clean_report(report, clean)
    assert not FORBIDDEN.search(written["compare.csv"])
    assert said["arms"][1]["arm"].startswith("+") and "'+" in written["compare.csv"]
    assert Path("compare/forest.png").stat().st_size > 10_000


def test_a_bad_name_ends_in_a_message_and_no_traceback():
    Path("t.csv").write_text("arm,\x1b[31mloss\na\x1b[2J,1\nb,x\n")
    for words in (["--metric", "los"], ["--metric", "\x1b[31mloss", "--lower-is-better"], ["--metric", "arm"]):
        words = [sys.executable, "-m", "toolkit.compare", "--table", "t.csv", *words]
        ended = subprocess.run(
            words, capture_output=True, text=True, cwd=".", env={"PYTHONPATH": str(ROOT), "PATH": ""}
        )
        assert ended.returncode == 2 and ended.stderr.startswith("error: ") and "\x1b" not in ended.stderr
        assert "Traceback" not in ended.stderr


# ---- exit codes


def verdict_code(values, *words, effect="0.02"):
    return compare.main(["--table", csv_of(values), "--metric", "loss", "--seed", "seed", "--effect", effect, *words])


def test_exit_codes_tell_the_verdict_where_they_are_asked_for():
    base, wide = VALUES["base"], VALUES["wide"]
    worse = [x + 0.3 + y / 100 for x, y in zip(base, wide, strict=True)]
    same = [x + d for x, d in zip(base, (1e-4, -1e-4, 2e-4, 0.0, -1e-4), strict=True)]
    unsure = [x + d for x, d in zip(base, (0.3, -0.2, 0.1, -0.3, 0.2), strict=True)]
    arms = {"wide": (wide, 0), "worse": (worse, 1), "unsure": (unsure, 3), "same": (same, 4)}
    for name, (values, code) in arms.items():
        assert verdict_code({"base": base, name: values}) == 0
        assert verdict_code({"base": base, name: values}, "--exit-verdict") == code
    every = {"base": base} | {name: values for name, (values, _) in arms.items()}
    assert verdict_code(every, "--exit-verdict") == 1
    assert verdict_code({name: each for name, each in every.items() if name != "worse"}, "--exit-verdict") == 3
    for name, (_, code) in arms.items():
        assert verdict_code(every, "--exit-verdict", "--exit-arm", name) == code
    assert verdict_code(every | {"wide": wide[:4]}, "--exit-verdict", "--exit-arm", "wide", "--strict") == 1
    assert verdict_code({"base": base, "copy": base}, "--exit-verdict") == 3  # nothing to test
    assert verdict_code({"base": base[:1], "one": wide[:1]}, "--exit-verdict") == 3
    for name, problem in (("base", "that is the baseline"), ("wdie", "did you mean 'wide'")):
        with pytest.raises(ValueError, match=problem):
            verdict_code(every, "--exit-verdict", "--exit-arm", name)
