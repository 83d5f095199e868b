"""What is true of a run before and after it: parameters, FLOPs, memory, and what it ran on."""

from __future__ import annotations

import hashlib
import logging
import platform
import re
import subprocess
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from toolkit.cpu import openmp
from toolkit.objective import Objective
from toolkit.root import ROOT

log = logging.getLogger("toolkit")
PACKAGES = (
    "torch",
    "numpy",
    "gin-config",
    "tiktoken",
    "gigatoken",
    "tokenizers",
    "datasets",
    "safetensors",
    "schedulefree",
    "flash-attn",
)


PEAKS = {  # dense bfloat16 FLOP/s by the makers' data sheets; the first name that fits counts
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
}


def peak_flops(device_name: str, dtype: torch.dtype) -> float | None:
    """FLOP/s that a device could do in bfloat16; None for another precision, and where nobody has told us."""
    if dtype != torch.bfloat16:
        return None
    return next((peak for name, peak in PEAKS.items() if re.search(rf"\b{name}\b", device_name)), None)


def parameters(model: nn.Module) -> dict[str, int]:
    """Counts: "total" without the rows that only pad the vocabulary, which are "padding"; "non_embedding" without
    embedding tables and the output matrix; "active" is what one token passes through, the total unless a part says
    less."""
    counted = {id(p): p.numel() for p in model.parameters()}
    padding = getattr(model, "padding", 0)
    tables = {id(p): p.numel() for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    output = getattr(model, "unembed", None)
    tables |= {id(p): p.numel() for p in output.parameters()} if output is not None else {}
    idle = sum(getattr(module, "idle_parameters", 0) for module in model.modules())
    total = sum(counted.values()) - padding
    return {
        "total": total,
        "non_embedding": sum(counted.values()) - sum(tables.values()),
        "active": total - idle,
        "padding": padding,
    }


def parameter_table(model: nn.Module) -> list[tuple[str, str, int]]:
    """(name, shape or times, parameters) a row; the layers of a stack are one row, padding is not counted."""
    rows: dict[str, list] = {}
    for name, parameter in model.named_parameters():
        stacked = re.sub(r"\.\d+\.", ".*.", name)
        row = rows.setdefault(stacked, [0, set(), 0])
        row[0] += 1
        row[1].add(" x ".join(f"{size:,}" for size in parameter.shape))
        row[2] += parameter.numel()
    table = []
    for name, (times, shapes, count) in rows.items():
        shape = shapes.pop() if len(shapes) == 1 else "various"
        table.append((name, f"{times} of {shape}" if times > 1 else shape, count))
    return table


def on_meta(count: Callable, *arguments: object) -> Any:
    """``count(*arguments)``, or None, with a warning, where a part does not run on meta tensors."""
    try:
        return count(*arguments)
    except (NotImplementedError, RuntimeError) as error:
        log.warning(
            "%s is not known: a part does not run on meta tensors (%s)", count.__name__, str(error).split("\n")[0]
        )
        return None


def flops_per_token(model: nn.Module, seq_len: int) -> int:
    """Training FLOPs per token, forward and backward, counted on meta tensors: 3 times the matrix products of one
    forward pass. Products over all pairs of positions count half, since causality leaves half of the pairs:
    6N + 6LdT for a GPT with N matrix parameters. ``model`` lies on the meta device."""

    def pairs(a_shape, b_shape, *args, out_shape=None, **kwargs):
        batch, rows, inner = a_shape
        columns = b_shape[-1]
        product = 2 * batch * rows * inner * columns
        return product // 2 if rows == seq_len and seq_len in (inner, columns) else product

    ids = torch.zeros(1, seq_len, dtype=torch.int64, device="meta")
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.bmm: pairs})
    with torch.no_grad(), counter:
        hidden, head = model(ids)
        head.logits(hidden)
    padded = 2 * seq_len * hidden.shape[-1] * (head.weight.shape[0] - head.vocab_size)
    return 3 * (counter.get_total_flops() - padded) // seq_len


def memory(
    objective: Objective, optimizer: torch.optim.Optimizer, batch: int, seq_len: int, half: bool
) -> dict[str, int]:
    """An estimate in bytes: weights, gradients, optimizer state, and what a forward pass keeps for the backward pass,
    counted on meta tensors. ``half``: activations in 16 bits."""
    kept: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        return tensor

    ids = torch.zeros(batch, seq_len, dtype=torch.int64, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), _FusedAttention():
        loss = objective(ids, ids)[0]
    weights = {p.untyped_storage()._cdata: p.numel() * p.element_size() for p in objective.parameters()}
    activations = sum(size for key, size in kept.items() if key not in weights)
    for p in objective.parameters():
        p.grad = torch.empty_like(p)
    optimizer.step()
    state = sum(
        t.numel() * t.element_size() for s in optimizer.state.values() for t in s.values() if torch.is_tensor(t)
    )
    optimizer.zero_grad()
    del loss
    size = sum(weights.values())
    return {
        "weights": size,
        "gradients": size,
        "optimizer": state,
        "activations": activations * 3 // 5 if half else activations,  # norms and the residual stream stay in 32 bits
    }


class _FusedAttention(TorchFunctionMode):
    """On meta tensors, scaled_dot_product_attention takes the path that holds all pairs; real devices don't."""

    class Kernel(torch.autograd.Function):
        """Keeps what a fused kernel keeps: q, k, v and the output."""

        @staticmethod
        def forward(ctx, q, k, v):
            out = q.new_empty(*q.shape[:-1], v.shape[-1])
            ctx.save_for_backward(q, k, v, out)
            return out

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.scaled_dot_product_attention:
            return self.Kernel.apply(*args[:3])
        return func(*args, **(kwargs or {}))


def initial_values(model: nn.Module) -> dict[str, str]:
    """{parameter: "SHAPE DIGEST"} of the values that a model begins with: what two runs share can then be told."""
    told = {}
    for name, parameter in model.named_parameters():
        content = parameter.detach().to("cpu", torch.float32).contiguous().numpy()
        shape = "x".join(map(str, parameter.shape))
        told[name] = f"{shape} {hashlib.sha256(content.data).hexdigest()[:12]}"
    return told


def package_digest() -> str:
    """SHA-256 over the Python files of toolkit and components: which code ran, where no commit tells it."""
    digest = hashlib.sha256()
    for path in sorted(path for name in ("toolkit", "components") for path in (ROOT / name).rglob("*.py")):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def environment(device: torch.device) -> dict[str, object]:
    """What the run ran on: device, threads, versions, commit."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    commit = _git(ROOT / "toolkit", "rev-parse", "HEAD")
    return {
        "device": device.type,
        "device_name": name,
        "threads": torch.get_num_threads(),
        "spin": openmp.in_force(),
        "python": platform.python_version(),
        "packages": versions,
        "commit": commit,
        "package_sha256": package_digest(),
        "dirty": bool(_git(ROOT / "toolkit", "status", "--porcelain")) if commit else None,
    }


def attention_implementation(
    model: nn.Module, device: torch.device, dtype: torch.dtype, batch: int, seq_len: int
) -> str:
    """Which attention trains, in words: every kernel of the model by name, with what it says of itself for
    micro-batches of ``batch`` sequences."""
    found = []
    for part in model.modules():
        kernel = getattr(part, "attention", None)
        if isinstance(kernel, nn.Module):
            says = getattr(kernel, "implementation", None)
            found.append(type(kernel).__name__ + (f": {says(device.type, dtype, batch, seq_len)}" if says else ""))
    return ", ".join(dict.fromkeys(found)) or "none"


def peak_memory(device: torch.device) -> int:
    """Peak bytes so far: of the GPU's tensors, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")  # Linux, whose ru_maxrss starts at the peak of whatever started this process
    if status.exists() and (told := re.search(r"^VmHWM:\s*(\d+) kB", status.read_text(), re.MULTILINE)):
        return 1024 * int(told[1])
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


def _processor():
    """The processor's name, as the system tells it."""
    try:
        found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def _git(folder, *command):
    try:
        done = subprocess.run(["git", *command], cwd=folder, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
