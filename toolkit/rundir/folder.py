"""A run's folder: lock it for one process, write the run's state into it, and decide whether the run may continue."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import filelock

from toolkit.config import changes
from toolkit.config.layers import Config, statements
from toolkit.cpu import switch
from toolkit.evaluation import itemfile
from toolkit.output.errors import BAD_INPUT, DIVERGED, PREEMPTED, STORAGE
from toolkit.parallel import distributed
from toolkit.protocols import Tokenizer
from toolkit.store import checkpoint, factsfile, journal, seal
from toolkit.store.disk import read_json_or_warn, refuse_links, sha256, write_bytes, write_json, write_text

log = logging.getLogger("toolkit")
EXIT_CODES = {"done": 0, "stopped": 0, "diverged": DIVERGED, "preempted": PREEMPTED}  # by the state of a run
FAILURE_CODES = {  # of a failed run, by the kind of error
    "OSError": STORAGE,
    "OutOfMemoryError": STORAGE,
    "ValueError": BAD_INPUT,
    "ConfigError": BAD_INPUT,
}


def run_name(overlays: Sequence[str]) -> str:
    """The default name of a run: the names of its overlays, such as quickstart or tiny-alibi."""
    return "-".join(Path(overlay).stem for overlay in overlays) or "default"


class RunDir:
    """The folder ``root``/``name`` of a run. Raises ValueError for an invalid name, for a link that leads out of
    ``root``, for a run that exists already unless ``resume``, and for a missing run with ``resume``."""

    def __init__(self, root: Path, name: str, resume: bool) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.+=,@-]{0,119}", name):
            raise ValueError(f"--name {name!r}: a run's name is 1 to 120 letters, digits and _.+=,@- (no slash)")
        self.path, self.resume = root / name, resume
        self.changes: dict[str, list] = {}  # of the config, by a resumed run: {key: [before, now]}
        self.damage: list[str] = []  # sentences about damaged files of a resumed run
        inside = Path(os.path.realpath(self.path)).is_relative_to(root.resolve()) and self.path.is_dir()
        if self.path.is_symlink() and not inside:
            raise ValueError(
                f"{self.path} is a link that leads out of {root}: choose another --name, or another folder with --runs"
            )
        self.opened_at = time.time()
        self.config_before = self._read_config() if resume else ""
        if self.begun() and not resume and distributed.rank() == 0:
            others = (root / f"{name}-{i}" for i in range(2, 1000))
            free = next(path.name for path in others if not path.exists())
            raise ValueError(
                f"{self.path} already exists: continue it with --resume, or start a new run with --name {free}"
            )
        if resume and not self.exists():
            raise ValueError(f"--resume: run not found: {self.path}; leave out --resume to start it")

    def exists(self) -> bool:
        """Whether the folder holds a run, started or only configured."""
        return (self.path / "config.gin").is_file()

    def begun(self) -> bool:
        """Whether the run reached its first step, so that the folder holds results that took time to compute."""
        return (self.path / "facts.json").is_file() or (self.path / "checkpoints").is_dir()

    def finished(self, steps: int) -> bool:
        """Whether this is a resumed run that is already done, after ``steps`` steps or more."""
        status = self.read("status.json")
        return self.resume and status.get("state") == "done" and status.get("step", 0) >= steps

    @contextlib.contextmanager
    def opened(self, config: Config, allow_change: bool) -> Iterator[None]:
        """Lock the folder for this process, and check the config against the one that the run was started with.

        Raises ValueError if another process has locked the folder, if a resumed run's config differs and
        ``allow_change`` is False, or if a link in the folder leads out of it; OSError if the folder can't be written. A
        folder that was created by this call is deleted on exit if the run never started, unless it was preempted."""
        new = not self.path.exists()
        refuse_links(self.path)
        lock = filelock.FileLock(self.path / ".lock")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
        except filelock.Timeout:
            raise ValueError(f"another process is using {self.path}; wait, or choose another --name") from None
        except OSError as error:
            raise OSError(f"can't write to {self.path}: {error}; choose another folder with --runs") from error
        try:
            self._check_config(config, allow_change)
            self._delete_drafts()
            yield
        finally:
            preempted = self.read("status.json").get("state") == "preempted"
            lock.release()
            if new and not preempted and not self.begun():
                shutil.rmtree(self.path, ignore_errors=True)

    def write_config(self, config: Config, code: list[Path]) -> None:
        """Write the config, the bindings, and copies of the files in ``code``. From then on the run can be resumed.

        A resumed run with the same statements keeps the text of its config.gin, whose digest older files have."""
        digests = {}
        for file in code:
            (self.path / "code").mkdir(exist_ok=True)
            copy = self.path / "code" / file.name
            if file != copy.resolve():
                write_bytes(copy, file.read_bytes())
            digests[f"code/{file.name}"] = sha256(copy)
        written = [f"import {module}" for module in config.imports] + [str(binding) for binding in config.written]
        write_text(self.path / "bindings.gin", "".join(line + "\n" for line in written))
        digests["bindings.gin"] = sha256(self.path / "bindings.gin")
        text = self.config_before if self._has_statements_of(config) else config.text
        write_text(self.path / "config.gin", seal.seal_text(text, digests))  # last: it makes the folder a run
        self.write_status("preparing", 0)

    def write_start(self, tokenizer: Tokenizer, facts: factsfile.Facts, step: int) -> None:
        """Write what else must be in the folder before the first step: the tokenizer and facts.json."""
        previous = factsfile.read(self.path)
        entry: factsfile.Resumed = {"step": step, "changed": self.changes}
        if self.damage:
            entry["damaged"] = self.damage
        resumed = [*previous.get("resumed", []), entry] if self.resume else []
        if facts["device"] == "cpu" and previous.get("threads", facts["threads"]) != facts["threads"]:
            log.warning(
                "%s was trained with %s threads and continues with %s: sums are rounded differently, so its results "
                "are not bit for bit those of an uninterrupted run; for equal results, bind Experiment.threads = %s",
                *(self.path, previous["threads"], facts["threads"], previous["threads"]),
            )
        if facts["device"] == "cpu" and previous.get("device") == "cpu":
            facts = facts | {"cpu": self._cpu_so_far(previous.get("cpu", switch.CHOICES[0]), facts["cpu"], step)}
        files = previous.get("tokenizer_files") or {}
        if not files or seal.compare(self.path / "tokenizer", files):
            (self.path / "tokenizer").mkdir(exist_ok=True)
            tokenizer.save(self.path / "tokenizer")
            files = {path.name: sha256(path) for path in sorted((self.path / "tokenizer").iterdir()) if path.is_file()}
        seconds = previous.get("seconds", previous.get("seconds_before", 0.0))  # a killed process wrote only the latter
        facts = facts | {"tokenizer_files": files, "resumed": resumed, "seconds_before": seconds}
        write_json(self.path / "facts.json", dict(facts))

    def _cpu_so_far(self, before: str, now: str, step: int) -> str:
        """What TOOLKIT_CPU was so far, such as "fast" or, with a warning, "plain, fast from step 5"."""
        latest = before.rpartition(", ")[2].partition(" ")[0]
        if now == latest:
            return before
        log.warning(
            "%s was trained with %s=%s and continues with %s: sums are rounded differently, so its results are not bit "
            "for bit those of an uninterrupted run; for equal results, set %s=%s",
            *(self.path, switch.VARIABLE, latest, now, switch.VARIABLE, latest),
        )
        return f"{before}, {now} from step {step}"

    def check_journal(self, source: Path | None) -> None:
        """Check the rows and samples before the checkpoint ``source``. Damage gives a warning, and an entry in
        facts.json."""
        manifest = checkpoint.read_manifest(source) if source else {}
        covered = manifest.get("journal")
        damage = journal.damage(self.path, covered) if covered else None
        if damage:
            log.warning("%s; the run continues, but its curve before step %d is incomplete", damage, manifest["step"])
            self.damage = [damage]

    def check_sources(self, found: dict[str, str], before: Mapping[str, object]) -> None:
        """Raise ValueError if a resumed run would continue with other text, another tokenizer or another config: if one
        of the fingerprints in ``found`` differs from that in ``before``."""
        other = {"data": "on other text", "tokenizer": "with another tokenizer", "config": "under another config"}
        for key, fingerprint in found.items():
            if before.get(key, fingerprint) != fingerprint:
                raise ValueError(
                    f"{self.path} was trained {other[key]}: the fingerprint was {str(before[key])[:12]}, is now "
                    f"{fingerprint[:12]}; restore the former {key}, or start a new run with --from {self.path}"
                )

    def check_config_digest(self, config: Config, before: Mapping[str, object]) -> None:
        """Raise ValueError if the checkpoint with the entries ``before`` was trained under another config. Older
        versions took the digest of all text in config.gin, with the comments."""
        text_digest = hashlib.sha256(self.config_before.encode()).hexdigest()
        if not (self._has_statements_of(config) and before.get("config") == text_digest):
            self.check_sources({"config": config.digest}, before)

    def _read_config(self) -> str:
        """The text of the run's config.gin without its seal; "" if it is missing or damaged."""
        try:
            config = seal.unseal_text((self.path / "config.gin").read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError):
            return ""
        return "" if config.problem else config.text

    def _has_statements_of(self, config: Config) -> bool:
        """Whether the config.gin that this object found differs from a config in comments at most."""
        return statements(self.config_before) == statements(config.text)

    def write_status(self, state: str, step: int | None = None, **more: object) -> None:
        """Write the run's state to status.json; does nothing if the folder holds no run. ``step`` defaults to the step
        at which a resumed run would begin. A file that can't be written gives a warning only: the exit code tells the
        state as well."""
        if not self.exists():
            return
        if step is None:
            saved = [int(folder.name[5:]) for folder in (self.path / "checkpoints").glob(checkpoint.STEPS)]
            step = max([self.read("status.json").get("step", 0), *saved])
        ended = state not in ("preparing", "running")
        end = {"journal": journal.measure(self.path, itemfile.names(self.path, step))} if ended else {}
        status = {"state": state, "step": step, "time": time.time()} | end | more
        try:
            write_json(self.path / "status.json", status)
        except OSError as error:
            if not self._overwrite_status(status):
                log.warning("status.json could not be updated (the run is %s): %s", state, error)

    def _overwrite_status(self, status: dict[str, object]) -> bool:
        """Overwrite the existing status.json, which needs no room on a full disk; returns whether that worked."""
        try:
            with open(self.path / "status.json", "r+b") as file:
                file.write(json.dumps(seal.seal(status)).encode())
                file.truncate()
        except OSError:
            return False
        return True

    def write_end(self, outcome: Mapping[str, Any], peak_memory: int, digest: str | None) -> None:
        """Add the results to facts.json, and write the last status. ``outcome``: see ``toolkit.training.train``.
        ``peak_memory`` is in bytes; ``digest`` is the SHA-256 of the newest weights. Raises OSError."""
        final = {key: value for key, value in outcome.items() if key != "not_saved"}
        facts = factsfile.read(self.path)
        facts["seconds"] = facts.pop("seconds_before", 0.0) + time.time() - self.opened_at
        facts |= {"peak_memory_bytes": peak_memory, "weights_sha256": digest, "final": final, "ended": time.time()}
        write_json(self.path / "facts.json", dict(facts))
        not_saved = {"not_saved": outcome["not_saved"]} if "not_saved" in outcome else {}
        self.write_status(outcome["state"], outcome["step"], **not_saved)

    def exit_code(self) -> int:
        """The exit code of the run's own process, derived from status.json, since a launcher of processes hides it."""
        status = self.read("status.json")
        if status.get("time", 0.0) < self.opened_at:  # not written since this object was made: the run never started
            return BAD_INPUT
        if status["state"] in ("preparing", "running"):  # all processes were killed, so none could write a status
            self.write_status("failed", reason="its processes exited without writing a status", kind="Killed")
        return EXIT_CODES.get(status["state"], FAILURE_CODES.get(status.get("kind", ""), 1))

    def read(self, name: str) -> dict[str, Any]:
        """The object in a JSON file of the run; {} if the file is missing or, with a warning, damaged."""
        return read_json_or_warn(self.path / name)

    def _delete_drafts(self) -> None:
        """Delete unfinished files that a killed process left."""
        for draft in self.path.glob("*.tmp"):
            if draft.is_file() or draft.is_symlink():
                draft.unlink(missing_ok=True)

    def _check_config(self, config: Config, allow_change: bool) -> None:
        """Note what a resumed run changes in its config. Raises ValueError if that is neither harmless nor allowed."""
        before, now = factsfile.read(self.path).get("config"), config.flat
        if not (self.resume and before):
            return
        self.changes = changes.difference(before, now)
        harmless = all(changes.shapes(key) == "harmless" for key in self.changes)
        if not harmless and not allow_change:
            remedy = "resume with the same files and bindings, or with none; --allow-change accepts the difference"
            lines = [f"{self.path} was started with another config; {remedy}:", *changes.describe(self.changes)]
            raise ValueError("\n".join(lines))
