"""What is special about a comparison whose values come from somebody's table, and not from the folders of runs: the
table holds no facts of the runs, so most guards can't be checked."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

# Guards that need the files of a run. Their names are those of the banners.
NOT_KNOWN = (
    "config", "parameters", "FLOPs per token", "training FLOPs", "tokens", "tokenizer", "evaluation set", "batch order",
    "precision", "device", "threads", "versions", "commit", "code", "dirty tree", "products", "TOOLKIT_CPU",
    "attention", "evaluator", "damaged", "edited", "plan edited", "runs without a job", "one run twice", "no-op",
    "resumed", "spiked", "jobs at once", "step times", "rates not tuned", "unequal tuning", "learning rate",
    "LR grid edge", "selection seeds", "looked before", "looks not known",
)  # fmt: skip
CHECKED = ("unequal seeds", "repeated seeds", "budget")  # guards that the columns of seeds and steps allow


@dataclass(frozen=True)
class Table:
    """The table that the values come from. ``command`` are the words that repeat the comparison. ``sha256`` is that of
    the file, empty for a folder. ``seed`` and ``step`` are the columns with the seeds and with the steps, None if the
    table has none. ``notes`` are sentences on what was read how."""

    file: str
    sha256: str
    command: tuple[str, ...]
    seed: str | None
    step: str | None
    notes: tuple[str, ...] = ()

    @property
    def pairing(self) -> str:
        """Why the runs of two arms with equal seeds are paired."""
        return (
            f"paired by seed, after {self.seed!r} in the table; whether the batch order and the code are the same is "
            "not known"
        )

    @property
    def no_pairing(self) -> str:
        """Why they are not, if the table has no seeds."""
        return "not paired (Welch's t test): no column of seeds was named"

    @property
    def checked(self) -> list[str]:
        """The guards that can be checked."""
        with_seeds = CHECKED[:2] if self.seed else ()
        return [*with_seeds, *(CHECKED[2:] if self.step else ())]

    @property
    def not_known(self) -> list[str]:
        """The guards that can't be checked."""
        return [*(name for name in CHECKED if name not in self.checked), *NOT_KNOWN]

    @property
    def shell(self) -> str:
        """The command that repeats the comparison, quoted for a shell."""
        return shlex.join(("python", "-m", "toolkit.compare", *self.command))
