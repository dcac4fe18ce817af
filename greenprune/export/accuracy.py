"""The accuracy of exported networks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from greenprune.config import DataConfig, UserError
from greenprune.data import data_error_by_flags, open_data
from greenprune.data.folders import LAYOUTS
from greenprune.export.exporting import read_record
from greenprune.export.formats import ExportError, read_network
from greenprune.formatting import format_percent


@dataclass(frozen=True)
class FileAccuracy:
    """Accuracy of an exported network.

    Attributes:
        accuracy: Share of samples whose most likely class is right, 0 to 1.
        samples: Samples counted.
        data: The data set, of which this is the test set.
        engine: What ran the network.
        of_run: Accuracy that the run's summary states; None if it was on other data, or is not recorded.
        precision_of_run: The precision in which the run measured it, if not fp32.
    """

    accuracy: float
    samples: int
    data: str
    engine: str
    of_run: float | None
    precision_of_run: str | None = None

    def __str__(self) -> str:
        of_run = "" if self.of_run is None else f"; the run's summary says {format_percent(self.of_run, 2)}"
        of_run += "" if self.precision_of_run is None else f", in {self.precision_of_run}"
        return (
            f"accuracy {format_percent(self.accuracy, 2)} on the {self.samples:,} images of the test set of "
            f"{self.data} ({self.engine}){of_run}"
        )


def evaluate_file(
    path: Path | str, data_name: str, data_root: str | None = None, *, trust: bool = False
) -> FileAccuracy:
    """Evaluate an exported network on the whole test set.

    Args:
        path: The exported folder, or a file in it. No code in it is run, unless it is trusted.
        data_name: Name of the data set.
        data_root: Folder of the data set.
        trust: Whether a file of torch.export, whose loader runs code, may be loaded.

    Raises:
        UserError: There is no such file or data, or they do not go together.
    """
    folder, record = read_record(Path(path))
    channels, height, _ = record["input"]["shape"]
    size = height if data_name in LAYOUTS else None  # the others have images of one size
    # Nothing is trained on: the training set may be as small as it likes.
    try:
        data = open_data(DataConfig(name=data_name, image_size=size, batch_size=1), data_root, seed=0)
    except UserError as error:
        raise data_error_by_flags(error, name="--data", root="--root") from None
    has, takes = (data.channels, data.image_size, data.classes), (channels, height, record["classes"])
    if has != takes:
        form = "{0} channels and {1} x {1} pixels in {2} classes".format
        raise ExportError(f"--data: {data_name!r} has images of {form(*has)}; expected {form(*takes)}")
    loaded = read_network(record["kind"], folder, trust=trust)
    right = samples = 0
    with torch.no_grad():
        for images, labels in data.eval_batches():
            right += int((loaded.run(images).argmax(1) == labels).sum())
            samples += len(labels)
    summary = record["summary"] or {}
    same = (summary.get("data"), summary.get("accuracy_kind")) == (data_name, "test")
    if not same:
        return FileAccuracy(right / samples, samples, data_name, loaded.engine, None)
    precision = None if summary["precision"] == "no" else summary["precision"]
    return FileAccuracy(right / samples, samples, data_name, loaded.engine, summary["accuracy"], precision)
