"""Plans small enough for a test, and a launcher that runs their jobs in this process."""

from pathlib import Path

from runs import SMALL

from toolkit import run

COMMON = ["gin/model/tiny.gin", *(binding for binding in SMALL if not binding.startswith("Experiment.steps"))]
PLAN = {
    "question": "Which position encoding?",
    "arms": {"rope": [], "none": ["GPT.position = @NoPE"]},
    "common": COMMON,
    "factor": ["GPT.position"],
    "seeds": [0],
    "effect": 0.02,
    "steps": 12,
}


def write_plan(folder: Path, name: str = "question", **changed: object) -> Path:
    """experiments/NAME/plan.gin with the fields above, changed; None leaves a field out."""
    path = folder / name / "plan.gin"
    path.parent.mkdir(exist_ok=True)
    fields = {key: value for key, value in (PLAN | changed).items() if value is not None}
    path.write_text("".join(f"Ablation.{key} = {value!r}\n" for key, value in fields.items()), encoding="utf-8")
    return path


class Inline:
    """A launcher for tests: a job has ended when it was submitted. ``codes`` maps a run to what happens instead."""

    slots = 1

    def __init__(self, codes=None):
        self.order, self.codes = [], codes or {}

    def submit(self, task):
        self.order.append(task.name)
        more = ["--resume"] if (task.folder / "config.gin").is_file() else []
        try:
            return Ended(self.codes[task.name] if task.name in self.codes else run.main([*task.arguments, *more]))
        except ValueError:
            return Ended(2)

    def close(self):
        pass


class Ended:
    def __init__(self, code):
        self.code = code

    def poll(self):
        return self.code

    def stop(self):
        pass
