"""The record as text: the terminal's tables, and report.md."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

STYLES = {"better": "bold blue", "worse": "bold red", "equivalent": "bold green", "inconclusive": "bold yellow"}


def show(said: dict, console: Console) -> None:
    """Verdicts first, then what speaks against them, then the rest."""
    console.print(f"[bold]{escape(said['question'] or said['name'])}[/bold]")
    console.print(escape(said["headline"]))
    for one in exclusions(said):
        console.print(f"[bold red]{escape(one)}[/bold red]")
    titles = ("verdict", "arm", "n", "mean ± sd", "difference", f"{1 - said['alpha']:.0%} interval", "p Holm")
    grid = _grid(titles, ("n", "difference", "p Holm"))
    for arm in said["arms"]:
        style = STYLES.get(arm["verdict"], "bold")
        word = verdict(arm).replace(" (", "\n(")
        mark = " *" if arm["conditional"] and arm["n"] else ""
        cells = (count(arm), spread(arm) + mark, number(arm["difference"], "+"), ends(arm), p(arm["p_holm"]))
        grid.add_row(f"[{style}]{escape(word)}[/{style}]", escape(arm["arm"]), *cells)
    console.print()
    console.print(grid)
    console.print(f"\n{escape(legend(said))}\n", style="dim")
    titles = ("to the baseline's last loss", "steps", "FLOPs", "seconds", "pairs", "correlation", "finds")
    grid = _grid(titles, titles[1:])
    for arm in said["arms"]:
        pairs = "" if arm["paired"] is None else str(arm["pairs"]) if arm["paired"] else "Welch"
        rho = "" if arm["correlation"] is None else f"{arm['correlation']:+.2f}"
        grid.add_row(escape(arm["arm"]), *cost(arm), pairs, rho, number(arm["detectable"]))
    console.print(grid)
    console.print()
    for arm in said["arms"][1:]:
        if arm["verdict"] not in ("better", "worse", "equivalent"):
            console.print(f"[bold]{escape(arm['arm'])}[/bold]  {escape(arm['why'])}")
    for why in dict.fromkeys(arm["pairing"] for arm in said["arms"] if arm["pairing"]):
        of = [arm["arm"] for arm in said["arms"] if arm["pairing"] == why]
        of = "every arm" if len(of) == len(said["arms"]) - 1 > 1 else ", ".join(of)
        console.print(f"[bold]{escape(of)}[/bold]  {escape(why)}")
    tuned = [f"{arm['arm']} {rate(arm['lr']['best'])}" for arm in said["arms"] if arm["lr"]]
    if tuned:
        console.print(f"best learning rate, chosen on other seeds: {escape(', '.join(tuned))}")
    if said["banners"]:
        many = len(said["banners"])
        console.print(f"\n[bold red]{many} guard{'s' if many > 1 else ''} fired[/bold red]")
        for banner in said["banners"]:
            console.print(f"[red]! {escape(banner['guard'])}[/red]  {escape(banner['text'])}")
    else:
        console.print("\nno guard fired: the runs differ in nothing but the factor")
    for note in said["notes"]:
        console.print(f"[yellow]-[/yellow] {escape(note)}")


def markdown(said: dict, pictures: dict[str, str]) -> str:
    """report.md; ``pictures`` are {file name: caption}."""
    out = [f"# {said['name']}", ""]
    if said["question"]:
        out += [f"**{said['question']}**", ""]
    out += [said["headline"], ""]
    out += [f"**{one}**\n" for one in exclusions(said)]
    head = [
        "verdict",
        "arm",
        "n",
        "mean ± sd",
        "difference",
        f"{1 - said['alpha']:.0%} interval",
        "p (Holm)",
        "steps to the baseline's loss",
    ]
    rows = []
    for arm in said["arms"]:
        mean = spread(arm) + (" \\*" if arm["conditional"] and arm["n"] else "")
        rows.append(
            [
                f"**{verdict(arm)}**",
                arm["arm"],
                count(arm),
                mean,
                number(arm["difference"], "+"),
                ends(arm),
                p(arm["p_holm"]),
                steps(arm),
            ]
        )
    out += [*_table(head, rows), "", legend(said), ""]
    out += [f"- **{arm['arm']}**: {explained(arm)}" for arm in said["arms"][1:]]
    out += ["", "## Guards", ""]
    out += [f"- **{one['guard']}**: {one['text']}" for one in said["banners"]] or ["None fired."]
    if said["notes"]:
        out += ["", "## Notes", "", *(f"- {note}" for note in said["notes"])]
    for file, caption in pictures.items():
        out += ["", f"![{caption}]({file})", "", caption]
    out += ["", f"## {said['metric']} by seed", "", *_table(*by_seed(said)), "", "## Runs", ""]
    rows = [
        [run["run"], run["arm"], run["seed"], run["outcome"], number(run["value"]), run["reason"]]
        for run in said["runs"]
    ]
    rows += [[one["run"], one["arm"], "", "excluded by hand", "", one["reason"]] for one in said["excluded"]]
    out += _table(["run", "arm", "seed", "outcome", said["metric"], "reason"], rows)
    if any(arm["lr"] for arm in said["arms"]):
        out += ["", "## Learning rates", "", *_table(*rates(said))]
    out += ["", "## What differs from the baseline", ""]
    out += [f"- **{arm['arm']}**: {'; '.join(arm['configuration']) or 'nothing'}" for arm in said["arms"][1:]]
    out += ["", "## What the numbers mean", "", *(f"- **{name}**: {meaning}" for name, meaning in meanings(said))]
    out += ["", "## How to repeat it", "", "```", *commands(said), "```", "", environment(said)]
    return "\n".join(out) + "\n"


def verdict(arm: dict) -> str:
    """ "inconclusive (needs n = 7)"."""
    if arm["needs"] is None:
        return arm["verdict"]
    return f"{arm['verdict']} (needs n {'> 1000' if arm['needs'] > 1000 else '= ' + str(arm['needs'])})"


def count(arm: dict) -> str:
    """ "4 of 5" where a run did not finish."""
    return str(arm["n"]) if arm["n"] == arm["runs"] else f"{arm['n']} of {arm['runs']}"


def spread(arm: dict) -> str:
    """ "2.0030 ± 0.0136"; the mean alone with one seed."""
    return number(arm["mean"]) + (f" ± {number(arm['sd'])}" if arm["sd"] is not None else "")


def ends(arm: dict) -> str:
    """ "[-0.0249, -0.0018]"; empty where there is no interval."""
    return "" if arm["low"] is None else f"[{number(arm['low'], '+')}, {number(arm['high'], '+')}]"


def p(value: float | None) -> str:
    """ "<.001", ".012"."""
    if value is None:
        return ""
    return "<.001" if value < 0.001 else f"{value:.3f}".removeprefix("0")


def steps(arm: dict) -> str:
    """Steps to the baseline's final loss, or that it was not reached."""
    if arm["target"] is None:
        return ""
    if arm["steps_to_target"] is None:
        return f"not in {arm['within_steps']:,}"
    return f"{arm['steps_to_target']:,.0f}"


def cost(arm: dict) -> list[str]:
    """Steps, FLOPs and seconds to the baseline's final loss."""
    flops, seconds = arm["flops_to_target"], arm["seconds_to_target"]
    return [
        steps(arm),
        "" if flops is None else f"{flops:.3g}",
        "" if seconds is None else f"{seconds:,.0f}" if seconds >= 100 else f"{seconds:.1f}",
    ]


def number(value: float | None, sign: str = "") -> str:
    """Four decimals, more where the value is tiny."""
    if value is None:
        return ""
    return f"{value:{sign}.4f}" if value == 0 or abs(value) >= 0.0005 else f"{value:{sign}.2g}"


def rate(lr: float | None) -> str:
    """ "0.003"; None is an arm of which no rate finished."""
    return "none finished" if lr is None else f"{lr:g}"


def rates(said: dict) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table of learning rates: an arm a row, a rate a column, the chosen one in bold."""
    tried = sorted({point["lr"] for arm in said["arms"] if arm["lr"] for point in arm["lr"]["points"]})
    rows = []
    for arm in said["arms"]:
        if not arm["lr"]:
            continue
        by_rate = {point["lr"]: point for point in arm["lr"]["points"]}
        cells = []
        for lr in tried:
            point = by_rate.get(lr)
            lost = point["runs"] - len(point["values"]) if point else 0
            text = "" if point is None else number(point["mean"]) or "-"
            text = f"**{text}**" if lr == arm["lr"]["best"] else text
            cells.append(text + (f" ({lost} of {point['runs']} lost)" if lost else ""))
        rows.append([arm["arm"], *cells, number(arm["lr"]["sensitivity"])])
    return ["arm", *(f"{lr:g}" for lr in tried), "sensitivity"], rows


def explained(arm: dict) -> str:
    """The verdict's reason, how it was paired, what could have been found."""
    said = [arm["why"]]
    if arm["pairing"]:
        rho = f", correlation of the pairs {arm['correlation']:+.2f}" if arm["correlation"] is not None else ""
        said.append(f"{arm['pairing'][0].upper()}{arm['pairing'][1:]}{rho}.")
    if arm["detectable"] is not None:
        said.append(f"{arm['n']} seeds find a difference of {number(arm['detectable'])} in 4 of 5 tries.")
    if arm["conditional"] and arm["n"]:
        said.append(f"{arm['losses']}: the mean is over those that finished, alone.")
    return " ".join(said)


def exclusions(said: dict) -> list[str]:
    """A line for each run that was left out; it stands next to the verdicts, which may hang on it."""
    return [f"excluded by hand: {one['run']}: {one['reason']}" for one in said["excluded"]]


def by_seed(said: dict) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table of values: a seed a row, an arm a column; what did not finish says so."""
    arms = [arm["arm"] for arm in said["arms"]]
    cells: dict[tuple[int, str], list[str]] = {}
    for run in said["runs"]:
        cells.setdefault((run["seed"], run["arm"]), []).append(number(run["value"]) or run["outcome"])
    seeds = sorted({seed for seed, _ in cells})
    return ["seed", *arms], [[str(seed), *(", ".join(cells.get((seed, arm), ["-"])) for arm in arms)] for seed in seeds]


def legend(said: dict) -> str:
    """What the table is in."""
    noise = f"; noise between seeds (sd, pooled over arms) {number(said['noise_sd'])}" if said["noise_sd"] else ""
    some = any(arm["conditional"] and arm["n"] for arm in said["arms"])
    mark = "; * over the runs that finished alone" if some else ""
    effect = f"smallest effect of interest {said['effect']:.4g}"
    return f"{said['metric']} in {said['unit']}, lower is better; {effect}{noise}{mark}"


def meanings(said: dict) -> list[tuple[str, str]]:
    """Each number in a line."""
    level, effect = f"{1 - said['alpha']:.0%}", f"{said['effect']:.4g}"
    found = [
        (
            "verdict",
            f"better or worse: Holm p below {said['alpha']:g}; equivalent: the difference lies inside ±{effect}; "
            "inconclusive: neither can be said yet",
        ),
        ("needs n", "seeds per arm that find a difference of the size in question in 4 of 5 tries"),
        ("n", "runs that finished, one for each seed"),
        ("mean ± sd", f"of {said['metric']} over the seeds, at the end of the budget"),
        ("difference", f"arm minus {said['baseline']}; with pairs, the mean of the differences at each seed"),
        (
            f"{level} interval",
            f"Student-t; over many such experiments {level} of the intervals hold the true difference",
        ),
        ("p (Holm)", "chance of a difference this large if there were none, corrected for the number of arms"),
        ("noise between seeds", "sd of runs that differ in nothing but the seed, pooled over the arms"),
        ("finds", "true difference that so many seeds find in 4 of 5 tries, at Holm's strictest step"),
        (
            "correlation of the pairs",
            "how alike a seed moves the arm and the baseline; high values narrow the interval",
        ),
        (
            "steps to the baseline's loss",
            "where the arm's mean validation curve first reaches the baseline's last value, "
            "between two evaluations by a straight line",
        ),
    ]
    if any(arm["lr"] for arm in said["arms"]):
        found.append(("sensitivity", "mean over the grid of learning rates, above the best of them"))
    return found


def commands(said: dict) -> list[str]:
    """What to type."""
    excluded = "".join(f' --exclude {one["run"]} --reason "{one["reason"]}"' for one in said["excluded"])
    if said["folder"]:
        return [
            f"python -m toolkit.ablate {said['folder']}/plan.gin",
            f"python -m toolkit.compare {said['folder']}{excluded}",
        ]
    folders = [run["path"] for run in said["runs"]]
    again = [
        f"python -m toolkit.run --base {folder}/config.gin --name {folder.rsplit('/', 1)[-1]}" for folder in folders
    ]
    return [*again, f"python -m toolkit.compare {' '.join(folders)}{excluded}"]


def environment(said: dict) -> str:
    """What it ran on."""
    known = said["environment"]
    if not known["device"]:
        return "No run was begun."
    packages = ", ".join(f"{name} {version}" for name, version in (known["packages"] or {}).items())
    commit = f"commit {known['commit']}" if known["commit"] else "no commit known"
    dirty = " with changes" if known["dirty"] else ""
    machine = f"{known['device_name']} ({known['device']}), {known['precision']}, Python {known['python']}"
    return f"{machine}, {packages}; {commit}{dirty}."


def _grid(titles, right) -> Table:
    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for title in titles:
        grid.add_column(title, justify="right" if title in right else "left", overflow="fold")
    return grid


def _table(head: list[str], rows: list[list]) -> list[str]:
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in rows]
    return ["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *("| " + " | ".join(row) + " |" for row in cells)]
