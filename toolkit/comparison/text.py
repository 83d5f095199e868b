"""What the outputs say of a record, in plain words and numbers: the same sentence on the terminal and on paper.

Nothing here is escaped: each output does that for its own medium, with ``toolkit.output.escape``."""

from __future__ import annotations

import shlex

from toolkit.comparison.statistics import MOST


def form(value: object, spec: str) -> str:
    """A number from a file by a format; what is no number as it is, and None as nothing."""
    try:
        return "" if value is None else format(value, spec)
    except (TypeError, ValueError, OverflowError):
        return str(value)


def verdict(arm: dict) -> str:
    """ "inconclusive (needs n = 7)"."""
    if arm["needs"] is None:
        return arm["verdict"]
    return f"{arm['verdict']} ({needed(arm)})"


def needed(arm: dict) -> str:
    """ "needs n = 7"."""
    return f"needs n {'' if arm['needs'] > MOST else '= '}{needs(arm)}"


def needs(arm: dict) -> str:
    """Seeds that an inconclusive arm needs: "7", "> 1000"."""
    return "" if arm["needs"] is None else f"> {MOST}" if arm["needs"] > MOST else str(arm["needs"])


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
        return f"not in {form(arm['within_steps'], ',')}"
    return form(arm["steps_to_target"], ",.0f")


def cost(arm: dict) -> list[str]:
    """Steps, FLOPs and seconds to the baseline's final loss."""
    seconds = arm["seconds_to_target"]
    short = isinstance(seconds, float) and seconds < 100
    return [steps(arm), form(arm["flops_to_target"], ".3g"), form(seconds, ".1f" if short else ",.0f")]


def number(value: float | None, sign: str = "") -> str:
    """Four decimals, more where the value is tiny."""
    tiny = isinstance(value, float) and 0 < abs(value) < 0.0005
    return form(value, f"{sign}.2g" if tiny else f"{sign}.4f")


def rate(lr: float | None) -> str:
    """ "0.003"; None is an arm of which no rate finished."""
    return "none finished" if lr is None else form(lr, "g")


def rates(said: dict) -> tuple[list[str], list[list[tuple[str, bool]]]]:
    """Head and rows of the table of learning rates: an arm a row, a rate a column. A cell is a text and whether its
    rate was chosen."""
    tried = _ordered({point["lr"] for arm in said["arms"] if arm["lr"] for point in arm["lr"]["points"]})
    rows = []
    for arm in (arm for arm in said["arms"] if arm["lr"]):
        by_rate = {point["lr"]: point for point in arm["lr"]["points"]}
        cells = [(_point(by_rate.get(lr)), lr == arm["lr"]["best"]) for lr in tried]
        rows.append([(arm["arm"], False), *cells, (number(arm["lr"]["sensitivity"]), False)])
    return ["arm", *map(rate, tried), "sensitivity"], rows


def _point(point: dict | None) -> str:
    if point is None:
        return ""
    lost = point["runs"] - len(point["values"])
    return (number(point["mean"]) or "-") + (f" ({lost} of {point['runs']} lost)" if lost else "")


def _ordered(values: set) -> list:
    """Numbers by size; what else a file may hold comes after them."""
    numbers = {value for value in values if isinstance(value, int | float)}
    return [*sorted(numbers), *sorted(values - numbers, key=str)]


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


def by_seed(said: dict) -> tuple[list[str], list[list[tuple[str, bool]]]]:
    """Head and rows of the table of values: a seed a row, an arm a column. A cell is a text and whether it is the
    outcome of a run that did not finish."""
    arms = [arm["arm"] for arm in said["arms"]]
    cells: dict[tuple, list[tuple[str, bool]]] = {}
    for run in said["runs"]:
        lost = run["value"] is None
        cells.setdefault((run["seed"], run["arm"]), []).append((run["outcome"] if lost else number(run["value"]), lost))
    rows = []
    for seed in _ordered({seed for seed, _ in cells}):
        row = [cells.get((seed, arm), [("-", False)]) for arm in arms]
        rows.append([(str(seed), False), *((", ".join(t for t, _ in c), any(lost for _, lost in c)) for c in row)])
    return ["seed", *arms], rows


def legend(said: dict) -> str:
    """What the table is in."""
    noise = f"; noise between seeds (sd, pooled over arms) {number(said['noise_sd'])}" if said["noise_sd"] else ""
    some = any(arm["conditional"] and arm["n"] for arm in said["arms"])
    mark = "; * over the runs that finished alone" if some else ""
    effect = f"smallest effect of interest {said['effect']:.4g}"
    better = "lower" if said["lower_is_better"] else "higher"
    return f"{said['metric']} in {said['unit']}, {better} is better; {effect}{noise}{mark}"


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
    """What to type. Names and reasons are quoted for the shell: none of them can become a command."""
    excluded = "".join(
        f" --exclude {shlex.quote(one['run'])} --reason {shlex.quote(one['reason'])}" for one in said["excluded"]
    )
    if said["folder"]:
        plan = f"{said['folder']}/plan.gin"
        return [
            f"python -m toolkit.ablate {shlex.quote(plan)}",
            f"python -m toolkit.compare {shlex.quote(said['folder'])}{excluded}",
        ]
    folders = [run["path"] for run in said["runs"]]
    again = [
        f"python -m toolkit.run --base {shlex.quote(folder + '/config.gin')} "
        f"--name {shlex.quote(folder.rsplit('/', 1)[-1])}"
        for folder in folders
    ]
    return [*again, f"python -m toolkit.compare {' '.join(map(shlex.quote, folders))}{excluded}"]


def environment(said: dict) -> str:
    """What it ran on."""
    known = said["environment"]
    if not known["device"]:
        return "No run was begun."
    versions = known["packages"] if isinstance(known["packages"], dict) else {}
    packages = ", ".join(f"{name} {version}" for name, version in versions.items())
    commit = f"commit {known['commit']}" if known["commit"] else "no commit known"
    dirty = " with changes" if known["dirty"] else ""
    machine = f"{known['device_name']} ({known['device']}), {known['precision']}, Python {known['python']}"
    return f"{machine}, {packages}; {commit}{dirty}."
