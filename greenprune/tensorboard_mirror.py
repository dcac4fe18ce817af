"""What a run's events become in TensorBoard, whether they come as it trains or are read back from its log."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from greenprune.tracking import Event, numbers_of, plain_settings

TENSORBOARD_FOLDER = "tensorboard"
"""Below a run's folder: what TensorBoard reads."""

# Of the events of one step the epoch's is the last here: what TensorBoard shows at that step.
_MIRRORED = ("train", "window", "removal", "freeze", "epoch")
_RESULTS = ("accuracy", "energy_j", "co2_g", "flops_train", "flops_forward", "params", "time_s")


class TensorBoardMirror:
    """Sends a run's events to a TensorBoard writer: scalars, each gate's rate, and the table of HPARAMS.

    Args:
        writer: A ``torch.utils.tensorboard.SummaryWriter``.
        config: The run's config, nested.
    """

    def __init__(self, writer: Any, config: dict[str, Any]) -> None:
        self._writer = writer
        self._config = config

    def __call__(self, event: Event) -> None:
        """Send one event, with the time at which it was."""
        kind = event["kind"]
        if kind in _MIRRORED:
            self._add(numbers_of(event), event)
        if kind == "start":
            self._forget_steps_after(event)
        elif kind == "window":
            self._add(_rates(event.get("units", {})), event)
        elif kind == "end":
            self._end(event)
        if kind in ("epoch", "end"):
            self._writer.flush()

    def _add(self, numbers: dict[str, float], event: Event) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, event["step"], walltime=event["time"])

    def _forget_steps_after(self, start: Event) -> None:
        """Have TensorBoard leave out what it was told of steps that this attempt does again, in whatever file it is."""
        from tensorboard.compat.proto.event_pb2 import Event as Entry
        from tensorboard.compat.proto.event_pb2 import SessionLog

        # What was given before the first step is told again where an attempt begins there.
        first_again = start["step"] + 1 if start["step"] > 0 else 0
        entry = Entry(step=first_again, session_log=SessionLog(status=SessionLog.START))
        self._writer._get_file_writer().add_event(entry, walltime=start["time"])

    def _end(self, event: Event) -> None:
        from torch.utils.tensorboard.summary import hparams

        summary = event.get("summary", {})
        results = {f"result/{key}": summary[key] for key in _RESULTS if summary.get(key) is not None}
        # The writer's own add_hparams tells the results as of now, in a file of their own.
        for entry in hparams(plain_settings(self._config), results):  # type: ignore[no-untyped-call]
            self._writer._get_file_writer().add_summary(entry, walltime=event["time"])
        for name, value in results.items():
            self._writer.add_scalar(name, value, walltime=event["time"])


def _rates(units: dict[str, dict[str, Any]]) -> dict[str, float]:
    """The rate of each unit; of a set of channels the mean."""
    rates = {}
    for name, seen in units.items():
        several = isinstance(seen["rate"], list)
        rate = sum(seen["rate"]) / max(1, len(seen["rate"])) if several else seen["rate"]
        rates[f"gate_rate/{name.replace(':', '.')}"] = rate
    return rates


@contextmanager
def failing_once() -> Iterator[None]:
    """Have a TensorBoard writer that cannot write say so once.

    Its thread keeps the error for the next call to the writer, which raises it, and then ends with it itself: Python
    would print that as a traceback.
    """
    before = threading.excepthook

    def tell(failed: threading.ExceptHookArgs) -> None:
        if not (isinstance(failed.exc_value, OSError) and _is_a_writers(failed.thread)):
            before(failed)

    threading.excepthook = tell
    try:
        yield
    except OSError:
        for thread in threading.enumerate():
            if _is_a_writers(thread):
                thread.join(1)  # one that has failed ends by itself, though maybe not yet
        raise
    finally:
        threading.excepthook = before


def _is_a_writers(thread: threading.Thread | None) -> bool:
    return type(thread).__module__.startswith("tensorboard.")
