"""The folder that an export goes into: whole under its name, or not there at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from greenprune.export.formats import ExportError


def refuse_existing(target: Path) -> None:
    """Refuse a folder that is there.

    Raises:
        ExportError: It is.
    """
    if target.exists() or target.is_symlink():
        raise ExportError(f"-o: {str(target)!r} is there already and is not overwritten; expected a new folder")


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder under a temporary name, which gets the target's when all is well and goes otherwise.

    Folders above it that were made for it go with it, unless something else is in them by then.

    Raises:
        ExportError: It cannot be written, or the target is there by now.
    """
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    made = [folder for folder in temporary.parents if not folder.exists()]
    try:
        try:
            temporary.mkdir(parents=True)
        except OSError as error:
            raise ExportError(
                f"-o: cannot write {str(target)!r} ({error.strerror}); expected a folder you can write to"
            ) from None
        yield temporary
        refuse_existing(target)
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        for folder in made:
            with suppress(OSError):
                folder.rmdir()


@contextmanager
def naming_the_target(temporary: Path, target: Path) -> Iterator[None]:
    """Have a failure to write name the file as it would have been.

    Raises:
        ExportError: A file cannot be written.
    """
    try:
        yield
    except OSError as error:
        path = Path(error.filename or temporary)
        path = target / path.relative_to(temporary) if path.is_relative_to(temporary) else path
        raise ExportError(f"-o: cannot write {str(path)!r} ({error.strerror or error}); expected room for it") from None
