"""Files that are whole or the old ones, whatever cuts their writing short."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that it is whole or the old one, also after a power cut.

    Raises:
        OSError: It cannot be written; it bears the file's name, and nothing else is left.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            with suppress(OSError):  # there is none yet, or the file system knows no modes
                shutil.copymode(path, temporary)
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:  # on a full disk a half-written file would stay, and take what little is left
        with suppress(OSError):
            temporary.unlink()


def write_output(path: Path, content: str | bytes) -> None:
    """Write what a user asked for where the user said: a file so that it is whole or the old one, a pipe as it is.

    Raises:
        OSError: It cannot be written; it bears the output's name.
    """
    content = content.encode() if isinstance(content, str) else content
    try:
        with suppress(FileNotFoundError):
            path.stat()  # a link that leads back to itself cannot be followed
        descriptor = _descriptor_of(path)
        if descriptor is not None:
            with open(descriptor, "wb", closefd=False) as file:
                file.write(content)
        elif _can_be_replaced(path):
            write_atomically(path.resolve(), content)  # a link to a file stays one
        else:
            path.write_bytes(content)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _descriptor_of(path: Path) -> int | None:
    """The descriptor of this process that a path stands for, as /dev/stdout does; None: it stands for none.

    It may be a file. One put in its place would have none of what else goes there, and opened anew it would be written
    from its beginning.
    """
    own = Path(f"/proc/{os.getpid()}/fd")
    while path.is_symlink():
        if path.parent.resolve() == own:
            return int(path.name)
        path = path.parent / path.readlink()
    return None


def _can_be_replaced(path: Path) -> bool:
    """Whether a new file can take the place of what is there, if anything: no pipe, device or protected file does."""
    path = path.resolve()
    if path.exists() and not (path.is_file() and os.access(path, os.W_OK)):
        return False
    return os.access(path.parent, os.W_OK)
