"""The other processes of a run: who they are, whether they are still there, and where they stand.

A collective whose partner is gone fails with a message of the network's, or waits for half an hour. Here each process
says every few seconds that it lives and where it is, through the key-value store that the launcher keeps, so that the
run ends soon and says which rank on which host is the cause.

All processes share that one store, so each asks it for the same few things however many there are: whether anybody has
left with an error, and how the next processes of a ring are. Whoever misses one of these tells all.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from torch import distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore
from torch.distributed.distributed_c10d import _get_default_store

from greenprune.redaction import without_secrets

# Seconds between two signs of life, and without one after which a process counts as frozen or cut off (our choice).
BEAT_S = 2.0
SILENCE_S = 20.0

# Processes that send signs every BEAT_S; more send them more rarely, so that one store can answer (our choice).
_FREQUENT = 1600

# Following ranks whose signs of life a process looks at (our choice): of any group that falls silent together, such as
# a host, somebody outside looks at the first.
WATCHED = 2

# Most processes whose whereabouts a standstill is told with.
_TOLD = 64

# Seconds in which a process whose peer has ended finds out by itself, from a collective that fails; NCCL's may not.
_GRACE_S = 10.0

_PACKAGE = str(Path(__file__).resolve().parents[1]) + os.sep


def join_after_restart(on_cpu: bool) -> None:
    """Bring the processes together if their launcher has started them again after a failure; else nothing happens.

    torchrun keeps its key-value store over restarts on one node, and in it the addresses of the processes that are
    gone: whoever reads one before its successor has written its own waits for a dead address (torch 2.14). Under a
    prefix for each attempt there is nothing to read of an earlier one.
    """
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if attempt == 0 or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    kept = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    dist.init_process_group(
        backend="gloo" if on_cpu else "cpu:gloo,cuda:nccl",
        store=PrefixStore(f"attempt-{attempt}", kept),
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
    )


def beat_s(ranks: int) -> float:
    """Seconds between two signs of life of a process, of so many in all; several of them fit into SILENCE_S."""
    return min(SILENCE_S / 4, BEAT_S * max(1.0, ranks / _FREQUENT))


class PeerLost(RuntimeError):
    """Another process of the run is gone or hangs; the message names its rank, its host and what is known of the cause.

    It has been said already, by one process for all: the launcher ends the others as soon as one has ended.
    """


@dataclass(frozen=True)
class Peer:
    """One process of a run."""

    rank: int
    host: str
    pid: int

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host} (process {self.pid})"

    @classmethod
    def here(cls, rank: int) -> Peer:
        """This process."""
        return cls(rank, socket.gethostname(), os.getpid())

    @property
    def is_dead(self) -> bool:
        """Whether it is known to have ended; only of processes on this host."""
        if self.host != socket.gethostname():
            return False
        try:
            os.kill(self.pid, 0)
            # A process that has ended and that its launcher has not yet asked for is still listed, as a zombie.
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except ProcessLookupError:
            return True
        except OSError:
            return False


def is_of_network(error: BaseException) -> bool:
    """Whether an error says that a collective failed, and not the work of this process."""
    text = str(error).lower()
    return isinstance(error, dist.DistError) or (
        type(error) is RuntimeError and any(word in text for word in ("gloo", "nccl", "peer", "broken pipe"))
    )


def _where_main_is() -> str:
    """The innermost place in this package at which the main thread is, and the function it called there."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None and not frame.f_code.co_filename.startswith(_PACKAGE):
        frame = frame.f_back
    if frame is None:
        return "outside greenprune"
    return f"{frame.f_code.co_filename.removeprefix(_PACKAGE)}:{frame.f_lineno}, {frame.f_code.co_name}"


class Peers:
    """Watches the processes of a run from a thread of its own, while entered.

    Args:
        me: This process.
        all_peers: All processes, this one too, in rank order.
        stall_s: Seconds in which no process gets on, after which the run counts as hung.
        advice: Says how to go on; called when a peer is lost.
    """

    def __init__(self, me: Peer, all_peers: list[Peer], stall_s: float, advice: Callable[[], str]) -> None:
        self._me = me
        self._others = [peer for peer in all_peers if peer.rank != me.rank]
        place = all_peers.index(me)
        following = all_peers[place + 1 :] + all_peers[:place]
        self._watched = following[:WATCHED]
        self._here = [peer for peer in self._others if peer.host == me.host]
        self._stall_s = stall_s
        self._beat_s = beat_s(len(all_peers))
        self._advice = advice
        # A connection of its own: a wait on it holds up nobody else's.
        self._store = PrefixStore("greenprune/peers", _get_default_store().clone())
        self._thread = threading.Thread(target=self._watch, name="peers", daemon=True)
        self._over = threading.Event()
        now = time.monotonic()
        self._heard = {peer.rank: ("", now) for peer in self._watched}
        self._progress = 0

    def __enter__(self) -> Peers:
        self._beat()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._over.set()
        words = "" if error is None else " ".join(str(error).split()) or type(error).__name__
        with contextlib.suppress(RuntimeError):
            if error is not None:
                self._announce(f"{self._me} has ended: {words[:500]}")
            self._store.set(f"end/{self._me.rank}", "")
        self._thread.join(timeout=self._beat_s)

    def got_on(self) -> None:
        """Note that this process has done a piece of its work."""
        self._progress += 1

    def find_lost(self) -> PeerLost | None:
        """Which peer is gone, now that a collective has failed; None if all are there. Takes up to half a minute."""
        has_remote = any(peer.host != self._me.host for peer in self._others)
        deadline = time.monotonic() + (SILENCE_S if has_remote else 0.0) + 2 * self._beat_s
        while time.monotonic() < deadline:
            cause = self._cause()
            if cause is not None:
                return self._tell(cause)
            time.sleep(0.1)
        return None

    def _tell(self, cause: str) -> PeerLost:
        """Say what happened and how to go on, unless another process has."""
        error = PeerLost(f"{cause}. {self._advice()}")
        if self._is_speaker():
            sys.stderr.write(f"greenprune: error: {without_secrets(str(error), os.environ)}\n")
            sys.stderr.flush()
        return error

    def _is_speaker(self) -> bool:
        """Whether nobody has spoken yet; where the store is gone, all speak."""
        try:
            return bool(self._store.add("spoken", 1) == 1)
        except RuntimeError:
            return True

    def _cause(self) -> str | None:
        """Which peer has ended or fallen silent, and why, as far as is known."""
        return self._ended() or self._silent()

    def _announce(self, cause: str) -> None:
        """Let all processes know what happened; the first cause stands, others follow from it."""
        self._store.compare_set("cause", "", cause)

    def _ended(self) -> str | None:
        """Which peer has ended other than in good order."""
        with contextlib.suppress(RuntimeError):
            if self._store.check(["cause"]):
                return self._store.get("cause").decode()
        for peer in self._here:
            if peer.is_dead and not self._has_left(peer):
                return f"{peer} has ended without a word: killed (out of memory?) or crashed"
        return None

    def _silent(self) -> str | None:
        """Which of the watched peers gives no sign of life any more."""
        now = time.monotonic()
        for peer in self._watched:
            silent_s = now - self._heard[peer.rank][1]
            if silent_s > SILENCE_S and not self._has_left(peer):
                cause = f"{peer} has not been heard of for {silent_s:.0f} s: its process is frozen or its host cut off"
                with contextlib.suppress(RuntimeError):
                    self._announce(cause)
                return cause
        return None

    def _has_left(self, peer: Peer) -> bool:
        """Whether a peer has left this watch, in good order or with an error that it has announced."""
        try:
            return bool(self._store.check([f"end/{peer.rank}"]))
        except RuntimeError:
            return False

    def _beat(self) -> None:
        sign = {"progress": self._progress, "where": _where_main_is(), "at": time.monotonic()}
        self._store.set(f"beat/{self._me.rank}", json.dumps(sign))

    def _sign_of(self, peer: Peer) -> str:
        """A peer's last sign of life; empty before its first."""
        key = f"beat/{peer.rank}"
        return self._store.get(key).decode() if self._store.check([key]) else ""

    def _listen(self) -> None:
        now = time.monotonic()
        for peer in self._watched:
            sign = self._sign_of(peer)
            if sign != self._heard[peer.rank][0]:
                self._heard[peer.rank] = (sign, now)

    def _watch(self) -> None:
        """Give and take signs of life; end this process if a peer is gone or nobody gets on."""
        progress, since, gone_since = self._progress, time.monotonic(), None
        last = since
        while not self._over.wait(self._beat_s):
            now = time.monotonic()
            if now - last > SILENCE_S / 2:  # this process itself was frozen, perhaps with all others
                self._heard = {rank: (sign, now) for rank, (sign, _) in self._heard.items()}
                since = now
            last = now
            try:
                self._beat()
                self._listen()
            except RuntimeError:
                continue  # the launcher is going; its own signal or the next collective ends this process
            if self._progress != progress:
                progress, since = self._progress, now
            cause = self._ended()
            gone_since = None if cause is None else gone_since or now
            if cause is not None and gone_since is not None and now - gone_since >= _GRACE_S:
                self._end(cause)
            if (cause := self._silent()) is not None:
                self._end(cause)
            if now - since > self._stall_s:
                self._end(self._standstill(since))

    def _standstill(self, since: float) -> str:
        told = [self._me, *self._others][:_TOLD]
        places = {self._me: _where_main_is()}
        for peer in told[1:]:
            sign = ""
            with contextlib.suppress(RuntimeError):
                sign = self._sign_of(peer)
            places[peer] = json.loads(sign)["where"] if sign else "unknown"
        where = "; ".join(f"{peer} is in {places[peer]}" for peer in sorted(told, key=lambda peer: peer.rank))
        return f"no step for {time.monotonic() - since:.0f} s: {where}"

    def _end(self, cause: str) -> None:
        """End this process, whose main thread waits for a peer and can be reached by nothing else."""
        if not self._over.is_set():
            self._tell(cause)
            time.sleep(1.0)  # the launcher ends all once one has ended; the speaker may be another one
            os._exit(1)
