"""Signs of life: processes that train together tell each other their current step. If one dies, hangs or stays behind,
the others name it and end instead of waiting for it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from typing import TypedDict

import torch.distributed as dist

INTERVAL = 1.0  # seconds between two signs of life
GRACE = 5.0  # seconds to wait for signs that explain a failure, and for the main thread to notice a lost rank
log = logging.getLogger("toolkit")


class Failure(TypedDict):
    """Why a rank has failed, and the ranks that can no longer report it."""

    reason: str
    mute: list[int]


class Sign(TypedDict):
    """A sign of life, which a rank writes into the store as JSON.

    torchrun  the number of the machine's torchrun, or None     beat    the number of this sign
    state     "trains"; "leaves" or "waits" at the end          failed  why the rank has failed, or None
    """

    host: str
    pid: int
    torchrun: str | None
    beat: int
    step: int
    state: str
    failed: Failure | None


class RankLost(Exception):
    """Another rank has died, hangs or has failed. ``mute`` is the set of ranks that can no longer report this."""

    def __init__(self, reason: str, mute: set[int] | None = None):
        super().__init__(reason)
        self.mute = mute or set()


class Heartbeat:
    """Sends the signs of life of one rank, and watches those of the others.

    Every second a thread writes this rank's sign into a store that all ranks share, and reads the other signs. The
    training loop only assigns to ``step`` once per step.

    A rank is lost if its sign says that it has failed, if its sign has not changed for ``timeout`` seconds, or if its
    process has ended (known at once under the same torchrun). The main thread's next collective operation then fails,
    and ``leave`` returns the reason. If that operation waits for ever instead, the thread calls ``report(reason)``,
    prints the main thread's stack on stderr, and ends the process with exit code 1. Time in which this process itself
    is stopped does not count, so a job may be suspended."""

    def __init__(self, store: dist.Store, rank: int, world: int, timeout: int, report: Callable[[str], None]):
        self.step = 0
        self.lost: RankLost | None = None
        self._store, self._rank, self._timeout, self._report = store, rank, timeout, report
        self._others = [other for other in range(world) if other != rank]
        self._host, self._torchrun = socket.gethostname(), os.environ.get("GROUP_RANK")
        self._count, self._state = 0, "trains"  # the state may become "leaves" or "waits"
        self._failed: Failure | None = None
        self._signs: dict[int, Sign] = {}
        self._silence = dict.fromkeys(self._others, 0.0)  # seconds without a new sign, by rank
        self._known, self._leave_called, self._over, self._wake = (threading.Event() for _ in range(4))
        self._write_sign()  # so that the others know this process from the start
        self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)
        self._thread.start()

    def leave(self, error: BaseException | None, patience: float) -> RankLost | None:
        """Stop sending signs. Returns RankLost if another rank caused this rank to end, else None.

        ``error`` is the error that ends this process, or None. If it is a RuntimeError, as broken collective operations
        raise it, look for a lost rank that explains it. Whatever the error is, tell the other ranks what failed.

        Without an error, wait until all other ranks leave too, because torchrun would end those that still write files.
        Ranks that have not left after ``patience`` seconds are lost."""
        self._leave_called.set()
        if error is None:
            self._set_state("leaves")
            if not self._known.wait(patience):
                self.lost = self.lost or self._find_late(f"{patience:.0f} s")
        elif isinstance(error, RuntimeError):  # a broken collective operation raises it, without naming a rank
            self._set_state("waits")
            if not self._known.wait(GRACE):
                timed_out = "timed out" in str(error).lower()
                self.lost = self.lost or self._find_silent() or (self._find_late(str(error)) if timed_out else None)
        self._over.set()
        self._wake.set()
        self._thread.join(GRACE)
        lost = self.lost if error is None or isinstance(error, RuntimeError) else None
        if error is not None or lost:
            failure = f"{self._label(self._rank)} has failed at step {self.step}: {type(error).__name__}: {error}"
            self._failed = {"reason": str(lost or failure), "mute": sorted(lost.mute) if lost else []}
            if not self._thread.is_alive():  # otherwise the store does not answer
                with contextlib.suppress(dist.DistError):  # the store itself may be lost
                    self._write_sign()
        if lost:
            self._announce(lost)
        return lost

    # ---- the thread -----------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Write this rank's sign and check the others, until ``leave`` is over or a rank is lost."""
        while not (self._over.is_set() or self.lost):
            interval = INTERVAL if self._state == "trains" else INTERVAL / 10
            self._wake.wait(interval)
            self._wake.clear()
            try:
                written_state = self._write_sign()
                self.lost = self._check_others(interval) or self.lost
            except dist.DistNetworkError as error:
                if self._state == "leaves":  # without torchrun, rank 0 holds the store and may leave first
                    break
                self.lost = RankLost(f"the store that the ranks share was lost, because torchrun has ended: {error}")
            except dist.DistStoreError:
                continue  # torchrun is stopped, but has not ended: signs can't be read, so no rank counts as lost
            all_leave = written_state == "leaves" and all(self._leaves(other) for other in self._others)
            if self.lost or all_leave:
                self._known.set()
        self._known.set()
        if self.lost and not self._leave_called.wait(GRACE):
            try:
                main_thread = threading.main_thread().ident
                assert main_thread is not None, "the main thread has been started"
                stack = traceback.format_stack(sys._current_frames()[main_thread])
                log.error("%s\nThis rank, %d, is at\n%s", self.lost, self._rank, "".join(stack))
                self._announce(self.lost)
            finally:
                os._exit(1)

    def _write_sign(self) -> str:
        """Write this rank's sign. Returns the state in it."""
        self._count += 1
        sign: Sign = {
            "host": self._host,
            "pid": os.getpid(),
            "torchrun": self._torchrun,
            "beat": self._count,
            "step": self.step,
            "state": self._state,
            "failed": self._failed,
        }
        self._store.set(str(self._rank), json.dumps(sign))
        return sign["state"]

    def _check_others(self, waited: float) -> RankLost | None:
        """Read the others' signs, ``waited`` seconds after the last time. Returns the first rank that is lost."""
        for other in self._others:
            before, now = self._signs.get(other), self._read_sign(other)
            has_ended = now is not None and self._has_ended(now)
            if has_ended:
                now = self._read_sign(other)  # it may have written a last sign in between
            self._silence[other] = self._silence[other] + waited if now == before else 0.0
            if now is not None:
                self._signs[other] = now
            if now is not None and now["failed"]:
                return RankLost(now["failed"]["reason"], set(now["failed"]["mute"]))
            if now is not None and now["state"] == "leaves":
                continue
            if has_ended and now is not None:
                return RankLost(
                    f"{self._label(other)} has ended; its last sign of life was at step {now['step']}", {other}
                )
            if self._silence[other] >= self._timeout:
                at = f" since step {now['step']}" if now else ""
                return RankLost(
                    f"{self._label(other)} has given no sign of life for {self._timeout} s{at}; if the machine is only "
                    "slow, raise Experiment.rank_timeout",
                    {other},
                )
        return None

    def _read_sign(self, other: int) -> Sign | None:
        """The latest sign of a rank, or None before its first."""
        key = str(other)
        return json.loads(self._store.get(key)) if self._store.check([key]) else None

    def _leaves(self, other: int) -> bool:
        """Whether a rank's latest sign says that it leaves."""
        sign = self._signs.get(other)
        return sign is not None and sign["state"] == "leaves"

    def _has_ended(self, sign: Sign) -> bool:
        """Whether a process has ended. Known only under the same torchrun, since others may be on other machines."""
        if os.name != "posix" or sign["torchrun"] is None or sign["torchrun"] != self._torchrun:
            return False
        try:
            os.kill(sign["pid"], 0)
        except ProcessLookupError:
            return True
        return False

    # ---- the lost rank ---------------------------------------------------------------------------------------------

    def _set_state(self, state: str) -> None:
        """Set the state of this rank and have the thread write it at once."""
        self._state = state
        self._wake.set()

    def _find_silent(self) -> RankLost | None:
        """Return the ranks whose signs have stopped, as the cause of a broken collective operation."""
        silent = {other: self._signs[other]["step"] for other in self._signs if self._silence[other] >= 3 * INTERVAL}
        names = " and ".join(f"{self._label(other)} since step {step}" for other, step in silent.items())
        return RankLost(f"no sign of life from {names}", set(silent)) if silent else None

    def _find_late(self, waited: str) -> RankLost | None:
        """Return the ranks that still train while the others wait for them. ``waited`` says for how long, or which
        error ended the waiting."""
        late = [
            f"{self._label(rank)} at step {sign['step']}"
            for rank, sign in self._signs.items()
            if sign["state"] == "trains"
        ]
        return RankLost(f"the other ranks waited too long ({waited}) for {' and '.join(late)}") if late else None

    def _label(self, rank: int) -> str:
        """A rank with its host and process id, for messages."""
        if rank == self._rank:
            return f"rank {rank} ({self._host}, pid {os.getpid()})"
        sign = self._signs.get(rank)
        return f"rank {rank} ({sign['host']}, pid {sign['pid']})" if sign else f"rank {rank}"

    def _announce(self, lost: RankLost) -> None:
        """Call ``report`` in one rank only: the lowest that is neither lost nor unable to report."""
        if self._rank == min({self._rank, *self._others} - lost.mute):
            self._report(str(lost))
