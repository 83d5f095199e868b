"""Shows the record in the terminal: first the answer with one line for each arm, then guards; details on request."""

from __future__ import annotations

from rich.text import Text

from toolkit.comparison import alike, probestext, text
from toolkit.comparison.probes import LISTED, ProbesRecord
from toolkit.comparison.record import ArmRecord, Record
from toolkit.output.escape import shorten
from toolkit.output.terminal import Column, Terminal, grid, styled

STYLES = {"better": "bold blue", "worse": "bold red", "equivalent": "bold green", "inconclusive": "bold yellow"}
MAX_BANNER_LENGTH = 320  # characters of a banner that are shown without ``verbose``
PROBE_ROWS = 3  # cells of an arm that are listed without ``verbose``
_PROBE_COLUMNS = [
    Column(
        title, right=title not in ("arm", "module", "statistic"), gives_way=order, name=order == 0 and title != "step"
    )
    for title, order in zip(probestext.HEAD, (0, 0, 0, 0, 1, 2, 0, 3), strict=True)
]


def show(record: Record, console: Terminal, verbose: bool = False) -> None:
    """Print the answer, intervals by item and the guards; with ``verbose``, also what each metric can tell apart,
    costs, reasons and pairing."""
    answer(record, console)
    _legend(record, console)
    _by_item(record, console)
    _guards(record, console, verbose)
    if "probes" in record:
        _probes(record["probes"], console, verbose)
    if verbose:
        _resolution(record, console)
        _costs(record, console)
        _reasons(record, console)


def answer(record: Record, console: Terminal) -> None:
    """Print the question, the headline, and a table with one line for each arm."""
    console.print(styled((record["question"] or record["name"], "bold")))
    console.print(styled(record["headline"]))
    for one in text.exclusions(record):
        console.print(styled((one, "bold red")))
    table, dropped = grid(_columns(record), [_row(arm, record) for arm in record["arms"]], console.width)
    console.print()
    console.print(table)
    if dropped:
        console.print(styled((f"columns left out to fit the terminal: {', '.join(dropped)}", "dim")))


def _columns(record: Record) -> list[Column]:
    """The table's columns. In a narrow terminal, the column with the lowest ``gives_way`` is dropped first; columns
    without it stay."""
    needs = any(arm["needs"] is not None for arm in record["arms"])
    tuned = any(arm["lr"] for arm in record["arms"])
    return [
        Column("verdict"),
        Column("arm", name=True),
        Column("n", gives_way=6),
        *([Column("look", gives_way=8)] if text.has_looks(record) else []),
        Column("mean", right=True, gives_way=7),
        Column("sd", right=True, gives_way=3),
        Column("difference", right=True),
        Column(text.interval_title(record), gives_way=1),
        Column(f"{'seq. ' if text.has_looks(record) else ''}p Holm", right=True, gives_way=2),
        *([Column("needs n", right=True, gives_way=5)] if needs else []),
        *([Column("best lr", right=True, gives_way=4)] if tuned else []),
    ]


def _row(arm: ArmRecord, record: Record) -> list:
    needs = [text.needs(arm)] if any(other["needs"] is not None for other in record["arms"]) else []
    tuned = any(other["lr"] for other in record["arms"])
    best = [text.rate(arm["lr"]["best"]) if arm["lr"] else ""] if tuned else []
    return [
        (arm["verdict"], STYLES.get(arm["verdict"], "bold")),
        arm["arm"],
        text.count(arm) + (" *" if arm["conditional"] and arm["n"] else ""),
        *([text.look(arm)] if text.has_looks(record) else []),
        text.number(arm["mean"]),
        text.number(arm["sd"]),
        text.number(arm["difference"], "+"),
        text.interval(arm),
        text.p_value(arm["p_holm"]),
        *needs,
        *best,
    ]


def _legend(record: Record, console: Terminal) -> None:
    console.print()
    console.print(styled((text.legend(record), "dim")))


def _guards(record: Record, console: Terminal, verbose: bool) -> None:
    groups = alike.banners(record)
    console.print()
    if not groups:
        console.print(styled(text.no_banner(record)))
    else:
        fired = len({group.guard for group in groups})
        console.print(styled((f"{fired} guard{'s' if fired > 1 else ''} fired", "bold red")))
    for group in groups:
        mark = styled((f"! {group.guard}", "red"), "  ")
        _print_group(group, mark, console, verbose)
    for each in text.not_known(record):
        console.print(styled(("?", "yellow"), f" {each}"))
    for group in alike.notes(record):
        _print_group(group, styled(("-", "yellow"), " "), console, verbose)


def _print_group(group: alike.TextGroup, mark: Text, console: Terminal, verbose: bool) -> None:
    if verbose:
        for each in group.texts:
            console.print(mark + styled(each))
        return
    console.print(mark + styled(shorten(group.texts[0], MAX_BANNER_LENGTH)))
    if group.others:
        console.print(styled(f"  {group.others}"))


def _by_item(record: Record, console: Terminal) -> None:
    head, rows = text.by_item(record)
    gives_way = (0, 5, 0, 0, 4, 3, 2, 1)
    columns = [Column(head[0], name=True)]
    columns += [Column(title, right=True, gives_way=way) for title, way in zip(head[1:], gives_way[1:], strict=True)]
    if rows:
        console.print()
        console.print(grid(columns, rows, console.width)[0])


def _resolution(record: Record, console: Terminal) -> None:
    head, rows = text.resolution(record)
    gives_way = {"unit": 2, "seeds": 5, "items": 4, "noise sd": 6, "between": 1, "p": 3, "largest": 7}
    left = ("metric", "unit", "between", "arms apart")
    columns = [
        Column(title, right=title not in left, gives_way=gives_way.get(title, 0), name=title == "metric")
        for title in head
    ]
    if rows:
        console.print()
        console.print(grid(columns, rows, console.width)[0])
    for sentence in text.without_separation(record):
        console.print(styled(("-", "yellow"), f" {sentence}"))


def _probes(record: ProbesRecord, console: Terminal, verbose: bool) -> None:
    """Print what changed first in each arm, and a table of the largest differences at that step."""
    console.print()
    console.print(styled(("what changed first", "bold")))
    for arm in record["arms"]:
        console.print(styled(probestext.sentence(arm)))
    if cells := probestext.table(record, LISTED if verbose else PROBE_ROWS):
        console.print()
        console.print(grid(_PROBE_COLUMNS, cells, console.width)[0])
    console.print()
    for note in (*probestext.notes(record), probestext.legend(record)):
        console.print(styled((note, "dim")))


def _costs(record: Record, console: Terminal) -> None:
    right = ("steps", "FLOPs", "seconds", "pairs", "correlation", "detects")
    columns = [Column("to the baseline's last loss", name=True)]
    columns += [Column(title, right=True, gives_way=6 - i) for i, title in enumerate(right)]
    rows = []
    for arm in record["arms"]:
        pairs = "" if arm["paired"] is None else str(arm["pairs"]) if arm["paired"] else "Welch"
        rows.append([arm["arm"], *text.cost(arm), pairs, text.formatted(arm["correlation"], "+.2f")])
        rows[-1].append(text.number(arm["detectable"]))
    console.print()
    console.print(grid(columns, rows, console.width)[0])


def _reasons(record: Record, console: Terminal) -> None:
    console.print()
    for arm in record["arms"][1:]:
        console.print(styled((arm["arm"], "bold"), f"  {arm['why']}"))
    for pairing in dict.fromkeys(arm["pairing"] for arm in record["arms"] if arm["pairing"]):
        names = [arm["arm"] for arm in record["arms"] if arm["pairing"] == pairing]
        whose = "every arm" if len(names) == len(record["arms"]) - 1 > 1 else ", ".join(names)
        console.print(styled((whose, "bold"), f"  {pairing}"))
    tuned = [f"{arm['arm']} {text.rate(arm['lr']['best'])}" for arm in record["arms"] if arm["lr"]]
    if tuned:
        console.print(styled(f"best learning rate, chosen on the selection seeds: {', '.join(tuned)}"))
    console.print()
    for name, meaning in text.meanings(record):
        console.print(styled((name, "bold"), f"  {meaning}"))
