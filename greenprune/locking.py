"""A run's folder belongs to one process at a time."""

from __future__ import annotations

import fcntl
import os
import re
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil

from greenprune.config import UserError

_NAME = ".lock"
_RENEW_S = 5.0  # an owner shows this often that it is there
_OWNER = re.compile(r"process (?P<pid>[0-9]{1,9}) on (?P<host>\S+)")


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
        UserError: Another process holds it, or it cannot be written.
    """

    def __init__(self, folder: Path, watch_s: float = 3 * _RENEW_S) -> None:
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
            self._file.close()
            raise UserError(f"output_dir: cannot write {str(self._path)!r} ({error.strerror})") from None
        except UserError:
            self._file.close()
            raise
        self._released = threading.Event()
        threading.Thread(target=self._renew, name="greenprune-lock", daemon=True).start()

    def _take(self, folder: Path, watch_s: float) -> str:
        """Take the system's lock, and return the owner that the file names, who must be gone."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shared = True
        except BlockingIOError:
            raise self._in_use(folder, self._owner()) from None
        except OSError:  # a file system without locks: the owner's name is all there is
            shared = False
        owner = self._owner()
        found = _OWNER.fullmatch(owner)
        if found is None:
            return owner
        if found["host"] != socket.gethostname():
            if self._is_renewed(watch_s):
                raise self._in_use(folder, owner)
        elif not shared and psutil.pid_exists(int(found["pid"])):
            raise self._in_use(folder, owner)
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

    @staticmethod
    def _in_use(folder: Path, owner: str) -> UserError:
        return UserError(
            f"run_name: {str(folder)!r} is in use by another process ({owner}); expected one that has stopped"
        )

    def _renew(self) -> None:
        while not self._released.wait(_RENEW_S):
            with suppress(OSError):  # a disk that is gone stops the run elsewhere
                os.utime(self._path)

    def release(self) -> None:
        """Let go of the folder; may be called twice."""
        if not self._released.is_set():
            self._released.set()
            with suppress(OSError):  # a disk that is full, or gone
                self._file.truncate(0)
            self._file.close()


def is_left(folder: Path) -> bool:
    """Whether a run's folder was let go of, or its last owner was a process of this machine that is gone.

    Args:
        folder: The run's folder.

    Returns:
        False also where that cannot be told: the last owner was of another machine, or the system shows no locks.
    """
    if is_held(folder) is not False:
        return False
    try:
        owner = _owner_of(folder)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return owner is None or owner["host"] == socket.gethostname()


def _owner_of(folder: Path) -> re.Match[str] | None:
    """The process that a folder's lock names, if it names one."""
    return _OWNER.fullmatch((folder / _NAME).read_text(errors="replace")[:1000].strip())


def is_held(folder: Path) -> bool | None:
    """Whether a process of this machine has a run's folder in hand, found without touching its lock.

    Args:
        folder: The run's folder.

    Returns:
        None if that cannot be told: the system shows no locks. A process on another machine is not seen.
    """
    try:
        locks, status = Path("/proc/locks").read_text(), (folder / _NAME).stat()
        owner = _owner_of(folder)
    except FileNotFoundError:
        return False if Path("/proc/locks").exists() else None
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
