"""Small random models in the tier code of ``convert``, for its tests."""

import json
import os
import subprocess
import sys
from pathlib import Path

import remotecode
import torch

from toolkit.compose import Run, compose, load_shelf
from toolkit.exchange import outgoing
from toolkit.exchange import remotecode as writer
from toolkit.exchange.tiers import MODEL_KINDS
from toolkit.registry import CATALOG

ROOT = Path(__file__).parent.parent
load_shelf()
PARTS = {
    entry.name: entry
    for entry in CATALOG.values()
    if entry.kind in MODEL_KINDS and entry.module.startswith(("comp", "too"))
}
SIZES = [
    "GPT.dim = 24",
    "GPT.n_layer = 3",
    "GPT.n_head = 4",
    "Experiment.seq_len = 24",
    "Experiment.tokenizer = @Bytes",
]
MIXED = [
    "GPT.block = @HyperConnections",
    "GPT.mixer = [@ValueResidual, @GatedLinearRecurrence, @a/SelfAttention]",
    "GPT.position = [@RoPE, @b/RoPE]",
    "b/RoPE.theta = 500.0",
    "a/SelfAttention.qk_norm = @RMSNorm",
    "GPT.ffn = [@SwiGLU, @MixtureOfExperts]",
    "GPT.norm = [@RMSNorm, @LayerNorm]",
    "GPT.tie_embeddings = False",
    "GPT.dropout = 0.1",
]
OWN = '''"""A part of somebody else."""
import functools, math
from typing import Annotated

import torch
from annotated_types import Gt
from torch import Tensor, nn

import own_helper as helper
from own_helper import LOW, Base, table
from toolkit.registry import register

HIGH: float = 2.0
LIMITS = [LOW]
LIMITS.append(HIGH)  # a statement that binds no name


# A comment above a class.
@register("norm")
class OwnNorm(Base):
    """x times a learned factor, limited."""

    def __init__(self, dim: int, factor: Annotated[float, Gt(0)] = 1.5, names: tuple = ("a", "b")):
        super().__init__()
        self.gain = nn.Parameter(torch.full((dim,), factor))
        self.register_buffer("step", torch.arange(1, dim + 1).float() / dim, persistent=False)
        self.plain = torch.ones(dim)
        self.names = names
        self.again = self.gain  # one parameter with two names

    def forward(self, x: Tensor) -> Tensor:  # (..., C) -> (..., C)
        import fractions

        assert isinstance(self.names, tuple) and fractions.Fraction(1, 2) == 0.5
        return helper.limited(x * self.again * self.step * self.plain, LIMITS[0], LIMITS[1]) * table()[0]


@register("norm")
class Unused(nn.Module):
    """Never copied."""

    def __init__(self, dim: int):
        super().__init__()
        import package_that_nobody_has
'''
HELPER = """import functools
from torch import nn

LOW = -3.0

class Base(nn.Module):
    pass

def limited(x, low, high):
    return _clamp(x, low, high)

def _clamp(x, low, high):
    return x.clamp(low, high)

@functools.cache
def table():
    return [1.0]

def left_out():
    return 7
"""


def built(*bindings: str, overlays: tuple[str, ...] = ()) -> Run:
    """A small model with random weights, as an opened run that is in no folder."""
    config, _ = compose(["gin/model/tiny.gin", *overlays], [*SIZES, *bindings])
    experiment = config.build()
    tokenizer = experiment.tokenizer()
    torch.manual_seed(0)
    model = experiment.model(tokenizer.vocab_size, experiment.seq_len).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return Run(config, experiment, tokenizer, model, Path("none"), torch.device("cpu"))


def write(run: Run, folder: Path) -> Path:
    """The folder of a model, without tokenizer, card and proof."""
    folder.mkdir(parents=True)
    writer.write_code(run, folder)
    writer.write_model(run, folder, "float32", {"eos_token_id": 256}, outgoing.SHARD)
    return folder


def measured(
    folders: list[Path],
    target: Path,
    python: str = sys.executable,
    check: str = "everything",
    path: Path | None = None,
) -> dict[str, dict]:
    """The results of a check of tests/remotecode.py for the folders, by name. ``path``: where Python finds more."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= {} if path is None else {"PYTHONPATH": str(path)}
    command = [python, "-P", remotecode.__file__, check, str(target), *map(str, folders)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return {Path(folder).name: results for folder, results in json.loads(target.read_text()).items()}


def exported_parts(tmp_path) -> dict[str, Path]:
    """A folder for each model part of the shelf, in a model that has it; and one for many parts together."""
    folders = {}
    for entry in PARTS.values():
        bindings = [] if entry.kind == "model" else [f"GPT.{entry.kind} = @{entry.name}"]
        overlays = [
            path for path in (ROOT / "gin" / entry.kind).glob("*.gin") if f"@{entry.name}\n" in path.read_text()
        ]
        run = built(*bindings, overlays=tuple(map(str, overlays[:1])))
        assert any(name == entry.name for _, name in run.config.parts), entry.name
        folders[entry.name] = write(run, tmp_path / entry.name)
    return folders | {"mixed": write(built(*MIXED), tmp_path / "mixed")}
