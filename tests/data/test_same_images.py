"""A run goes on with the images that it was started on, wherever they lie, and with no others."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from in_process import stopped_at, train_on_images

from greenprune.config import UserError


def test_a_run_goes_on_with_its_own_images_only(folder_root: Path, tmp_path: Path) -> None:
    with stopped_at(3):
        train_on_images(folder_root, tmp_path, epochs=2)
    shutil.copytree(folder_root, tmp_path / "moved")
    shutil.copytree(folder_root, tmp_path / "other")
    (tmp_path / "other" / "val" / "n02" / "n02_0.JPEG").rename(tmp_path / "other" / "val" / "n01" / "n02_0.JPEG")
    before = {path: path.read_bytes() for path in (tmp_path / "it").rglob("*") if path.is_file()}
    refusal = r"data\.root: it holds another image_folder than the one that the run in .*it'"
    with pytest.raises(UserError, match=refusal):
        train_on_images(tmp_path / "other", tmp_path, epochs=2)
    assert {path: path.read_bytes() for path in (tmp_path / "it").rglob("*") if path.is_file()} == before
    resumed = train_on_images(tmp_path / "moved", tmp_path, epochs=2)
    whole = train_on_images(folder_root, tmp_path / "whole", epochs=2)
    assert resumed.summary["loss"] == whole.summary["loss"]
    assert (resumed.summary["attempts"], whole.summary["attempts"]) == (2, 1)
