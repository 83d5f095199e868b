"""The keys of facts.json, with which a run says what it is: written by a run, read by ``compare`` and other commands.

A docstring follows each key. Every key may be missing where facts are read: a run that was never started, or whose
facts.json is damaged, has no facts, and older versions wrote fewer keys. Read such a key with ``.get``. mypy checks the
types; ``tests/test_facts.py`` also checks the names in ``.get``, where mypy allows any."""

# Without ``from __future__ import annotations``, which would hide NotRequired from __required_keys__.
from pathlib import Path
from typing import NotRequired, cast

from typing_extensions import TypedDict  # typing's own can't be validated by pydantic in Python 3.11

from toolkit.store.disk import read_json_or_warn


class Parameters(TypedDict):
    """Numbers of parameters."""

    total: int
    """All parameters but those in rows that only pad the vocabulary."""
    non_embedding: int
    """Without the embedding tables and the output matrix."""
    active: int
    """Used for one token: less than the total only for a part with ``idle_parameters``, such as a mixture of experts.
    """
    padding: int
    """In rows that only pad the vocabulary."""


class Windows(TypedDict):
    """Numbers of samples of ``Experiment.seq_len`` tokens in the two splits of the data."""

    train: int
    """Samples in one epoch of training."""
    val: int
    """Samples in the whole validation split."""


class Resumed(TypedDict):
    """One resumption of a run."""

    step: int
    """The step at which training continued."""
    changed: dict[str, list[object]]
    """{flat config key: [before, after]}: changes of the config that were allowed."""
    damaged: NotRequired[list[str]]
    """A sentence about each file of the run that was damaged before this step. Missing without damage."""


_From = TypedDict("_From", {"from": str | None}, total=False)
"""``from`` (a keyword of Python, hence this form): path of the checkpoint from which training last started, another
run's (``--from``) or the run's own (``--resume``); None if it started with new weights. Of a run that ``convert``
made, the folder or the name on the Hub of the transformers model."""


class Facts(_From, total=False):
    """The content of facts.json."""

    # ---- what is trained; from here on, written before the first step -----------------------------------------------
    name: str
    """Name of the run's folder."""
    steps: int
    """Optimizer steps of the whole run (``Experiment.steps``), whether or not it got that far."""
    seed: int
    """``Experiment.seed``."""
    tokens: int
    """Training tokens of the whole run: steps x sequences per step x tokens per sequence."""
    parameters: Parameters
    """Numbers of parameters of the model."""
    flops_per_token: int | None
    """Training FLOPs per token, forward and backward. None if a part can't run on the meta device, where they are
    counted."""
    config: dict[str, object]
    """{flat key: value} of every knob that is in use, such as "GPT.dim" or "near/SlidingWindow.window"."""
    config_sha256: str
    """SHA-256, hex, of the text of config.gin without its seal. Older runs lack it."""
    code: dict[str, str]
    """{file name: SHA-256, hex} of the files in code/. Older runs lack it."""
    init: dict[str, str]
    """{parameter: "SHAPE DIGEST"} of the initial values; a resumed run keeps those of its start. Older runs lack it."""
    data: str
    """Fingerprint of the data, hex: covers every token of both splits, and the tokenizer."""
    tokenizer: str
    """Fingerprint of the tokenizer, hex: equal for tokenizers that give every text the same ids."""
    tokenizer_files: dict[str, str]
    """{file name: SHA-256, hex} of the files in tokenizer/. Older runs lack it."""
    encoded_by: str | None
    """What encoded the text: "encode", or "encode_batch: " and a library; None if the data does not say. Older runs
    lack it."""
    evaluators: dict[str, str]
    """{name: fingerprint of its items and knobs} of the evaluators. Older runs lack it."""
    probes: list[str]
    """Names of the probes. Older runs lack it."""
    windows: Windows
    """Numbers of training and validation samples."""

    # ---- how and where ----------------------------------------------------------------------------------------------
    precision: str
    """The floating-point type of the training computations: "float32" or "bfloat16"."""
    compiled: bool
    """Whether torch.compile was used."""
    attention: str
    """The attention kernels in words, such as "FlashAttention: flash-attn 2.7"; "none" for a model without any."""
    products: str | None
    """The library that multiplies float32 matrices on the CPU, in words; None on other devices and in other precisions.
    Older runs lack it."""
    processes: int
    """Processes that trained together."""
    device: str
    """The kind of device: "cpu" or "cuda"."""
    device_name: str
    """Name of the processor or GPU."""
    peak_tokens_per_s: float | None
    """Tokens per second of all devices at their peak FLOP/s; None where the peak is not known. Older runs lack it."""
    threads: int
    """CPU threads of each process."""
    cpu: str
    """"fast" if the toolkit's own code for CPUs was on, "plain" if TOOLKIT_CPU turned it off; "plain, fast from step
    100" if a resumed run changed it. Runs older than the switch lack it: they were "fast"."""
    spin: str
    """How CPU threads wait for each other, in words. Older runs lack it."""
    keeps_freed_memory: bool
    """Whether the C library keeps freed memory for the next step (on a CPU under Linux). Older runs lack it."""
    python: str
    """Version of Python."""
    packages: dict[str, str]
    """{package: version} of the installed packages that may affect results."""
    commit: str | None
    """Git commit of the toolkit; None if it is not in a repository."""
    dirty: bool | None
    """Whether the toolkit's code had uncommitted changes; None without a commit."""
    package_sha256: str
    """SHA-256, hex, of the Python files of toolkit/ and components/. Older runs lack it."""

    # ---- the run's progress -----------------------------------------------------------------------------------------
    started: float
    """When the process that wrote this started: seconds since 1970. Older runs lack it."""
    resumed: list[Resumed]
    """The resumptions of the run, the oldest first."""
    seconds_before: float
    """Seconds that earlier processes spent on the run. Only until the training ends, when ``seconds`` replaces it."""

    # ---- written when the training ends: done, stopped or preempted -------------------------------------------------
    seconds: float
    """Wall-clock seconds spent on the run, added up over its resumptions, but without processes that were killed."""
    ended: float
    """When the training ended: seconds since 1970. Older runs lack it."""
    peak_memory_bytes: int
    """Peak memory in bytes: of tensors on the GPU, or of the main process on a CPU; 0 if the system does not tell."""
    weights_sha256: str | None
    """SHA-256, hex, of the weights in the newest checkpoint; None without a checkpoint."""
    final: dict[str, str | float]
    """The run's ``state`` and ``step``, the ``best`` val/loss_nats, and the last value of each metric."""

    seal: str
    """SHA-256, hex, of all other keys, to detect damage. Older runs lack it."""


def read(run: Path) -> Facts:
    """Read facts.json in the folder of a run; {} if it is missing or, with a warning, if it is damaged."""
    return cast(Facts, read_json_or_warn(run / "facts.json"))  # JSON has no types; the seal detects damage
