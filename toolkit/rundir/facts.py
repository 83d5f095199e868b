"""Measure the facts about a run: parameters, FLOPs, memory, and the device and software that it runs on.

``toolkit.store.factsfile`` describes the file that holds them."""

from __future__ import annotations

import hashlib
import logging
import platform
import re
import subprocess
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from toolkit.cpu import openmp, products, switch
from toolkit.cpu.allocator import keeps_freed_memory
from toolkit.evaluation import evaluators
from toolkit.experiment import Experiment, Parts, dtype_of, is_compiled, micro_batch_size
from toolkit.objective import Objective
from toolkit.parallel import distributed
from toolkit.root import ROOT
from toolkit.store import factsfile
from toolkit.store.disk import sha256
from toolkit.store.factsfile import Facts, Parameters

if TYPE_CHECKING:
    from toolkit.config.layers import Config
    from toolkit.rundir.folder import RunDir

log = logging.getLogger("toolkit")
Arguments = ParamSpec("Arguments")
Count = TypeVar("Count")
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
PEAKS = {  # dense bfloat16 FLOP/s from the makers' data sheets; the first name that is in the device's name counts
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
}


def at_start(
    run: RunDir,
    config: Config,
    experiment: Experiment,
    blank: Parts,
    parts: Parts,
    device: torch.device,
    source: Path | None,
) -> Facts:
    """The facts that are known before the first step. ``blank`` holds the parts built on the meta device; ``source`` is
    the checkpoint from which training starts."""
    dtype, processes, known = dtype_of(experiment, device), distributed.world_size(), environment(device)
    flops = on_meta(flops_per_token, blank.model, experiment.seq_len)
    peak = peak_flops(known["device_name"], dtype)
    input_shape = micro_batch_size(experiment, processes), experiment.seq_len
    return {
        "name": run.path.name,
        "steps": experiment.steps,
        "seed": experiment.seed,
        "tokens": experiment.steps * experiment.batch_size * experiment.seq_len,
        "parameters": parameters(blank.model),
        "flops_per_token": flops,
        "peak_tokens_per_s": processes * peak / flops if peak and flops else None,
        "precision": str(dtype).removeprefix("torch."),
        "compiled": is_compiled(experiment, device),
        "attention": attention_implementation(parts.model, device, dtype, *input_shape),
        "products": products.implementation(device.type, dtype),
        "processes": processes,
        **known,
        "data": parts.data.fingerprint(),
        "tokenizer": parts.tokenizer.fingerprint(),
        "encoded_by": getattr(parts.data, "encoded_by", None),
        "evaluators": evaluators.fingerprints(parts.evaluators | parts.final_evaluators),
        "probes": list(parts.probes),
        "windows": {"train": parts.data.windows("train"), "val": parts.data.windows("val")},
        "from": str(source) if source else None,
        "config": config.flat,
        "config_sha256": config.digest,
        "code": {path.name: sha256(path) for path in sorted((run.path / "code").glob("*.py"))},
        "init": factsfile.read(run.path).get("init", {}) if run.resume else initial_values(parts.model),
        "started": run.opened_at,
        "keeps_freed_memory": device.type == "cpu" and keeps_freed_memory(),
    }


def peak_flops(device_name: str, dtype: torch.dtype) -> float | None:
    """Peak FLOP/s of a device in bfloat16; None for another precision or a device that is not in ``PEAKS``."""
    if dtype != torch.bfloat16:
        return None
    return next((peak for name, peak in PEAKS.items() if re.search(rf"\b{name}\b", device_name)), None)


def parameters(model: nn.Module) -> Parameters:
    """Numbers of parameters. A part that leaves some of its parameters out for each token says how many in
    ``idle_parameters``."""
    sizes = {id(p): p.numel() for p in model.parameters()}
    padding = getattr(model, "padding", 0)
    tables = {id(p): p.numel() for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    output = getattr(model, "unembed", None)
    tables |= {id(p): p.numel() for p in output.parameters()} if output is not None else {}
    idle = sum(getattr(module, "idle_parameters", 0) for module in model.modules())
    total = sum(sizes.values()) - padding
    return {
        "total": total,
        "non_embedding": sum(sizes.values()) - sum(tables.values()),
        "active": total - idle,
        "padding": padding,
    }


def parameter_table(model: nn.Module) -> list[tuple[str, str, int]]:
    """A row (name, shape, parameters) for each tensor. The layers of a stack share one row, with a shape such as
    "12 of 768 x 768". Rows that pad the vocabulary are included."""
    stacks: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        stacks.setdefault(re.sub(r"\.\d+\.", ".*.", name), []).append(parameter)
    table = []
    for name, tensors in stacks.items():
        shapes = {" x ".join(f"{size:,}" for size in tensor.shape) for tensor in tensors}
        shape = shapes.pop() if len(shapes) == 1 else "various"
        count = sum(tensor.numel() for tensor in tensors)
        table.append((name, f"{len(tensors)} of {shape}" if len(tensors) > 1 else shape, count))
    return table


def on_meta(count: Callable[Arguments, Count], *arguments: Arguments.args, **options: Arguments.kwargs) -> Count | None:
    """Return ``count(*arguments, **options)``; None, with a warning, if a part does not run on meta tensors."""
    try:
        return count(*arguments, **options)
    except (NotImplementedError, RuntimeError) as error:
        reason = str(error).split("\n")[0]
        log.warning("%s can't be computed: a part does not run on meta tensors (%s)", count.__name__, reason)
        return None


def flops_per_token(model: nn.Module, seq_len: int) -> int:
    """Training FLOPs per token, forward and backward, counted on meta tensors. ``model`` is on the meta device.

    They are 3 times the matrix products of one forward pass. Products over all pairs of positions count half, because
    causal attention needs half of the pairs. Rows that pad the vocabulary are left out. A GPT with N matrix parameters,
    L layers, width d and T positions takes 6N + 6LdT."""

    def bmm_flops(a_shape: torch.Size, b_shape: torch.Size, *others: object, **options: object) -> int:
        batch, rows, inner = a_shape  # (batch, rows, inner) times (batch, inner, columns)
        columns = b_shape[-1]
        product = 2 * batch * rows * inner * columns
        return product // 2 if rows == seq_len and seq_len in (inner, columns) else product

    ids = torch.zeros(1, seq_len, dtype=torch.int64, device="meta")
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.bmm: bmm_flops})
    with torch.no_grad(), counter:
        hidden, head = model(ids)
        head.logits(hidden)
    padding_flops = 2 * seq_len * hidden.shape[-1] * (head.weight.shape[0] - head.vocab_size)
    return 3 * (counter.get_total_flops() - padding_flops) // seq_len


def memory(
    objective: Objective, optimizer: torch.optim.Optimizer, batch: int, seq_len: int, half: bool
) -> dict[str, int]:
    """Estimated bytes of weights, gradients, optimizer state, and the activations that a forward pass over ``batch``
    sequences keeps for the backward pass, counted on meta tensors. ``half``: activations have 16 bits."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
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
    """Replaces scaled_dot_product_attention on meta tensors, where torch would keep a value for each pair of
    positions. On real devices a fused kernel keeps far less."""

    class Kernel(torch.autograd.Function):
        """Keeps what a fused kernel keeps for the backward pass: q, k, v and the output."""

        @staticmethod
        def forward(ctx: FunctionCtx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # (B, H, T, D) -> (B, H, T, D of v)
            out = q.new_empty(*q.shape[:-1], v.shape[-1])
            ctx.save_for_backward(q, k, v, out)
            return out

    def __torch_function__(
        self, func: Callable, types: Sequence[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:  # as torch declares it
        if func is torch.nn.functional.scaled_dot_product_attention:
            return self.Kernel.apply(*args[:3])
        return func(*args, **(kwargs or {}))


def initial_values(model: nn.Module) -> dict[str, str]:
    """{parameter: "SHAPE DIGEST"} of a new model's values, to tell which initial values two runs share."""
    digests = {}
    for name, parameter in model.named_parameters():
        content = parameter.detach().to("cpu", torch.float32).contiguous().numpy()
        shape = "x".join(map(str, parameter.shape))
        digests[name] = f"{shape} {hashlib.sha256(content.data).hexdigest()[:12]}"
    return digests


def package_digest() -> str:
    """SHA-256, hex, over the Python files of toolkit and components: identifies the code even without a commit."""
    digest = hashlib.sha256()
    for path in sorted(path for name in ("toolkit", "components") for path in (ROOT / name).rglob("*.py")):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def environment(device: torch.device) -> Facts:
    """The facts about the device, the threads, the versions and the commit."""
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
        "cpu": switch.choice(),
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
    """The attention kernels of a model, in words: each by its class name, with what its ``implementation`` method, if
    it has one, returns for micro-batches of ``batch`` sequences. "none" for a model without any."""
    parts = []
    for part in model.modules():
        kernel = getattr(part, "attention", None)
        if isinstance(kernel, nn.Module):
            says = getattr(kernel, "implementation", None)
            parts.append(type(kernel).__name__ + (f": {says(device.type, dtype, batch, seq_len)}" if says else ""))
    return ", ".join(dict.fromkeys(parts)) or "none"


def peak_memory(device: torch.device) -> int:
    """Peak memory so far in bytes: of tensors on the GPU, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")  # on Linux; its ru_maxrss starts at the peak of the parent process
    if status.exists() and (match := re.search(r"^VmHWM:\s*(\d+) kB", status.read_text(), re.MULTILINE)):
        return 1024 * int(match[1])
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


def _processor() -> str:
    """The processor's name."""
    try:
        match = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        match = None
    return match[1] if match else platform.processor() or platform.machine()


def _git(folder: Path, *command: str) -> str | None:
    """What a git command prints when run in a folder; None if it fails."""
    try:
        result = subprocess.run(["git", *command], cwd=folder, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None
