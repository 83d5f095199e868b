"""Exit codes of a comparison, so that a script can ask for the verdict before it keeps a change."""

from __future__ import annotations

from toolkit.comparison.record import Record
from toolkit.comparison.results import IDENTICAL
from toolkit.config.spelling import suggest

BETTER, WORSE, INCONCLUSIVE, EQUIVALENT = 0, 1, 3, 4  # 2 is bad input
GUARD = 1  # a guard fired, under --strict
CODES = {"better": BETTER, "worse": WORSE, "equivalent": EQUIVALENT, IDENTICAL: EQUIVALENT}  # others: inconclusive
WORST_FIRST = (WORSE, INCONCLUSIVE, EQUIVALENT, BETTER)


def code(record: Record, by_verdict: bool, strict: bool, arm: str | None = None) -> int:
    """The exit code: GUARD if a guard fired and ``strict``. Otherwise 0 or, with ``by_verdict``, that of ``arm``'s
    verdict; without an arm, the worst of all arms. Raises ValueError if there is no such arm besides the baseline."""
    words = {each["arm"]: each["verdict"] for each in record["arms"] if each["arm"] != record["baseline"]}
    if arm is not None and arm not in words:
        why = "that is the baseline" if arm == record["baseline"] else f"not an arm{suggest(arm, words)}"
        raise ValueError(f"--exit-arm {arm}: {why}; the arms are {', '.join(words)}")
    if strict and record["banners"]:
        return GUARD
    if not by_verdict:
        return 0
    codes = [CODES.get(word, INCONCLUSIVE) for name, word in words.items() if arm in (None, name)]
    return next((each for each in WORST_FIRST if each in codes), INCONCLUSIVE)
