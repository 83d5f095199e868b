"""Guards on the environment of the runs: data, precision, device, versions and code must be equal in all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from toolkit.comparison.banner import (
    Banner,
    describe_groups,
    group_by,
    group_names,
    report_differences,
    short,
    show,
)
from toolkit.comparison.runs import PlanRecord, Run
from toolkit.config import keys


def environment(runs: list[Run]) -> Iterable[Banner]:
    """Settings that must be equal in all runs, whatever is compared: data, precision, device, versions, code."""

    def evaluation(run: Run) -> str:
        windows = run.facts.get("windows", {}).get("val")
        return f"{show(run.config.get('Experiment.eval_windows'))} of {windows} windows, data {data(run)}"

    def order(run: Run) -> str:
        sizes = (f"{name} {show(run.config.get(f'Experiment.{name}'))}" for name in ("batch_size", "seq_len"))
        return f"data {data(run)}, {', '.join(sizes)}"

    def data(run: Run) -> str:
        return short(run.facts.get("data"))

    yield from report_differences(runs, "tokenizer", lambda run: short(run.facts.get("tokenizer")))
    yield from report_differences(runs, "evaluation set", evaluation)
    yield from report_differences(runs, "batch order", order)
    yield from report_differences(
        runs, "precision", lambda run: f"{run.facts.get('precision')}, compiled {run.facts.get('compiled')}"
    )
    yield from report_differences(
        runs, "device", lambda run: f"{run.facts.get('device')}, {run.facts.get('device_name')}"
    )
    on_cpu = [run for run in runs if run.facts.get("device") == "cpu"]
    yield from report_differences(on_cpu, "threads", lambda run: str(run.facts.get("threads")))
    yield from _versions(runs)
    yield from report_differences(runs, "commit", lambda run: short(run.facts.get("commit")))
    unknown = [run for run in runs if not run.facts.get("commit") and run.facts.get("package_sha256")]
    yield from report_differences(unknown, "code", lambda run: short(run.facts["package_sha256"]))
    dirty = group_by(runs, lambda run: bool(run.facts.get("dirty")))
    if True in dirty:
        yield Banner("dirty tree", f"the code had uncommitted changes: {group_names(dirty, True)}")


def _versions(runs: list[Run]) -> Iterable[Banner]:
    """Versions of Python and packages that differ; those that are equal in all runs are not listed."""

    def versions(run: Run) -> frozenset[tuple[str, str]]:
        packages = {"python": run.facts.get("python"), **run.facts.get("packages", {})}
        return frozenset((name, str(version)) for name, version in packages.items())

    def describe(version_set: frozenset[tuple[str, str]]) -> str:
        differing = sorted(version_set - common)
        return ", ".join(f"{name} {version}" for name, version in differing) or "none of these"

    groups = group_by(runs, versions)
    common = frozenset.intersection(*groups) if groups else frozenset()
    if len(groups) > 1:
        yield Banner("versions", describe_groups(groups, describe))


def implementations(plan: PlanRecord, runs: list[Run]) -> Iterable[Banner]:
    """Matrix products, or an attention of the same name, that were computed by different code in different runs."""
    if keys.matches("Experiment.precision", plan.factor):
        return
    with_products = [run for run in runs if "products" in run.facts]
    yield from report_differences(with_products, "products", lambda run: str(run.facts["products"]))
    on_cpu = [run for run in runs if run.facts.get("device") == "cpu"]
    yield from report_differences(
        on_cpu, "TOOLKIT_CPU", lambda run: str(run.facts.get("cpu", "fast"))
    )  # once no choice
    kernels = {run.path: _attention_kernels(run) for run in runs}
    for name in dict.fromkeys(name for by_name in kernels.values() for name in by_name):
        users = [run for run in runs if name in kernels[run.path]]
        yield from report_differences(users, f"attention {name}", _entry(name, lambda run: kernels[run.path]))


def _entry(name: str, entries: Callable[[Run], dict[str, str]]) -> Callable[[Run], str]:
    """A function that looks up the entry ``name`` of a run."""
    return lambda run: entries(run)[name]


def _attention_kernels(run: Run) -> dict[str, str]:
    """The implementation of each attention of a run, from a fact such as "FlashAttention: flash-attn 2.7, SDPA"."""
    entries = (entry.partition(": ") for entry in (run.facts.get("attention") or "").split(", "))
    return {name: implementation for name, _, implementation in entries}


def evaluators(runs: list[Run]) -> Iterable[Banner]:
    """An evaluator of the same name that had other items or knobs in different runs."""
    for name in sorted({name for run in runs for name in run.facts.get("evaluators", {})}):
        users = [run for run in runs if name in run.facts.get("evaluators", {})]
        fingerprint = _entry(name, lambda run: run.facts["evaluators"])
        yield from report_differences(users, f"evaluator {name}", fingerprint, short)


def own_code(runs: list[Run]) -> Iterable[Banner]:
    """A user's own part whose code differs between the runs that use it."""
    names = {name for run in runs for name in run.facts.get("code", {})}
    for name in sorted(names):
        users = [run for run in runs if name in run.facts.get("code", {})]
        yield from report_differences(users, f"code/{name}", _entry(name, lambda run: run.facts["code"]), short)
