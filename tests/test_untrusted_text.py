"""A plan's folder may come from anybody. What its files say is text in every output, and never markup, a link, a
formula, mathematics or a terminal control sequence; and a value of the wrong kind is refused by name."""

import copy
import csv
import io
import json
import re
import shlex
from html.parser import HTMLParser

import pytest
from markdown_it import MarkdownIt
from test_compare import METRIC, write_plan

from toolkit import command, compare
from toolkit.comparison import alike, assemble, board, figures, markdown, page, record, runs, screen, text
from toolkit.output import escape
from toolkit.output.terminal import Terminal, fold, grid
from toolkit.rundir import curve, report

MARKS = (
    '=1+2|"cmd" <script>planted()</script><img src=x onerror=planted()> "onload="planted() ![i](//planted) '
    "[l](javascript:planted) https://planted www.planted.org <planted@x> &lt;planted&gt; **b** `c` ~~s~~ \r\n# planted"
    "\n```\nplanted\n```\n- planted\n| a | b |\n$\\frac$ $$\\input{x}$$ \\x \x1b[31m\x1b]0;planted\x07 \x9b1m \x00 "
    "\u202e [bold]planted[/bold] :smile: \U000e0041 \ud800 #333333 {0} {c.plan} %s"
)
NAME = MARKS.replace("/", "|").replace("\x00", "").replace("\ud800", "").replace("\r\n", "").replace("\n", "")[:200]
FORBIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\U000e0000-\U000e007f]")


def leaves(value, path=()):
    """The place of every value in nested dicts and lists, and every place that holds some."""
    yield path
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from leaves(value[key], (*path, key))


def replaced(value, path, new):
    if not path:
        return new
    copied = value.copy()
    copied[path[0]] = replaced(value[path[0]], path[1:], new)
    return copied


def planted(value, number=None):
    """Every string planted, verdicts and outcomes too; numbers as well where ``number`` says what they become."""
    if isinstance(value, dict):
        return {key: planted(each, number) for key, each in value.items()}
    if isinstance(value, list):
        return [planted(each, number) for each in value]
    if isinstance(value, str):
        return MARKS + value
    return number if number is not None and type(value) in (int, float) else value


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A plan with a grid, a lost run, banners and notes: something of everything that the outputs can say."""
    broken = {"NoPE-s1": {"state": "diverged"}, "Other-s0": {"dirty": True, "commit": "feed"}}
    arms = {"NoPE": {"config": {"AdamW.lr": 0.01}}, "ALiBi": {"parameters": {"total": 120_000}}}
    shifts = {"NoPE": 0.3, "ALiBi": -0.1, "Other": 0.016}
    return write_plan(tmp_path_factory.mktemp("plan"), shifts, seeds=range(3), arms=arms, broken=broken)


@pytest.fixture(scope="module")
def said(folder):
    """Its record, as the outputs get it, with a learning rate and an exclusion."""
    plan, found = runs.find([str(folder)], None, None)
    out = record.record(assemble.compare(plan, found, [("rope-s0", "why")], None))
    point = {"lr": 0.003, "mean": 2.0, "values": [2.0], "runs": 2}
    out["arms"][1]["lr"] = {"points": [point], "best": 0.003, "judged_at": [0.01], "sensitivity": 0.1}
    out["arms"][1] |= {"items": 40, "low_like": -0.1, "high_like": 0.2, "share_seeds": 0.5, "share_items": 0.4}
    out["resolution"][0] |= {"p": 0.4, "tells_apart": False, "items": 40}
    out["resolution"][1] |= {"p": None, "tells_apart": None}
    return json.loads(json.dumps(out))


class Elements(HTMLParser):
    """Every element and attribute of a page."""

    def __init__(self, text):
        super().__init__()
        self.found, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, tuple(name for name, _ in attributes)))

    def handle_data(self, data):
        self.text += data


def assert_clean_page(text, clean):
    """No element or attribute beyond those of the clean page, no control character, and no script is allowed."""
    ours = set(Elements(clean).found)
    assert set(Elements(text).found) <= ours
    assert not FORBIDDEN.search(text) and "<script" not in text and "<img" not in text
    policy = re.search(r'<meta http-equiv="Content-Security-Policy" content="([^"]*)">', text)[1]
    assert policy.startswith("default-src 'none'") and "script" not in policy


def shape(text):
    """What a Markdown text is made of, beyond words: the kinds of its blocks and of what stands within lines."""
    tokens = MarkdownIt("gfm-like", {"linkify": False}).parse(text)
    inline = [child for token in tokens for child in token.children or ()]
    kinds = [token.type for token in tokens]
    return kinds, {child.type for child in inline}, [t.attrs for t in (*tokens, *inline) if t.type in LINKS]


LINKS = ("image", "link_open")


def assert_clean_report(text, clean):
    kinds, inline, links = shape(text)
    expected, ours, _ = shape(clean)
    assert set(kinds) <= set(expected) and kinds.count("heading_open") == expected.count("heading_open")
    assert inline <= ours | {"text_special"} and links == []
    assert not re.search(r"(?<!\\)<", re.sub(r"(?s)\n(`{3,})\n.*?\n\1\n", "", text))
    assert not FORBIDDEN.search(text)


def printed(show, *arguments, width=100):
    console = Terminal(file=io.StringIO(), force_terminal=True, width=width)
    show(*arguments, console)
    return re.sub(r"\x1b\[[\d;]*m", "", console.file.getvalue())  # the styles of our own


def assert_clean_terminal(text):
    assert not FORBIDDEN.search(text) and "\\x1b" in text


@pytest.mark.parametrize("number", [None, MARKS], ids=["strings", "numbers-too"])
def test_a_record_of_nothing_but_marks_is_text_in_every_output(said, number):
    known = ("needs", "n", "runs", "p_holm", "low", "high")  # computed here, never read from a file
    kept = {arm["arm"]: {key: arm[key] for key in known} for arm in said["arms"]}
    dirty = planted(copy.deepcopy(said), number)
    for old, arm in zip(said["arms"], dirty["arms"], strict=True):
        arm |= kept[old["arm"]] | {"lr": copy.deepcopy(old["lr"])}
    dirty |= {key: said[key] for key in ("effect", "alpha", "noise_sd")}
    for old, one in zip(said["resolution"], dirty["resolution"], strict=True):
        one["p"] = old["p"]  # computed too
    assert_clean_page(page.page(dirty, {}), page.page(said, {}))
    assert_clean_report(markdown.report(dirty, {}), markdown.report(said, {}))
    for verbose in (False, True):
        out = printed(lambda record, console, v=verbose: screen.show(record, console, v), dirty)
        assert_clean_terminal(out)
    for row in csv.reader(io.StringIO(record.table(dirty))):
        assert not any(cell.startswith(("=", "+", "@", "\t", "\r")) for cell in row if not is_number(cell))
        assert not FORBIDDEN.search("".join(row))


def is_number(text):
    try:
        float(text)
    except ValueError:
        return False
    return True


def test_the_page_is_clean_whichever_value_of_the_runs_is_planted(said):
    """Each in turn, numbers among them: a seed, a step or seconds that are a string with a tag."""
    clean = page.page(said, {})
    for path in leaves(said["runs"][:2]):
        value = said["runs"][path[0]] if path else None
        if len(path) == 2 and not isinstance(value[path[1]], dict):
            dirty = replaced(said, ("runs", *path), MARKS)
            assert_clean_page(page.page(dirty, {}), clean)
            assert_clean_report(markdown.report(dirty, {}), markdown.report(said, {}))


def planted_plan(root):
    """A plan whose folder has marks wherever a file can hold them, its arms' and runs' names among them."""
    folder = write_plan(root, {"NoPE": 0.3}, seeds=range(3), broken={"NoPE-s1": {"state": "diverged"}})
    said = json.loads((folder / "plan.json").read_text())
    arms = {"rope": "=1 rope" + NAME[2:90], "NoPE": "+2 $\\frac$ NoPE" + NAME[2:90]}
    for job in said["jobs"]:
        run = f"{job['run']} {NAME[:90]}"
        (folder / job["run"]).rename(folder / run)
        for file in ("facts.json", "status.json"):
            known = json.loads((folder / run / file).read_text())
            state, config = known.get("state"), known.get("config", {})
            marked = planted(known)
            marked |= {"state": state} if state else {}
            if config:
                marked["config"] = planted(config) | {MARKS: MARKS + run, "GPT.position": MARKS + job["arm"]}
                marked |= {"from": MARKS, "commit": MARKS, "packages": {MARKS: MARKS}}
            (folder / run / file).write_text(json.dumps(marked))
        text = (folder / run / "metrics.jsonl").read_text().replace(METRIC, "=$\\\\frac$ <b>x</b>")
        (folder / run / "metrics.jsonl").write_text(text + json.dumps({"step": 5, MARKS: MARKS}) + "\n")
        (folder / run / "samples.md").write_text(MARKS.replace("\ud800", ""))
        job |= {"run": run, "arm": arms[job["arm"]]}
    said |= {"name": MARKS, "question": MARKS, "baseline": arms["rope"], "metric": "=$\\frac$ <b>x</b>"}
    said |= {"arms": {name: {} for name in arms.values()}, "factor": [MARKS], "budget": {}, "sha256": MARKS}
    said |= {"higher_is_better": False}
    (folder / "plan.json").write_text(json.dumps(said).replace("\\ud800", ""))
    for file in folder.glob("*/*.json"):
        file.write_text(file.read_text().replace("\\ud800", ""))
    return folder


def test_a_folder_full_of_marks_is_compared_and_every_output_is_clean(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    folder, clean = planted_plan(tmp_path), write_plan(tmp_path / "clean", {"NoPE": 0.3}, seeds=range(3), sha256="x")
    assert compare.main([str(folder), "--exclude", next(folder.glob("rope-s0*")).name, "--reason", NAME]) == 0
    out = capsys.readouterr()
    assert not FORBIDDEN.search(out.out + out.err) and "failed" not in out.err
    compare.main([str(clean)])
    written, ours = folder / "compare", clean / "compare"
    assert_clean_page(
        (written / "compare.html").read_text(), (ours / "compare.html").read_text() + "<details><summary><ul><li>"
    )
    text = re.sub(r"(?m)^!\[.*\]\(\w+\.png\)$", "", (written / "report.md").read_text())
    kinds, inline, links = shape(text)
    assert links == [] and inline <= {"text", "strong_open", "strong_close", "text_special", "code_inline"}
    assert "html_block" not in kinds and kinds.count("heading_open") == 9
    rows = record.read_table((written / "compare.csv").read_text())
    plan = json.loads((folder / "plan.json").read_text())
    assert [row["arm"] for row in rows] == [escape.line(arm) for arm in plan["arms"]]
    for row in csv.reader(io.StringIO((written / "compare.csv").read_text())):
        assert not any(cell.startswith(("=", "+", "@", "-")) for cell in row if not is_number(cell))
    for name in ("forest", "curves", "flops"):
        assert (written / f"{name}.png").stat().st_size > 10_000


@pytest.mark.parametrize("file", ["plan.json", "NoPE-s0/facts.json", "NoPE-s0/status.json", "rope-s0/metrics.jsonl"])
def test_a_value_of_the_wrong_kind_never_ends_in_a_traceback(tmp_path, monkeypatch, file):
    monkeypatch.setattr(figures, "draw", lambda comparison: {})
    monkeypatch.setattr(board, "write", lambda *arguments: None)
    source = write_plan(tmp_path, {"NoPE": 0.3}, seeds=range(2))
    original = (source / file).read_text()
    objects = [json.loads(text) for text in (original.splitlines() if file.endswith("l") else [original])]
    refused = 0
    for path in [path for path in leaves(objects[-1]) if path[-1:] != ("sha256",)]:
        for new in (MARKS, [MARKS], None):
            text = "".join(json.dumps(one) + "\n" for one in [*objects[:-1], replaced(objects[-1], path, new)])
            (source / file).write_text(text)
            try:
                assert compare.main([str(source)]) == 0
                refused += "damaged" in (source / "compare" / "compare.json").read_text()
            except ValueError:
                refused += 1
    assert refused or file == "rope-s0/metrics.jsonl"


def test_a_fault_of_a_file_is_named(tmp_path):
    folder = write_plan(tmp_path, {"NoPE": 0.3}, seeds=range(2))
    facts = folder / "NoPE-s1" / "facts.json"
    facts.write_text(facts.read_text().replace('"seed": 1', '"seed": "<b>1</b>"'))
    assert compare.main([str(folder)]) == 0
    said = json.loads((folder / "compare" / "compare.json").read_text())
    told = next(banner["text"] for banner in said["banners"] if banner["guard"] == "damaged")
    assert re.search(r"NoPE-s1/facts.json: a value .* seed: Input should be a valid integer", told)


def test_a_picture_that_fails_costs_a_warning(tmp_path, monkeypatch, caplog):
    def broken(comparison):
        raise RuntimeError("no \x1b[31m picture")

    first, *rest = figures._PICTURES
    monkeypatch.setattr(figures, "_PICTURES", ((first[0], first[1], broken), *rest))
    folder = write_plan(tmp_path, {"NoPE": 0.3}, seeds=range(2))
    assert compare.main([str(folder)]) == 0
    assert "the figure forest failed: RuntimeError: no \\x1b[31m picture" in caplog.text
    written = {path.name for path in (folder / "compare").iterdir()}
    assert {"report.md", "compare.html", "curves.png"} <= written and "forest.png" not in written


@pytest.mark.parametrize(
    "name",
    ["$\\frac$", "$x$", "a\x1b[31mb", "\u6a21\u578b \U0001f600", "x" * 300, "a\nb\nc", "\u202eevil", "{x} %s \\"],
)
def test_any_name_is_a_label_in_a_figure_and_a_title_of_a_curve(tmp_path, name):
    shown = escape.label(name)
    assert len(shown) <= escape.LABEL and shown.isprintable()
    run = tmp_path / name.replace("/", "")[:80]
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 1, "train/loss_nats": 2.0}\n')
    assert curve.draw(run).stat().st_size > 5_000  # a letter that the font lacks would warn, which is an error here


@pytest.mark.parametrize(
    "text",
    ["=HYPERLINK(1)", "+x", "-x", "@x", "'=x", "''+x", "'x", "x=1", "-0.5", "+1e-3", ".5", "\uff1dx", "", "rope"],
)
def test_a_cell_reads_back_as_it_was_written(text):
    cell = escape.cell(text)
    assert escape.uncell(cell) == text
    assert is_number(cell) or not cell.startswith(("=", "+", "-", "@", "\uff1d"))


def test_numbers_are_numbers_in_a_cell():
    assert [escape.cell(value) for value in (-0.5, 3, None, True)] == [-0.5, 3, None, True]
    assert escape.cell("\t=x") == "\\t=x" and escape.cell("\r=x") == "\\r=x"


TEXTS = [
    "- x", "+ x", "* x", "1. x", "2) x", "# x", "--- ", "===", "> x", "    x", "```", "~~~", "a_b __c__ _d_ *e*", "a|b",
    "<b>x</b>", "<!-- x -->", "![a](b)", "[a](b)", "[a]: b", "https://x.y", "www.x.y", "&lt; &amp; & &#60;", "`x`",
    "\\", "\\*", "$x$", "a\\|b", "line\nbreak", "~~x~~", "Ünï", "val_full/loss_nats", "100_000", "-0.1, +0.2",
]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("template", ["{}", "- {}", "**x**: {}", "# {}", "| {} |\n|---|\n| x |"])
def test_markdown_shows_a_text_as_it_is(text, template):
    rendered = MarkdownIt("gfm-like", {"linkify": False}).render(escape.markdown(template, text))
    kinds, inline, links = shape(escape.markdown(template, text))
    expected, ours, _ = shape(escape.markdown(template, "x"))
    assert kinds == expected and inline <= ours | {"text_special"} and links == []
    assert escape.line(text).strip() in Elements(rendered).text


def test_names_and_reasons_are_no_commands_where_the_report_says_what_to_type(said):
    hostile = "x; $(touch planted) `y` 'z' \"w\""
    excluded = [{"run": hostile, "arm": "rope", "reason": hostile}]
    for folder in (hostile, None):
        paths = [{"path": f"runs/{hostile}"}]
        for line in text.commands(said | {"folder": folder, "excluded": excluded, "runs": paths}):
            assert any(hostile in word for word in shlex.split(line))
            assert re.search(r"[;$`]", "".join(re.split(r"'[^']*'|\"[^\"]*\"", line))) is None


def test_a_block_of_code_ends_where_it_should():
    text = escape.code_block(["a", "```", "<b>", "`````"])
    assert shape(text)[0] == ["fence"]


def test_what_is_no_html_is_escaped_wherever_it_stands():
    inner = escape.html("<b>{}</b>", "<i>")
    assert inner == "<b>&lt;i&gt;</b>"
    assert escape.html('<p class="{}">{}</p>', '" onload="x', inner) == f'<p class="&quot; onload=&quot;x">{inner}</p>'
    assert escape.join_html(["<i>", inner]) == f"&lt;i&gt;{inner}"


def test_a_line_is_one_line_and_a_block_keeps_its_lines():
    assert escape.line("a\nb\tc\x1b[0m\u2028d\u202e") == "a\\nb\\tc\\x1b[0m\\u2028d\\u202e"
    assert escape.block("a\r\nb\tc\x1b[0m") == "a\nb\tc\\x1b[0m"
    assert escape.block("ÜЖ模\U0001f469\u200d\U0001f4bb") == "ÜЖ模\U0001f469\u200d\U0001f4bb"


def test_the_console_shows_text_and_no_markup():
    out = printed(lambda console: console.print("[bold]x[/bold] :smile: \x1b[31m [/]"))
    assert out == "[bold]x[/bold] :smile: \\x1b[31m [/]\n"


def test_only_one_module_makes_consoles():
    """A console of rich's own would take ``[bold]`` in a file for markup."""
    from test_layout import ROOT, imports

    allowed = {"terminal.py", "tokenise.py"}  # tokenise.py shows counts alone
    found = {path.name for path in (ROOT / "toolkit").rglob("*.py") if "rich.console.Console" in imports(path)}
    assert found <= allowed


def test_an_error_and_a_warning_show_control_characters(capsys, monkeypatch):
    import logging

    def fails():
        logging.getLogger("toolkit").warning("w\x1b[31m")
        raise ValueError("file \x1b[31mred\x1b[0m\nsecond line")

    monkeypatch.setattr(logging.root, "handlers", [])
    with pytest.raises(SystemExit, match="2"):
        command.run_command(fails)
    err = capsys.readouterr().err
    assert "\x1b" not in err and "error: file \\x1b[31mred\\x1b[0m\nsecond line" in err and "WARNING: w\\x1b[31m" in err


def test_the_end_of_a_run_shows_its_sample_as_text(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(report, "console", Terminal(width=80))
    (tmp_path / "samples.md").write_text("## step 5\n\n[bold]a[/bold] \x1b[31m :smile:\nb\n")
    report.footer(tmp_path, {"state": "done", "step": 5}, "x")
    out = capsys.readouterr().out
    assert "[bold]a[/bold] \\x1b[31m :smile:\nb\n" in out


def test_tensorboard_gets_text(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = write_plan(tmp_path, {"NoPE": 0.3}, seeds=range(2), arms={"NoPE": {"config": {"X.y": MARKS}}})
    plan, found = runs.find([str(folder)], None, None)
    board.write(assemble.compare(plan, found, [("rope-s0", "![i](//x) <b>")], None), tmp_path / "board")
    events = EventAccumulator(str(tmp_path / "board" / "NoPE-s0")).Reload()
    text = events.Tensors("excluded by hand/text_summary")[0].tensor_proto.string_val[0].decode()
    assert text == "rope-s0: !\\[i\\](//x) \\<b\\>"


def test_groups_lose_no_text():
    texts = [("g", f"a{i}: 1 key differs: x 1 -> 2") for i in range(9)] + [("g", "other"), ("h", "a1: b")]
    groups = alike.grouped(texts, [f"a{i}" for i in range(9)])
    assert [len(group.texts) for group in groups] == [9, 1, 1] and groups[0].is_identical
    assert [(group.guard, text) for group in groups for text in group.texts] == texts
    assert groups[0].others == "the same for a1, a2, a3, a4, a5, a6 and 2 more"


def test_a_name_is_folded_at_its_signs_or_cut():
    assert fold("post-layernorm-wide", 16) == ["post-layernorm-", "wide"]
    assert fold("x" * 40, 9) == ["xxxx…xxxx"]
    table, dropped = grid([], [], 80)
    assert dropped == [] and table.row_count == 0
