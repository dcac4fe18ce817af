"""What is trained on: labelled image sets behind one interface, in batches that any process can reproduce."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

from greenprune.config import ConfigError, DataConfig, UserError, told_by_flags
from greenprune.data.folders import LAYOUTS, FolderData
from greenprune.data.image_data import ImageData, derive_seed
from greenprune.data.in_memory import InMemoryData
from greenprune.data.readers import SOURCES

DATASETS: tuple[str, ...] = (*SOURCES, *LAYOUTS)
"""Registered names, the valid values of ``data.name``."""

__all__ = ["DATASETS", "ImageData", "check_data_name", "data_error_by_flags", "derive_seed", "open_data"]


def check_data_name(name: str) -> None:
    """Check that there is a data set of this name, without looking for its files.

    Raises:
        ConfigError: There is none.
    """
    if name not in DATASETS:
        close = difflib.get_close_matches(name, DATASETS, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ConfigError(f"data.name: {name!r} is not valid; {hint}expected one of {', '.join(DATASETS)}")


def data_error_by_flags(error: UserError, **flags: str) -> UserError:
    """What is wrong with a data set, for a command that has flags of its own in place of ``data``, and no download.

    Args:
        error: What :func:`open_data` raised.
        flags: For fields of ``data``, the flag that stands for each.
    """
    told = re.sub(r" \((?:with )?data\.download[^)]*\)|, for example with data\.download=true", "", str(error))
    return told_by_flags(UserError(told), "data", **flags)


def open_data(config: DataConfig, root: str | None, seed: int) -> ImageData:
    """Open a data set; nothing is downloaded unless ``config.download`` is set and a file is missing.

    With ``config.download``, let one process of a node open the set before the others do.

    Args:
        config: The ``data`` section of a run.
        root: Folder that holds the set: ``config.root``, or what the caller has found in its place.
        seed: The run's seed: shapes the order of the samples and their augmentation, never a split.

    Raises:
        UserError: The name is unknown, files are missing or corrupt, or the config does not suit the set.
    """
    check_data_name(config.name)
    source = SOURCES.get(config.name)
    embedded = source is not None and not source.files
    if root is None and not embedded:
        fetch = (
            "with data.download=true missing files are fetched into it"
            if source is not None and source.fetch is not None
            else "it cannot be downloaded with data.download"
        )
        raise UserError(
            f"data.root: None is not valid; {config.name} is read from files: "
            f"set data.root or the environment variable GREENPRUNE_DATA to their folder ({fetch})"
        )
    kind = FolderData if source is None else InMemoryData
    return kind(config, Path(root or ""), seed)
