"""Sentences and numbers about a record, shared by all outputs: terminal, HTML and Markdown say the same.

Nothing here is escaped. Each output escapes for its own format, with ``toolkit.output.escape``."""

from __future__ import annotations

import shlex

from toolkit.comparison.record import ArmRecord, RatePoint, Record, ResolutionRecord
from toolkit.comparison.statistics import MOST


def formatted(value: object, spec: str) -> str:
    """Format a number from a file. None gives an empty text; anything else that is no number is shown as it is."""
    try:
        return "" if value is None else format(value, spec)
    except (TypeError, ValueError, OverflowError):
        return str(value)


def verdict(arm: ArmRecord) -> str:
    """The verdict as text: "better", or "inconclusive (needs n = 7)"."""
    if arm["needs"] is None:
        return arm["verdict"]
    return f"{arm['verdict']} ({needed(arm)})"


def needed(arm: ArmRecord) -> str:
    """The number of seeds that an inconclusive arm needs, as a phrase: "needs n = 7"."""
    number_of_seeds = needs(arm)
    return f"needs n {'' if number_of_seeds.startswith('>') else '= '}{number_of_seeds}"


def needs(arm: ArmRecord) -> str:
    """The number of seeds that an inconclusive arm needs: "7" or "> 1000"; empty for other verdicts."""
    return "" if arm["needs"] is None else f"> {MOST}" if arm["needs"] > MOST else str(arm["needs"])


def count(arm: ArmRecord) -> str:
    """The number of runs with a value: "5", or "4 of 5" if a run did not finish."""
    return str(arm["n"]) if arm["n"] == arm["runs"] else f"{arm['n']} of {arm['runs']}"


def spread(arm: ArmRecord) -> str:
    """Mean and sd: "2.0030 ± 0.0136"; with one seed only the mean."""
    return number(arm["mean"]) + (f" ± {number(arm['sd'])}" if arm["sd"] is not None else "")


def interval(arm: ArmRecord) -> str:
    """The interval as text: "[-0.0249, -0.0018]"; empty if there is none."""
    return "" if arm["low"] is None else f"[{number(arm['low'], '+')}, {number(arm['high'], '+')}]"


def interval_like(arm: ArmRecord) -> str:
    """The interval for items like these as text; empty if there is none."""
    return "" if arm["low_like"] is None else f"[{number(arm['low_like'], '+')}, {number(arm['high_like'], '+')}]"


def has_looks(record: Record) -> bool:
    """Whether some arm's p is sequential and its interval repeated."""
    return any(arm["sequential"] for arm in record["arms"])


def look(arm: ArmRecord) -> str:
    """The look at which an arm was judged, and its seeds: "2 of 4: 5 seeds", or "3 of 5 planned" if other seeds are to
    come; empty for one look at all of them."""
    if arm["look"].startswith("of"):
        return f"{arm['look_n']} {arm['look']}"
    return f"{arm['look'].removeprefix('look ').split(',')[0]}: {arm['look_n']} seeds" if arm["look"] else ""


def interval_title(record: Record) -> str:
    """The title of the column of intervals."""
    return f"{1 - record['alpha']:.0%} {'repeated ' if has_looks(record) else ''}interval"


def p_title(record: Record) -> str:
    """The title of the column of p-values."""
    return "seq. p (Holm)" if has_looks(record) else "p (Holm)"


def p_value(value: float | None) -> str:
    """A p-value as text: "<.001" or ".012"; empty for None."""
    if not isinstance(value, int | float):
        return formatted(value, "")
    return "<.001" if value < 0.001 else f"{value:.3f}".removeprefix("0")


def steps(arm: ArmRecord) -> str:
    """Steps until the arm reaches the baseline's final loss: "1,200", or "not in 2,000"; empty if unknown."""
    if arm["target"] is None:
        return ""
    if arm["steps_to_target"] is None:
        return f"not in {formatted(arm['within_steps'], ',')}"
    return formatted(arm["steps_to_target"], ",.0f")


def cost(arm: ArmRecord) -> list[str]:
    """[steps, FLOPs, seconds] until the arm reaches the baseline's final loss, as text."""
    seconds = arm["seconds_to_target"]
    short = isinstance(seconds, float) and seconds < 100
    return [steps(arm), formatted(arm["flops_to_target"], ".3g"), formatted(seconds, ".1f" if short else ",.0f")]


def number(value: float | None, sign: str = "") -> str:
    """A number with four decimals, or with two significant digits if it is tiny; ``sign`` is "+" or ""."""
    tiny = isinstance(value, float) and 0 < abs(value) < 0.0005
    return formatted(value, f"{sign}.2g" if tiny else f"{sign}.4f")


def rate(lr: float | None) -> str:
    """A learning rate as text: "0.003". None means that no run of the arm finished at any rate."""
    return "none finished" if lr is None else formatted(lr, "g")


def rates(record: Record) -> tuple[list[str], list[list[tuple[str, bool]]]]:
    """(head, rows) of the table of learning rates, with a row for each arm and a column for each rate. A cell is (text,
    whether this rate was chosen)."""
    tuned = [(arm["arm"], arm["lr"]) for arm in record["arms"] if arm["lr"]]
    rates_tried = _ordered({point["lr"] for _, arm_rates in tuned for point in arm_rates["points"]})
    rows = []
    for name, arm_rates in tuned:
        by_rate = {point["lr"]: point for point in arm_rates["points"]}
        cells = [(_point(by_rate.get(lr)), lr == arm_rates["best"]) for lr in rates_tried]
        rows.append([(name, False), *cells, (number(arm_rates["sensitivity"]), False)])
    return ["arm", *map(rate, rates_tried), "sensitivity"], rows


def _point(point: RatePoint | None) -> str:
    if point is None:
        return ""
    lost = point["runs"] - len(point["values"])
    return (number(point["mean"]) or "-") + (f" ({lost} of {point['runs']} lost)" if lost else "")


def _ordered(values: set) -> list:
    """Sort numbers by size; other values, which a damaged file may hold, follow as text."""
    numbers = {value for value in values if isinstance(value, int | float)}
    return [*sorted(numbers), *sorted(values - numbers, key=str)]


def explanation(arm: ArmRecord) -> str:
    """Explain an arm's verdict: its reason, its pairing, and the difference that its seeds can detect."""
    sentences = [arm["why"]]
    if arm["pairing"]:
        rho = f"; correlation of the pairs {arm['correlation']:+.2f}" if arm["correlation"] is not None else ""
        sentences.append(f"{arm['pairing'][0].upper()}{arm['pairing'][1:]}{rho}.")
    if arm["detectable"] is not None:
        detectable = number(arm["detectable"])
        sentences.append(f"With these seeds, a true difference of {detectable} is detected with 80 % power.")
    if arm["low_like"] is not None:
        parts = ", ".join(
            f"{part} {share}" for part, share in zip(("seeds", "items", "rest"), shares(arm), strict=True)
        )
        sentences.append(
            f"For items like these {formatted(arm['items'], ',')}, the interval is {interval_like(arm)}; the parts of "
            f"the difference's variance are: {parts}."
        )
    if arm["diverged_p"] is not None:
        sentences.append(
            f"The test that it diverges as often as the baseline has p = {p_value(arm['diverged_p'])} (Fisher's exact)."
        )
    if arm["conditional"] and arm["n"]:
        sentences.append(f"{arm['losses']}; the mean covers only the runs that finished.")
    return " ".join(sentences)


def shares(arm: ArmRecord) -> list[str]:
    """The shares of seeds, items and the rest in the variance of the mean difference: "25%"."""
    return [formatted(arm[key], ".0%") for key in ("share_seeds", "share_items", "share_rest")]


def by_item(record: Record) -> tuple[list[str], list[list[str]]]:
    """(head, rows) of the table of intervals by item, with a row for each arm that has both intervals."""
    rows = [
        [
            arm["arm"],
            number(arm["difference"], "+"),
            interval(arm),
            interval_like(arm),
            formatted(arm["items"], ","),
            *shares(arm),
        ]
        for arm in record["arms"]
        if arm["low_like"] is not None
    ]
    head = ["arm", "difference", "these items", "items like these", "items", "var: seeds", "var: items", "var: rest"]
    return head, rows


def resolution(record: Record) -> tuple[list[str], list[list[str]]]:
    """(head, rows) of the table of what each metric can resolve."""
    rows = []
    for one in record["resolution"]:
        unit = "" if one["unit"] == one["metric"] else one["unit"]
        numbers = [number(one["noise_sd"]), number(one["detectable"]), number(one["largest"])]
        between = " over ".join(one["between"] or ())
        counts = [formatted(one["seeds"], ","), formatted(one["items"], ",")]
        rows.append([one["metric"], unit, *counts, *numbers, between, p_value(one["p"]), _apart(one)])
    head = ["metric", "unit", "seeds", "items", "noise sd", "finds", "largest", "between", "p", "arms apart"]
    return head, rows


def _apart(one: ResolutionRecord) -> str:
    if one["tells_apart"] is None:
        return "not tested"
    return "yes" if one["tells_apart"] else "by verdict" if one["by_verdict"] else "no"


def without_separation(record: Record) -> list[str]:
    """A sentence for each metric that tells no two arms apart, or can't be tested."""
    return [sentence for one in record["resolution"] if (sentence := _without_separation(one))]


def _without_separation(one: ResolutionRecord) -> str:
    metric, arms, seeds = one["metric"], one["arms"], formatted(one["seeds"], ",")
    items = "" if one["items"] is None else f", {formatted(one['items'], ',')} items"
    if one["tells_apart"]:
        return ""
    if one["tells_apart"] is None:
        why = "the differences have no spread over the seeds"
        if one["arms"] == 1:
            why = "only one arm has values"
        elif one["seeds"] in (0, 1):
            why = "the test needs two seeds in each arm"
        return f"{metric} is not tested: {why} ({seeds} seeds{items})."
    if one["p"] is None:
        return f"{metric} has the same values in all {arms} arms, so it tells nothing ({seeds} seeds{items})."
    if one["by_verdict"]:
        return (
            f"{metric}: the verdicts tell arms from the baseline, but the test over all pairs of {arms} arms, which is "
            f"stricter, does not (p = {p_value(one['p'])}; {seeds} seeds{items})."
        )
    unit = "" if one["unit"] == metric else f" {one['unit']}"
    finds = "" if one["detectable"] is None else f", and {seeds} seeds find {number(one['detectable'])} with 80 % power"
    return (
        f"{metric} tells no two of the {arms} arms apart at this size (p = {p_value(one['p'])}; {seeds} seeds{items}): "
        f"the largest difference is {number(one['largest'])}{unit}{finds}."
    )


def exclusions(record: Record) -> list[str]:
    """A line for each excluded run. Outputs show it next to the verdicts, since these may depend on it."""
    return [f"excluded by hand: {one['run']}: {one['reason']}" for one in record["excluded"]]


def by_seed(record: Record) -> tuple[list[str], list[list[tuple[str, bool]]]]:
    """(head, rows) of the table of values, with a row for each seed and a column for each arm. A cell is (text, whether
    a run of it has no value); for such a run the text is its outcome."""
    arms = [arm["arm"] for arm in record["arms"]]
    cells: dict[tuple, list[tuple[str, bool]]] = {}
    for run in record["runs"]:
        lost = run["value"] is None
        cells.setdefault((run["seed"], run["arm"]), []).append((run["outcome"] if lost else number(run["value"]), lost))
    rows = []
    for seed in _ordered({seed for seed, _ in cells}):
        row = [cells.get((seed, arm), [("-", False)]) for arm in arms]
        rows.append([(str(seed), False), *((", ".join(t for t, _ in c), any(lost for _, lost in c)) for c in row)])
    return ["seed", *arms], rows


def legend(record: Record) -> str:
    """The line below the table: metric, unit, direction, smallest effect and noise."""
    noise = f"; noise between seeds (sd, pooled over arms) {number(record['noise_sd'])}" if record["noise_sd"] else ""
    has_conditional = any(arm["conditional"] and arm["n"] for arm in record["arms"])
    mark = "; * only the runs that finished" if has_conditional else ""
    effect = f"smallest effect of interest {record['effect']:.4g}" if record["effect"] is not None else "no --effect"
    better = "lower" if record["lower_is_better"] else "higher"
    in_unit = "" if record["unit"] == record["metric"] else f" in {record['unit']}"
    return f"{record['metric']}{in_unit}, {better} is better; {effect}{noise}{_looks(record)}{mark}"


def _looks(record: Record) -> str:
    if not record["looks"]:
        return "; p allows for several looks" if has_looks(record) else ""
    seeds = ", ".join(formatted(count, ",") for count in record["looks"]["seeds"])
    return f"; looks at {seeds} seeds ({record['looks']['spending']})"


WITHOUT_EFFECT = (
    "better or worse: a t test shows that the difference is not zero (Holm-adjusted p below {:g}); inconclusive: it "
    "does not. Without a smallest effect of interest (--effect), no arm is equivalent"
)


def _needs_meaning(record: Record) -> list[tuple[str, str]]:
    looks = "; with several looks, what they leave to spend counts" if has_looks(record) else ""
    return [
        (
            "needs n",
            "number of seeds per arm that would detect the smallest effect of interest with 80 % power; if the arm has "
            f"that many seeds already, the number that would detect half of this effect{looks}",
        )
    ]


def meanings(record: Record) -> list[tuple[str, str]]:
    """(name, meaning) of each number in the outputs."""
    level, effect = f"{1 - record['alpha']:.0%}", formatted(record["effect"], ".4g")
    result = [
        ("verdict", WITHOUT_EFFECT.format(record["alpha"]))
        if record["effect"] is None
        else (
            "verdict",
            f"equivalent: two one-sided t tests show that the difference lies inside ±{effect} (Holm-adjusted p below "
            f"{record['alpha']:g}); better or worse: a t test shows that the difference is not zero (Holm-adjusted p "
            f"below {record['alpha']:g}), and the arm is not equivalent; inconclusive: no test shows either",
        ),
        *(_needs_meaning(record) if record["effect"] is not None else ()),
        ("n", "number of runs that finished, one per seed"),
        ("mean ± sd", f"mean and standard deviation of {record['metric']} over the seeds, at the end of the budget"),
        (
            "difference",
            f"arm minus {record['baseline']}; if paired, the mean over seeds of the difference at each seed",
        ),
        *(_of_looks(level) if has_looks(record) else _of_one_look(level)),
        ("noise between seeds", "standard deviation of runs that differ only in the seed, pooled over the arms"),
        ("in noise sd", "the difference divided by the noise between seeds"),
        (
            "detects",
            "true difference that this number of seeds detects with 80 % power, at alpha divided by the number of arms "
            "(the strictest step of Holm's method)",
        ),
        (
            "correlation of the pairs",
            "correlation between arm and baseline over the seeds; a high correlation narrows the interval of a paired "
            "difference",
        ),
        (
            "steps to the baseline's loss",
            "step at which the arm's mean validation curve first reaches the baseline's last value, interpolated "
            "linearly between evaluations",
        ),
    ]
    if any(arm["low_like"] is not None for arm in record["arms"]):
        result += [
            (
                "these items",
                f"{level} interval of the difference on exactly these items; other seeds may differ. The verdict is "
                "about these items",
            ),
            (
                "items like these",
                f"{level} interval of the difference on all items of the kind from which these were drawn; other seeds "
                "and other items may differ. If it includes zero, the difference may be one of these items only",
            ),
            (
                "var: seeds, items, rest",
                "shares of the variance of the difference: more seeds reduce the first, more items the second, and "
                "both reduce the rest",
            ),
        ]
    if record["resolution"]:
        result += [
            ("noise sd", "noise between seeds of this metric: standard deviation over the seeds, pooled over the arms"),
            (
                "finds",
                "true difference from the baseline that these seeds find with 80 % power, at alpha divided by the "
                "number of comparisons with the baseline",
            ),
            ("largest", "largest difference between the means of any two arms"),
            (
                "arms apart",
                "whether any two arms differ in this metric: t tests of all pairs of arms, adjusted by Holm's method; "
                f"p is the smallest, and yes means below {record['alpha']:g}",
            ),
        ]
    if any(arm["lr"] for arm in record["arms"]):
        result.append(("sensitivity", "distance from the mean over the grid of learning rates to the best value on it"))
    return result


def _of_one_look(level: str) -> list[tuple[str, str]]:
    return [
        (
            f"{level} interval",
            f"Student-t interval for this arm alone, not adjusted for the number of arms; in many repetitions of the "
            f"experiment, {level} of such intervals would contain the true difference",
        ),
        (
            "p (Holm)",
            "probability of a difference at least this large in either direction if the true difference were zero, "
            "adjusted for the number of arms by Holm's method",
        ),
    ]


def _of_looks(level: str) -> list[tuple[str, str]]:
    return [
        ("look", "the look at which the arm was judged, and its seeds; an arm with a verdict stops there"),
        (
            f"{level} repeated interval",
            "interval for this arm alone, not adjusted for the number of arms, with the level of its look; at whatever "
            f"look one stops, {level} of such intervals contain the true difference",
        ),
        (
            "seq. p (Holm)",
            "sequential p: smallest alpha at which the arm would have been decided at this look or an earlier one, so "
            "that it stays valid at whatever look one stops; adjusted for the number of arms by Holm's method",
        ),
    ]


def no_banner(record: Record) -> str:
    """What it means that no guard fired."""
    if record["table"] is None:
        return "no guard fired: no difference was found except the factor"
    if not record["table"]["checked"]:
        return "no guard could be checked"
    return f"nothing was found by the guards that a table allows: {', '.join(record['table']['checked'])}"


def not_known(record: Record) -> list[str]:
    """A line on the guards that could not be checked, if there are any."""
    if record["table"] is None:
        return []
    listed = ", ".join(record["table"]["not_known"])
    return [f"not known, since a table holds no facts of the runs: {listed}"]


def commands(record: Record) -> list[str]:
    """Shell commands that repeat the comparison. Names and reasons are quoted, so none of them can act as a command."""
    if record["table"] is not None:
        return [record["table"]["command"]]
    excluded = "".join(
        f" --exclude {shlex.quote(one['run'])} --reason {shlex.quote(one['reason'])}" for one in record["excluded"]
    )
    if record["folder"]:
        plan = f"{record['folder']}/plan.gin"
        return [
            f"python -m toolkit.ablate {shlex.quote(plan)}",
            f"python -m toolkit.compare {shlex.quote(record['folder'])}{excluded}",
        ]
    folders = [run["path"] for run in record["runs"]]
    again = [
        f"python -m toolkit.run --base {shlex.quote(folder + '/config.gin')} "
        f"--name {shlex.quote(folder.rsplit('/', 1)[-1])}"
        for folder in folders
    ]
    return [*again, f"python -m toolkit.compare {' '.join(map(shlex.quote, folders))}{excluded}"]


def environment(record: Record) -> str:
    """The device, precision, versions and commit of the runs, in one sentence."""
    known = record["environment"]
    if record["table"] is not None:
        digest = f", SHA-256 {record['table']['sha256']}" if record["table"]["sha256"] else ""
        return f"Values from {record['table']['file']}{digest}. Device, versions and code of the runs are not known."
    if not known["device"]:
        return "No run was started."
    versions = known["packages"] if isinstance(known["packages"], dict) else {}
    packages = ", ".join(f"{name} {version}" for name, version in versions.items())
    commit = f"commit {known['commit']}" if known["commit"] else "commit unknown"
    dirty = " with uncommitted changes" if known["dirty"] else ""
    machine = f"{known['device_name']} ({known['device']}), {known['precision']}, Python {known['python']}"
    return f"{machine}, {packages}; {commit}{dirty}."
