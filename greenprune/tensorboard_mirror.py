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
        """Send one event."""
        kind, step = event["kind"], event["step"]
        if kind in _MIRRORED:
            for name, value in numbers_of(event).items():
                self._writer.add_scalar(name, value, step)
        if kind == "window":
            for name, seen in event.get("units", {}).items():
                several = isinstance(seen["rate"], list)
                rate = sum(seen["rate"]) / max(1, len(seen["rate"])) if several else seen["rate"]
                self._writer.add_scalar(f"gate_rate/{name.replace(':', '.')}", rate, step)
        elif kind == "end":
            self._end(event["summary"])
        if kind in ("epoch", "end"):
            self._writer.flush()

    def _end(self, summary: dict[str, Any]) -> None:
        wanted = ("accuracy", "energy_j", "co2_g", "flops_train", "flops_forward", "params", "time_s")
        results = {f"result/{key}": summary[key] for key in wanted if summary.get(key) is not None}
        # In the same folder: one run, not two.
        self._writer.add_hparams(plain_settings(self._config), results, run_name=".")


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
