"""What many tests need: parts of the shelf as parameters, and a GPT small enough to build hundreds of times."""

import os
from functools import partial

import pytest
import torch

import components  # noqa: F401  (fills the catalogue)
from components.attention import MathAttention
from components.block import PreNorm
from components.ffn import SwiGLU
from components.init import GPT2Init
from components.mixer import SelfAttention
from components.norm import LayerNorm
from components.position import RoPE
from toolkit.model import GPT
from toolkit.registry import CATALOG

pytest_plugins = ["matrix"]

TINY = {
    "block": PreNorm,
    "mixer": SelfAttention,
    "position": RoPE,
    "attention": MathAttention,
    "norm": LayerNorm,
    "ffn": SwiGLU,
    "init": partial(GPT2Init, std=0.3),  # wide, so that a wrong mask, position or residual moves the numbers
    "dim": 32,
    "n_layer": 2,
    "n_head": 4,
    "pad_vocab_to": 16,
}


def tiny_gpt(vocab_size: int = 50, max_len: int = 32, **overrides) -> GPT:
    """A GPT of 30k parameters, the same each time (it draws by ``torch.initial_seed()``, which the fixture below sets).
    Keywords replace slots and knobs: ``tiny_gpt(norm=RMSNorm, n_layer=1)``."""
    return GPT(vocab_size, max_len, **{**TINY, **overrides})


def parts(*kinds: str) -> list:
    """The shelf's parts of these kinds, for ``pytest.mark.parametrize("part", parts("norm", "ffn"))``."""
    entries = [e for e in CATALOG.values() if e.kind in kinds and e.module.startswith("components.")]
    return [pytest.param(e, id=f"{e.kind}-{e.name}") for e in entries]


PARITY = pytest.StashKey[list]()


def pytest_addoption(parser):
    parser.addoption("--parity", action="store_true", help="print every parity error: part, reference, largest error")


@pytest.fixture
def parity(request, record_property):
    """``parity("RMSNorm", "torch.nn.RMSNorm", ours, theirs, 1e-6)`` asserts that the largest difference, in units of
    the reference's largest value, stays below the tolerance, and puts the figure into the table of ``--parity``.
    ``ours`` and ``theirs`` are tensors, numbers, or tuples of tensors."""

    def compare(part, reference, ours, theirs, tolerance=1e-6):
        from parity.reference import relative_error

        pairs = zip(ours, theirs, strict=True) if isinstance(ours, tuple) else [(ours, theirs)]
        error = max(relative_error(one, other) for one, other in pairs)
        request.config.stash.setdefault(PARITY, []).append(part)
        record_property("parity", (part, reference, error, tolerance))
        assert error < tolerance, f"{part} against {reference}: {error:.2e}, tolerance {tolerance:.0e}"

    return compare


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Files go to one process each, for their fixtures, and so does parity's folder: it has a test of all the others.
    Slow tests go one by one."""
    from xdist.scheduler import LoadScopeScheduling

    class Folders(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.split("::")[0]
            whole = "tests/parity" if file.startswith("tests/parity/") else file
            return nodeid if config.option.markexpr == "slow" else whole

    return Folders(config, log)


def pytest_terminal_summary(terminalreporter, config):
    told = [fact for report in terminalreporter.getreports("passed") for fact in report.user_properties]
    runs = [fact for name, fact in told if name == "overlay"]
    if runs:
        terminalreporter.section("30 steps with each overlay: validation nats before and after")
        for overlay, before, after in sorted(runs):
            terminalreporter.write_line(f"{overlay:44} {before:7.4f} -> {after:7.4f}")
        terminalreporter.write_line(f"{len(runs)} overlays")
    if not config.getoption("--parity"):
        return
    worst = {}
    for part, reference, error, tolerance in [fact for name, fact in told if name == "parity"]:
        worst[part, reference] = max(worst.get((part, reference), (0.0, 0.0)), (error, tolerance))
    terminalreporter.section("parity: largest difference, in units of the reference's largest value")
    for (part, reference), (error, tolerance) in sorted(worst.items()):
        terminalreporter.write_line(f"{part:26} {error:8.1e}  (tolerance {tolerance:.0e})  {reference}")
    terminalreporter.write_line(f"{len({part for part, _ in worst})} parts, {len(worst)} comparisons")


torch.set_num_threads(1)  # sums in one order everywhere, and the tensors are too small to share out
os.environ["OMP_NUM_THREADS"] = "1"  # in the processes that tests start as well


@pytest.fixture(autouse=True)
def seed():
    """Every test starts from the same random numbers."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def cache(tmp_path_factory):
    """Token files of all tests go into one folder of their own, never into the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOOLKIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
