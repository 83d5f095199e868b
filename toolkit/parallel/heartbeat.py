"""Signs of life: processes that train together tell each other how far they are, so that one that dies, hangs or stays
behind is named, and the others end instead of waiting for it."""

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

import torch.distributed as dist

INTERVAL = 1.0  # seconds between two signs
GRACE = 5.0  # seconds for others to be heard before one is judged, and for the main thread to see a loss by itself
log = logging.getLogger("toolkit")


class RankLost(Exception):
    """Another rank has died, hangs or has failed. The ranks that can't say so themselves are ``mute``."""

    def __init__(self, reason: str, mute: set[int] | None = None):
        super().__init__(reason)
        self.mute = mute or set()


class Heartbeat:
    """The signs of life of one rank, and its watch over the others': a thread that once a second writes a sign into the
    store that all share, and reads theirs. The loop pays for one assignment a step, to ``step``.

    A rank is lost once its sign says that it has failed, or has not changed for ``timeout`` seconds, or its process is
    gone (seen at once under the same torchrun). The main thread then finds its next collective broken, and hears the
    reason from ``leave``. Where it waits for ever instead, the thread calls ``report(reason)``, shows on stderr where
    the main thread stands, and ends the process with exit code 1. Time in which this process is stopped itself does
    not count, so that a job may be suspended."""

    def __init__(self, store: dist.Store, rank: int, world: int, timeout: int, report: Callable[[str], None]):
        self.step, self.lost = 0, None
        self._store, self._rank, self._timeout, self._report = store, rank, timeout, report
        self._others = [other for other in range(world) if other != rank]
        self._torchrun = os.environ.get("GROUP_RANK")  # its number among those of all machines
        self._own = {"host": socket.gethostname(), "pid": os.getpid(), "torchrun": self._torchrun}
        self._beats, self._state, self._failed = 0, "trains", None  # then "leaves", or "waits" for an explanation
        self._signs: dict[int, dict] = {}
        self._silent = dict.fromkeys(self._others, 0.0)  # seconds
        self._known, self._taken, self._over, self._wake = (threading.Event() for _ in range(4))
        self._tell()  # from the start, the others know which process this is
        self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)
        self._thread.start()

    def leave(self, error: BaseException | None, patience: float) -> RankLost | None:
        """End the signs, and return why another rank is to blame for that, or None.

        With the ``error`` that ends this process: what explains it; where it is this rank's own, the others are told.
        Without one, once all others leave as well, so that torchrun ends none that still writes; after ``patience``
        seconds those that did not come are to blame."""
        self._taken.set()
        if error is None:
            self._say("leaves")
            if not self._known.wait(patience):
                self.lost = self.lost or self._absent(f"for {patience:.0f} s")
        elif isinstance(error, RuntimeError):  # as a broken collective does; its message names no rank
            self._say("waits")
            if not self._known.wait(GRACE):
                late = "timed out" in str(error).lower()
                self.lost = self.lost or self._unheard() or (self._absent(f"({error})") if late else None)
        self._over.set()
        self._wake.set()
        self._thread.join(GRACE)
        lost = self.lost if error is None or isinstance(error, RuntimeError) else None
        if error is not None or lost:
            own = f"{self._name(self._rank)} has failed at step {self.step}: {type(error).__name__}: {error}"
            self._failed = {"reason": str(lost or own), "mute": sorted(lost.mute) if lost else []}
            if not self._thread.is_alive():  # else the store does not answer
                with contextlib.suppress(dist.DistError):  # or is what is lost
                    self._tell()
        if lost:
            self._announce(lost)
        return lost

    # ---- the thread -----------------------------------------------------------------------------------------------

    def _watch(self):
        while not (self._over.is_set() or self.lost):
            interval = INTERVAL if self._state == "trains" else INTERVAL / 10
            self._wake.wait(interval)
            self._wake.clear()
            try:
                told = self._tell()
                self.lost = self._listen(interval) or self.lost
            except dist.DistNetworkError as error:
                if self._state == "leaves":  # without torchrun it is rank 0 that holds the store, and may leave first
                    break
                self.lost = RankLost(f"the store that the ranks share is gone, with torchrun, which held it: {error}")
            except dist.DistStoreError:
                continue  # torchrun is stopped, not gone: nobody can be heard, so nobody is judged
            leaving = [other for other in self._others if self._signs.get(other, {}).get("state") == "leaves"]
            if self.lost or (told == "leaves" and leaving == self._others):
                self._known.set()
        self._known.set()
        if self.lost and not self._taken.wait(GRACE):
            try:
                stack = traceback.format_stack(sys._current_frames()[threading.main_thread().ident])
                log.error("%s\nThis rank, %d, stands at\n%s", self.lost, self._rank, "".join(stack))
                self._announce(self.lost)
            finally:
                os._exit(1)

    def _tell(self) -> str:
        """Write this rank's sign; returns the state that it tells."""
        self._beats += 1
        sign = self._own | {"beat": self._beats, "step": self.step, "state": self._state, "failed": self._failed}
        self._store.set(str(self._rank), json.dumps(sign))
        return sign["state"]

    def _listen(self, waited: float) -> RankLost | None:
        """Read the others' signs; returns the first loss."""
        for other in self._others:
            before, now = self._signs.get(other), self._read(other)
            gone = now is not None and self._is_gone(now)
            if gone:
                now = self._read(other)  # its last word may have come in between
            self._silent[other] = self._silent[other] + waited if now == before else 0.0
            if now is not None:
                self._signs[other] = now
            if now is not None and now["failed"]:
                return RankLost(now["failed"]["reason"], set(now["failed"]["mute"]))
            if now is not None and now["state"] == "leaves":
                continue
            if gone:
                return RankLost(f"{self._name(other)} is gone; last heard of at step {now['step']}", {other})
            if self._silent[other] >= self._timeout:
                at = f" since step {now['step']}" if now else ""
                return RankLost(
                    f"{self._name(other)} has given no sign of life for {self._timeout} s{at}; a machine that is this "
                    "slow needs a larger Experiment.rank_timeout",
                    {other},
                )
        return None

    def _read(self, other: int) -> dict | None:
        key = str(other)
        return json.loads(self._store.get(key)) if self._store.check([key]) else None

    def _is_gone(self, sign: dict) -> bool:
        """Whether a process of the same torchrun has ended: that of another may be on another machine."""
        if os.name != "posix" or sign["torchrun"] is None or sign["torchrun"] != self._torchrun:
            return False
        try:
            os.kill(sign["pid"], 0)
        except ProcessLookupError:
            return True
        return False

    # ---- who it was -----------------------------------------------------------------------------------------------

    def _say(self, state: str):
        self._state = state
        self._wake.set()

    def _unheard(self) -> RankLost | None:
        """Ranks that ceased to give signs: their end has broken the collective."""
        silent = {other: self._signs[other]["step"] for other in self._signs if self._silent[other] >= 3 * INTERVAL}
        names = " and ".join(f"{self._name(other)} since step {step}" for other, step in silent.items())
        return RankLost(f"no sign of life from {names}", set(silent)) if silent else None

    def _absent(self, why: str) -> RankLost | None:
        """Ranks that live, but did not come where the others waited."""
        there = [f"{self._name(o)} at step {s['step']}" for o, s in self._signs.items() if s["state"] == "trains"]
        return RankLost(f"the others waited in vain {why} for {' and '.join(there)}") if there else None

    def _name(self, rank: int) -> str:
        sign = self._own if rank == self._rank else self._signs.get(rank)
        return f"rank {rank} ({sign['host']}, pid {sign['pid']})" if sign else f"rank {rank}"

    def _announce(self, lost: RankLost):
        """Report the loss, in one rank only: the first that can."""
        if self._rank == min({self._rank, *self._others} - lost.mute):
            self._report(str(lost))
