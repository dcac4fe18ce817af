"""A run's folder belongs to one process at a time."""

from __future__ import annotations

import fcntl
import os
import re
import socket
import tempfile
import threading
import time
import weakref
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from greenprune.config import UserError

_NAME = ".lock"
_RENEW_S = 5.0  # an owner shows this often that it is there
_WATCH_S = 3 * _RENEW_S  # one that has not shown it for so long is gone
_OWNER = re.compile(r"process (?P<pid>[0-9]{1,9}) on (?P<host>\S+)")


class FolderInUse(UserError):
    """Another process has a run's folder in hand.

    Attributes:
        owner: The process, as its lock names it.
    """

    def __init__(self, folder: Path, owner: str) -> None:
        super().__init__(
            f"run_name: {str(folder)!r} is in use by another process ({owner}); expected one that has stopped"
        )
        self.owner = owner
        self._folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        # One rank finds it out and tells the others: made again from its message alone, it would lack its owner.
        return type(self), (self._folder, self.owner), self.__dict__


class FolderLock:
    """Holds a run's folder for this process and its host; the system lets go of it when the process ends, however.

    The system's lock counts for all processes that see it. Some shared file systems keep it to one machine, so its file
    also names its owner, who renews the file's time every few seconds: where the file names a process of another
    machine, it is watched until it is renewed, or until it should have been.

    Args:
        folder: The run's folder.
        watch_s: Seconds to watch for a process of another machine.

    Attributes:
        left_by: The owner that ended without letting go of the folder, or empty.

    Raises:
        FolderInUse: Another process holds it.
        UserError: It cannot be written.
    """

    def __init__(self, folder: Path, watch_s: float = _WATCH_S) -> None:
        self._path = folder / _NAME
        try:
            self._file = self._path.open("a+", errors="replace")
        except OSError as error:
            raise UserError(f"output_dir: cannot write {str(self._path)!r} ({error.strerror})") from None
        try:
            self.left_by = self._take(folder, watch_s)
            self._file.truncate(0)
            self._file.write(f"process {os.getpid()} on {socket.gethostname()}")
            self._file.flush()
        except OSError as error:
            with suppress(OSError):  # of a full disk, again
                self._file.close()
            raise UserError(f"output_dir: cannot write {str(self._path)!r} ({error.strerror})") from None
        except UserError:
            self._file.close()
            raise
        self._released = threading.Event()
        _HELD.add(self)
        threading.Thread(target=self._renew, name="greenprune-lock", daemon=True).start()

    def _take(self, folder: Path, watch_s: float) -> str:
        """Take the system's lock, and return the owner that the file names, who must be gone."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shared = True
        except BlockingIOError:
            raise FolderInUse(folder, self._owner()) from None
        except OSError:  # a file system without locks: the owner's name is all there is
            shared = False
        owner = self._owner()
        found = _OWNER.fullmatch(owner)
        if found is None:
            return owner
        if found["host"] != socket.gethostname():
            if self._is_renewed(watch_s):
                raise FolderInUse(folder, owner)
        elif not shared and psutil.pid_exists(int(found["pid"])):
            raise FolderInUse(folder, owner)
        return owner

    def _owner(self) -> str:
        self._file.seek(0)
        return self._file.read(1000).strip()

    def _is_renewed(self, watch_s: float) -> bool:
        """Whether another process sets the file's time anew; two clocks are never compared."""
        before = self._path.stat().st_mtime_ns
        until = time.monotonic() + watch_s
        while time.monotonic() < until:
            time.sleep(min(0.5, watch_s))
            with self._path.open():  # has a network file system ask its server
                if self._path.stat().st_mtime_ns != before:
                    return True
        return False

    def _renew(self) -> None:
        while not self._released.wait(_RENEW_S):
            with suppress(OSError):  # a disk that is gone stops the run elsewhere
                os.utime(self._path)

    def release(self) -> None:
        """Let go of the folder; may be called twice."""
        if not self._released.is_set():
            self._released.set()
            _HELD.discard(self)
            with suppress(OSError):  # a disk that is full, or gone
                self._file.truncate(0)
            self._file.close()

    def leave_to_parent(self) -> None:
        """In a process that was forked from the owner: have no part in the lock, which stays the owner's."""
        nowhere = os.open(os.devnull, os.O_RDWR)
        os.dup2(nowhere, self._file.fileno(), inheritable=False)  # closing takes a mutex that a thread may have had
        os.close(nowhere)


_HELD: weakref.WeakSet[FolderLock] = weakref.WeakSet()


def _leave_to_parent() -> None:
    for lock in _HELD:
        lock.leave_to_parent()


# A forked process, as loaders of images are, shares the system's lock, and would hold it on when its parent is killed.
os.register_at_fork(after_in_child=_leave_to_parent)


@dataclass(frozen=True)
class Holder:
    """Who has a run's folder in hand, found without touching its lock.

    Attributes:
        is_held: Whether a process has it in hand; None if that cannot be told.
        owner: The process that had it last, as its lock names it: ``process 7 on node-3``; empty if it was let go of.
        host: The machine of that process, empty for this one.
        renewed_s: When a process of another machine was seen to be there, by the file system's clock.
    """

    is_held: bool | None
    owner: str = ""
    host: str = ""
    renewed_s: float = 0.0

    @property
    def where(self) -> str:
        """The machine in words."""
        return f"on {self.host}" if self.host else "on this machine"

    @property
    def doubt(self) -> str:
        """Why it cannot be told, in words."""
        return f"last held by {self.owner}" if self.owner else "its lock cannot be read"


def find_holder(folder: Path) -> Holder:
    """Find out at once who has a run's folder in hand, on this machine or another.

    A process of this machine is told by the system's list of locks. One of another machine is told by the time of the
    lock's file, which it sets anew every few seconds. That is set against a new file's, which is made for it and leaves
    nothing: both have their times by the clock of the file system.

    Args:
        folder: The run's folder.

    Returns:
        Nothing is told for certain of another machine, or where the system shows no locks, if the folder cannot be
        written. A process that was killed there counts as holding the folder until it should have renewed its lock.
    """
    path = folder / _NAME
    try:
        owner = _owner_in(path)
    except FileNotFoundError:
        return Holder(False)
    except OSError:
        return Holder(None)
    if owner is None:
        return Holder(bool(_is_locked_here(path, owner)))
    host = "" if owner["host"] == socket.gethostname() else owner["host"]
    seen = None if host else _is_locked_here(path, owner)
    if seen is not None:
        return Holder(seen, owner.group())
    try:
        with path.open():  # has a network file system ask its server
            renewed_s = path.stat().st_mtime
    except OSError:
        return Holder(None, owner.group(), host)
    now_s = _clock_s(folder)
    fresh = None if now_s is None else abs(now_s - renewed_s) <= _WATCH_S
    return Holder(fresh, owner.group(), host, renewed_s)


def is_held(folder: Path) -> bool | None:
    """Whether a process of this machine or another has a run's folder in hand: see :func:`find_holder`.

    Args:
        folder: The run's folder.

    Returns:
        None if that cannot be told.
    """
    return find_holder(folder).is_held


def is_left(folder: Path) -> bool:
    """Whether a run's folder was let go of, or its last owner was a process of this machine that is gone.

    Args:
        folder: The run's folder.

    Returns:
        False also where that cannot be told: the last owner was of another machine, or the system shows no locks.
    """
    path = folder / _NAME
    try:
        owner = _owner_in(path)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    if owner is not None and owner["host"] != socket.gethostname():
        return False
    return _is_locked_here(path, owner) is False


def _owner_in(path: Path) -> re.Match[str] | None:
    """The process that a lock names, if it names one."""
    return _OWNER.fullmatch(path.read_text(errors="replace")[:1000].strip())


def _is_locked_here(path: Path, owner: re.Match[str] | None) -> bool | None:
    """Whether a process of this machine has a lock, which names an owner; None if the system shows no locks."""
    try:
        locks, status = Path("/proc/locks").read_text(), path.stat()
    except OSError:
        return None
    device, inode = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}", str(status.st_ino)
    for words in map(str.split, locks.splitlines()):
        if len(words) < 6 or words[1] != "FLOCK":
            continue
        where, _, number = words[5].rpartition(":")
        # A file's device is another one for the kernel's list on btrfs and on some overlays: there the process tells.
        if number == inode and (where == device or (owner is not None and words[4] == owner["pid"])):
            return True
    return False


def _clock_s(folder: Path) -> float | None:
    """The time by the clock of a folder's file system, which may not be ours; None if nothing can be written there."""
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:
            os.utime(probe.fileno())  # as an owner renews its lock
            return os.fstat(probe.fileno()).st_mtime
    except OSError:
        return None
