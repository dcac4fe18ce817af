"""Files that are whole or the old ones, and outputs that are no files."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from greenprune.whole_files import write_atomically, write_output


@pytest.mark.parametrize("write", [write_atomically, write_output])
@pytest.mark.parametrize("content", ["new" * 100, b"new" * 100], ids=["text", "bytes"])
def test_what_does_not_fit_leaves_the_old_file_and_is_told_by_its_name(
    tmp_path: Path, write: Any, content: str | bytes, files_of_at_most: Any
) -> None:
    path = tmp_path / "it"
    path.write_text("old")
    with files_of_at_most(100), pytest.raises(OSError, match="File too large") as failed:
        write(path, content)
    assert failed.value.filename == str(path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["it"]
    write(path, content)
    assert path.read_text() == "new" * 100
    assert os.listdir(tmp_path) == ["it"]


def test_an_output_keeps_who_may_read_it(tmp_path: Path) -> None:
    path = tmp_path / "it"
    path.write_text("old")
    path.chmod(0o640)
    write_output(path, b"new")
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_an_output_that_is_a_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    link = tmp_path / "link"
    link.symlink_to("there/it")
    for content in (b"first", b"second"):  # there is no file yet the first time
        write_output(link, content)
        assert link.is_symlink()
        assert (tmp_path / "there" / "it").read_bytes() == content


def test_an_output_that_is_a_named_pipe_stays_one(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()
    write_output(pipe, b"report")
    reader.join()
    assert read == [b"report"]
    assert pipe.is_fifo()


def test_an_output_in_a_folder_that_takes_no_new_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing can be written beside such a file, but it can be written."""
    path = tmp_path / "it"
    path.write_text("old")
    access = os.access  # root may write everywhere
    monkeypatch.setattr(os, "access", lambda item, mode: Path(item) != tmp_path and access(item, mode))
    number = path.stat().st_ino
    write_output(path, b"new")
    assert (path.read_text(), path.stat().st_ino) == ("new", number)


def test_an_output_that_may_not_be_written_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "it"
    path.write_text("old")
    path.chmod(0o444)
    access = os.access
    monkeypatch.setattr(os, "access", lambda item, mode: Path(item) != path and access(item, mode))
    number = path.stat().st_ino
    if os.geteuid() == 0:  # whom nothing keeps from writing, but in place
        write_output(path, b"new")
    else:
        with pytest.raises(PermissionError):
            write_output(path, b"new")
    assert path.stat().st_ino == number


def test_the_standard_output_is_written_where_it_stands_also_if_it_is_a_file(tmp_path: Path) -> None:
    """A file put in its place would have none of what was and will be written to it."""
    (tmp_path / "mine").symlink_to("/dev/stdout")
    code = (
        "import sys; from pathlib import Path; from greenprune.whole_files import write_output\n"
        "for name in sys.argv[1:]:\n"
        "    print('before', name, flush=True)\n"
        "    write_output(Path(name), b'content\\n')\n"
        "print('after')"
    )
    names = ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", str(tmp_path / "mine")]
    with (tmp_path / "out").open("w") as out:
        subprocess.run([sys.executable, "-c", code, *names], check=True, stdout=out)
    expected = [line for name in names for line in (f"before {name}", "content")]
    assert (tmp_path / "out").read_text().splitlines() == [*expected, "after"]


def test_an_output_that_is_a_link_to_itself_is_refused(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to("link")
    with pytest.raises(OSError, match="symbolic links"):
        write_output(link, b"content")
