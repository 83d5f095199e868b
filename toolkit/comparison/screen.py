"""The record on the terminal: the answer first, an arm a line; what explains it where it is asked for."""

from __future__ import annotations

from toolkit.comparison import alike, text
from toolkit.output.escape import shorten
from toolkit.output.terminal import Column, Terminal, grid, styled

STYLES = {"better": "bold blue", "worse": "bold red", "equivalent": "bold green", "inconclusive": "bold yellow"}
LONG = 320  # characters of a banner that are shown where nothing more is asked for


def show(said: dict, console: Terminal, verbose: bool = False) -> None:
    """The answer, then what speaks against it; ``verbose``: then reasons, pairing and costs as well."""
    answer(said, console)
    _legend(said, console)
    _guards(said, console, verbose)
    if verbose:
        _costs(said, console)
        _reasons(said, console)


def answer(said: dict, console: Terminal) -> None:
    """The question, the verdicts in a sentence, and an arm a line."""
    console.print(styled((said["question"] or said["name"], "bold")))
    console.print(styled(said["headline"]))
    for one in text.exclusions(said):
        console.print(styled((one, "bold red")))
    table, dropped = grid(_columns(said), [_row(arm, said) for arm in said["arms"]], console.width)
    console.print()
    console.print(table)
    if dropped:
        console.print(styled((f"without {', '.join(dropped)}, for which there is no room here", "dim")))


def _columns(said: dict) -> list[Column]:
    """In the order of their importance, the last to give way first: names and differences stay."""
    needs = any(arm["needs"] is not None for arm in said["arms"])
    tuned = any(arm["lr"] for arm in said["arms"])
    return [
        Column("verdict"),
        Column("arm", name=True),
        Column("n", gives_way=6),
        Column("mean", right=True, gives_way=7),
        Column("sd", right=True, gives_way=3),
        Column("difference", right=True),
        Column(f"{1 - said['alpha']:.0%} interval", gives_way=1),
        Column("p Holm", right=True, gives_way=2),
        *([Column("needs n", right=True, gives_way=5)] if needs else []),
        *([Column("best lr", right=True, gives_way=4)] if tuned else []),
    ]


def _row(arm: dict, said: dict) -> list:
    needs = [text.needs(arm)] if any(other["needs"] is not None for other in said["arms"]) else []
    tuned = any(other["lr"] for other in said["arms"])
    best = [text.rate(arm["lr"]["best"]) if arm["lr"] else ""] if tuned else []
    return [
        (arm["verdict"], STYLES.get(arm["verdict"], "bold")),
        arm["arm"],
        text.count(arm) + (" *" if arm["conditional"] and arm["n"] else ""),
        text.number(arm["mean"]),
        text.number(arm["sd"]),
        text.number(arm["difference"], "+"),
        text.ends(arm),
        text.p(arm["p_holm"]),
        *needs,
        *best,
    ]


def _legend(said: dict, console: Terminal) -> None:
    console.print()
    console.print(styled((text.legend(said), "dim")))


def _guards(said: dict, console: Terminal, verbose: bool) -> None:
    groups = alike.banners(said)
    console.print()
    if not groups:
        console.print("no guard fired: the runs differ in nothing but the factor")
    else:
        fired = len({group.guard for group in groups})
        console.print(styled((f"{fired} guard{'s' if fired > 1 else ''} fired", "bold red")))
    for group in groups:
        mark = styled((f"! {group.guard}", "red"), "  ")
        _print_group(group, mark, console, verbose)
    for group in alike.notes(said):
        _print_group(group, styled(("-", "yellow"), " "), console, verbose)


def _print_group(group: alike.Alike, mark, console: Terminal, verbose: bool) -> None:
    if verbose:
        for each in group.texts:
            console.print(mark + styled(each))
        return
    console.print(mark + styled(shorten(group.texts[0], LONG)))
    if group.others:
        console.print(styled(f"  {group.others}"))


def _costs(said: dict, console: Terminal) -> None:
    right = ("steps", "FLOPs", "seconds", "pairs", "correlation", "finds")
    columns = [Column("to the baseline's last loss", name=True)]
    columns += [Column(title, right=True, gives_way=6 - i) for i, title in enumerate(right)]
    rows = []
    for arm in said["arms"]:
        pairs = "" if arm["paired"] is None else str(arm["pairs"]) if arm["paired"] else "Welch"
        rows.append([arm["arm"], *text.cost(arm), pairs, text.form(arm["correlation"], "+.2f")])
        rows[-1].append(text.number(arm["detectable"]))
    console.print()
    console.print(grid(columns, rows, console.width)[0])


def _reasons(said: dict, console: Terminal) -> None:
    console.print()
    for arm in said["arms"][1:]:
        console.print(styled((arm["arm"], "bold"), f"  {arm['why']}"))
    for why in dict.fromkeys(arm["pairing"] for arm in said["arms"] if arm["pairing"]):
        of = [arm["arm"] for arm in said["arms"] if arm["pairing"] == why]
        of = "every arm" if len(of) == len(said["arms"]) - 1 > 1 else ", ".join(of)
        console.print(styled((of, "bold"), f"  {why}"))
    tuned = [f"{arm['arm']} {text.rate(arm['lr']['best'])}" for arm in said["arms"] if arm["lr"]]
    if tuned:
        console.print(styled(f"best learning rate, chosen on other seeds: {', '.join(tuned)}"))
    console.print()
    for name, meaning in text.meanings(said):
        console.print(styled((name, "bold"), f"  {meaning}"))
