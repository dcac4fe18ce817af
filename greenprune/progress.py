"""How a run is shown while it goes on."""

from __future__ import annotations

import contextlib
import math
import sys
import textwrap
import time
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from greenprune.formatting import (
    UNKNOWN,
    cost_name,
    format_joules,
    format_number,
    format_percent,
    format_removed,
    format_share,
    format_si,
    sparkline,
)

Event = dict[str, Any]
"""One line of events.jsonl: ``time``, ``step``, ``kind`` and what the kind has."""

_PANEL_WIDTH = 100
_REFRESH_S = 0.2
_SPARKS = 32  # points of a sparkline


def _format_float(value: float | None, digits: int) -> str:
    return UNKNOWN if value is None else f"{value:,.{digits}f}"


def _format_sources(sources: list[list[str | None]]) -> str:
    """Where joules come from, by quality: ``counter: RAPL counter; estimate: CodeCarbon; not measured: gpu``."""
    by_quality: dict[str, dict[str, None]] = {}
    for device, source, quality in sources:
        # A source's details follow its name after a colon; the start event's notes have them in full.
        name = str(device) if quality is None else str(source).partition(":")[0]
        by_quality.setdefault(quality or "not measured", {})[name] = None
    return "; ".join(f"{quality}: {', '.join(names)}" for quality, names in by_quality.items()) or "nothing is measured"


# What the events tell.

# Keys that events of older versions lack.
_NOT_TOLD: Event = {
    "resumed_from": None,
    "notes": [],
    "energy_sources": [],
    "budget_unit": "cost",
    "accuracy_kind": "eval",
    "device": "unknown device",
    "world_size": 1,
    "structure/channels": 0,
    "structure_given": False,
}


class Line(NamedTuple):
    """A line that stays, above whatever is redrawn."""

    text: str
    style: str = ""


class _Pace:
    """Joules a step while the network was whole, and how the run stands to that pace since.

    It is a projection of what the run would have taken with nothing removed, not a dense twin's measurement.

    Args:
        start: The start event of an attempt with the whole network.
    """

    def __init__(self, start: Event) -> None:
        self._start = self._whole = start
        self._is_cut = False

    def see(self, event: Event) -> None:
        """Take up a train event."""
        if not self._is_cut:
            self._whole = event

    def cut(self) -> None:
        """Something was removed: the pace is what it was until now."""
        self._is_cut = True

    def saved_j(self, now: Event) -> float | None:
        """Joules under the pace so far; None before the first removal, or if energy is not known."""
        begun, whole, total = (event.get("energy/total_j") for event in (self._start, self._whole, now))
        steps = self._whole["step"] - self._start["step"]
        if not self._is_cut or begun is None or whole is None or total is None or not steps:
            return None
        projected: float = (whole - begun) / steps * (now["step"] - self._start["step"])
        return projected - float(total - begun)


def _saved(saved_j: float) -> str:
    return f"{format_joules(abs(saved_j))} {'under' if saved_j >= 0 else 'over'}"


class RunStatus:
    """What the events so far tell about a run: lines that stay, and the present state as a panel.

    A start event comes before all others.
    """

    def __init__(self) -> None:
        self._start: Event = {}
        self._now: Event = {}
        self._accuracy: float | None = None
        self._interval = (0, 0.0)  # steps of this epoch that were timed, and their seconds
        self._operations: list[Event] = []
        self._marks: deque[tuple[float, int]] = deque()  # seconds and step of recent events, over an epoch
        self._watts: deque[float] = deque(maxlen=_SPARKS)
        self._losses: deque[float] = deque(maxlen=_SPARKS)
        self._pace: _Pace | None = None

    def take(self, event: Event) -> list[Line]:
        """Take up one event and give the lines that it adds."""
        kind: str = event["kind"]
        if kind in ("removal", "freeze"):
            self._operations.append(event)
            return []
        lines = self.flush()
        takers: dict[str, Callable[[Event], list[Line]]] = {
            "start": self._take_start,
            "train": self._take_train,
            "epoch": self._take_epoch,
            "interrupt": self._take_interrupt,
        }
        return lines + takers[kind](event) if kind in takers else lines

    def flush(self) -> list[Line]:
        """The line about removals at the last boundary, if they have not been told yet."""
        operations, self._operations = self._operations, []
        if not operations:
            return []
        last = operations[-1]
        self._now = {**self._now, **last}
        by_reason: dict[str, list[Event]] = {}
        for event in operations:
            if event["kind"] == "removal":
                by_reason.setdefault(event["reason"], []).append(event)
        if not by_reason:
            return []
        if self._pace is not None:
            self._pace.cut()
        units = "; ".join(f"{format_removed(events)} ({reason})" for reason, events in by_reason.items())
        where = f"step {last['step']} (epoch {_format_epoch(last['epoch'])})"
        return [Line(f"removed at {where}: {units}. Left: {self._structure()}", "green")]

    def _take_start(self, event: Event) -> list[Line]:
        self._start = self._now = event = {**_NOT_TOLD, **event}
        self._marks.clear()  # the time between two attempts is nobody's pace
        self._mark(event)
        self._pace = _Pace(event) if event["gated"] and self._is_whole() else None
        self._watts.clear()
        processes = f"{event['world_size']} processes" if event["world_size"] > 1 else "1 process"
        lines = [
            Line(
                f"{event['run']}: {event['model']} on {event['data']}, "
                f"{format_number(event['epochs'], 'epoch')} of {format_number(event['steps_per_epoch'], 'step')} "
                f"of {format_number(event['batch_size'], 'image')}, {event['device']}, {processes}",
                "bold",
            ),
            Line(self._goal()),
            Line(f"joules: {_format_sources(event['energy_sources'])}"),
        ]
        if event["resumed_from"] is not None:
            came_from = f"goes on after step {event['step']} from {event['resumed_from']}"
            lines.insert(1, Line(f"attempt {event['attempt']}: {came_from}", "yellow"))
        lines += [Line(f"note: {' '.join(note.split())}", "dim") for note in event["notes"]]
        return [*lines, Line(self._header(), "bold")]

    def _is_whole(self) -> bool:
        """Whether the run begins with everything that the dense network has."""
        dense = (len(self._start["units"]), sum(self._start.get("channels", {}).values()))
        return (self._start["structure/blocks"], self._start["structure/channels"]) == dense

    def _goal(self) -> str:
        start = self._start
        channels = f" with {self._channels().partition('/')[0].strip()} channels" if self._channels() else ""
        network = f"{start['structure/blocks']} blocks{channels}, {format_si(start['flops/forward'], 'FLOPs')} an image"
        if start["structure_given"] and not start["gated"]:
            dense = format_si(start["flops/forward_dense"], "FLOPs")
            return f"a given structure, without gates: {network}, dense {dense}"
        if not start["gated"]:
            return f"dense run: {network}; nothing is gated or removed"
        return (
            f"to keep: {format_percent(start['budget_target'])} of the dense {cost_name(start['budget_unit'])}; "
            f"now {network}, {start['structure/gates']} gates"
        )

    def _take_train(self, event: Event) -> list[Line]:
        steps, seconds = self._interval
        new_steps = event["step"] - self._now["step"]
        step_time_s: float | None = event.get("train/step_time_s")
        if step_time_s is not None:
            self._interval = (steps + new_steps, seconds + new_steps * step_time_s)
        self._now = event
        self._mark(event)
        if event.get("energy/power_w") is not None:
            self._watts.append(event["energy/power_w"])
        if event.get("train/loss") is not None:
            self._losses.append(event["train/loss"])
        if self._pace is not None:
            self._pace.see(event)
        return []

    def _take_epoch(self, event: Event) -> list[Line]:
        self._now = {**self._now, **event}
        line = Line(self._epoch_line(event))
        self._accuracy = event.get("eval/accuracy")
        self._interval = (0, 0.0)
        self._mark(event)
        return [line]

    def _take_interrupt(self, event: Event) -> list[Line]:
        checkpoint = Path(event.get("checkpoint", UNKNOWN)).name
        return [
            Line(
                f"{event.get('signal', 'a signal')} after step {event['step']}: checkpoint {checkpoint} is written",
                "yellow",
            )
        ]

    def _mark(self, event: Event) -> None:
        """Remember when a step was reached, over as many steps as an epoch has, so that pauses count in full."""
        # The clock on the wall may be set; only events of older versions tell no other.
        clock = "time" if self._start.get("time_s") is None else "time_s"
        if event.get(clock) is None:
            return
        self._marks.append((event[clock], event["step"]))
        while len(self._marks) > 2 and event["step"] - self._marks[1][1] >= self._start["steps_per_epoch"]:
            self._marks.popleft()

    # Lines in columns.

    def _columns(self, *cells: str) -> str:
        epoch_width = max(5, 2 * len(str(self._start["epochs"])) + 1)
        widths = (epoch_width, 10, 8, 8, 8, 8, 7, *((max(8, len(self._channels())),) if self._channels() else ()), 5)
        return "  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))

    def _channels(self) -> str:
        """Gated channels that are there, of how many; empty if none are gated. As wide as it will ever be."""
        dense = sum(self._start.get("channels", {}).values())
        return f"{self._now['structure/channels']}/{dense}".rjust(2 * len(str(dense)) + 1) if dense else ""

    def _header(self) -> str:
        kind = "val acc" if self._start["accuracy_kind"] == "validation" else f"{self._start['accuracy_kind']} acc"
        channels = ("channels",) if self._channels() else ()
        names = ("epoch", "train loss", kind, "images/s", "J epoch", "J total", "blocks", *channels, "FLOPs")
        return self._columns(*names)

    def _epoch_line(self, event: Event) -> str:
        steps, seconds = self._interval
        return self._columns(
            f"{event['epoch']}/{self._start['epochs']}",
            _format_float(event.get("train/loss"), 4),
            format_percent(event.get("eval/accuracy"), 2),
            _format_float(steps * self._start["batch_size"] / seconds if seconds else None, 0),
            format_joules(event.get("energy/epoch_j")),
            format_joules(event.get("energy/total_j")),
            f"{event['structure/blocks']}/{len(self._start['units'])}",
            *((self._channels(),) if self._channels() else ()),
            format_share(event["flops/forward"], self._start["flops/forward_dense"]),
        )

    def _structure(self) -> str:
        share = format_share(self._now["flops/forward"], self._start["flops/forward_dense"])
        blocks = f"{self._now['structure/blocks']} of {len(self._start['units'])} blocks"
        if self._channels():
            blocks += f", {self._channels().strip().replace('/', ' of ')} channels"
        gates = self._now["structure/gates"]
        return f"{blocks}, {gates} {'gate' if gates == 1 else 'gates'}, {share} of the dense FLOPs"

    # The present state.

    def panel(self) -> RenderableType:
        """The present state, a few lines high."""
        if not self._start:
            return Text("")
        lines: list[RenderableType] = [
            self._course(),
            Text(self._learning()),
            Text(self._spending()),
            Text(self._network()),
        ]
        saved_j = None if self._pace is None else self._pace.saved_j(self._now)
        if saved_j is not None:
            lines.append(Text(f"{_saved(saved_j)} what the whole network's pace would have taken", style="green"))
        if len(self._losses) > 1:
            lines.append(self._sparks())
        return Panel(Group(*lines), title=Text(self._start["run"]), width=_PANEL_WIDTH, border_style="dim")

    def _course(self) -> Table:
        per_epoch, epochs = self._start["steps_per_epoch"], self._start["epochs"]
        step, steps = self._now["step"], per_epoch * epochs
        epoch = max(1, math.ceil(step / per_epoch))
        row = Table.grid(expand=True, padding=(0, 1))
        row.add_column(no_wrap=True)
        row.add_column(ratio=1)
        row.add_column(no_wrap=True)
        bar = ProgressBar(total=steps, completed=step)
        row.add_row(f"epoch {epoch}/{epochs}", bar, f"step {step:,}/{steps:,}  {self._remaining(steps - step)} left")
        return row

    def _remaining(self, steps: int) -> str:
        (first_s, first), (last_s, last) = self._marks[0], self._marks[-1]
        if last <= first or last_s < first_s:
            return "?"
        return str(timedelta(seconds=round(steps * (last_s - first_s) / (last - first))))

    def _learning(self) -> str:
        now = self._now
        if "train/loss" not in now:
            return "waiting for the first steps"
        evaluated = ""
        if self._accuracy is not None:
            evaluated = f", {self._start['accuracy_kind']} {format_percent(self._accuracy, 2)}"
        return (
            f"loss {_format_float(now['train/loss'], 4)} · "
            f"accuracy {format_percent(now['train/accuracy'], 1)} (training{evaluated}) · "
            f"{_format_float(now.get('train/samples_per_s'), 0)} images/s"
        )

    def _spending(self) -> str:
        sources = _format_sources(self._start["energy_sources"])
        if "energy/total_j" not in self._now:
            return f"energy not read yet ({sources})"
        power_w, energy_j, co2_g = (self._now.get(f"energy/{key}") for key in ("power_w", "total_j", "co2_g"))
        power = "power unknown" if power_w is None else f"{power_w:,.0f} W"
        energy = "energy unknown" if energy_j is None else format_joules(energy_j)
        co2 = "" if co2_g is None else f" · {format_si(co2_g, 'g')} CO2e"
        return f"{power} · {energy} ({sources}){co2}"

    def _sparks(self) -> Table:
        """The course of the last loss and watts, each between its own least and most."""
        row = Table.grid(padding=(0, 1))
        cells: list[RenderableType] = [Text("loss"), Text(sparkline(self._losses), style="cyan")]
        if len(self._watts) > 1:
            cells += [Text(" watts"), Text(sparkline(self._watts), style="yellow")]
        row.add_row(*cells)
        return row

    def _network(self) -> str:
        if not self._start["gated"]:
            what = "structure given" if self._start["structure_given"] else "dense run"
            return f"{what}, {self._now['structure/blocks']} blocks"
        price = self._now.get("gate/price") if self._now["structure/gates"] else None
        return self._structure().replace(", ", " · ") + ("" if price is None else f" · price {price:.3g}")


def _format_epoch(epoch: float) -> str:
    return f"{epoch:.2f}".rstrip("0").rstrip(".")


# Where it is shown.


class Display:
    """Shows a run as its events come: a live panel on a terminal, plain lines elsewhere.

    The panel is drawn from the calling thread, and only as events come, so that it takes no time from training in
    between. When the terminal or pipe is gone the display falls silent: the run is worth more than its view.

    Args:
        stream: Where to write.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._status = RunStatus()
        self._console = Console(file=stream, highlight=False, soft_wrap=True)
        # The panel is drawn with characters that not every encoding has.
        unicode = (stream.encoding or "").lower().startswith("utf")
        self._on_terminal = stream.isatty() and unicode and not self._console.is_dumb_terminal
        self._live: Live | None = None
        self._drawn_s = -math.inf
        self._open = True

    def __call__(self, event: Event) -> None:
        """Show one event."""
        if not self._open:
            return
        try:
            self._write(self._status.take(event))
            if self._on_terminal:
                self._draw()
        except OSError:
            self._open = False
            self._stop()

    def close(self) -> None:
        """Take the panel away and give the terminal back; may be called twice, and whatever has happened."""
        if self._open:
            self._open = False
            with contextlib.suppress(OSError):
                self._write(self._status.flush())
        self._stop()

    def _stop(self) -> None:
        live, self._live = self._live, None
        if live is not None:
            with contextlib.suppress(OSError):
                live.stop()

    def _draw(self) -> None:
        if self._live is None:
            self._live = Live(
                console=self._console, get_renderable=self._status.panel, auto_refresh=False, transient=True
            )
            self._live.start()
        if time.monotonic() - self._drawn_s >= _REFRESH_S:
            self._live.refresh()
            self._drawn_s = time.monotonic()

    def _write(self, lines: list[Line]) -> None:
        for line in lines:
            if self._on_terminal:
                self._console.print(Text(self._fold(line.text), line.style))
            else:
                encoding = self._stream.encoding or "utf-8"
                print(line.text.encode(encoding, "replace").decode(encoding), file=self._stream, flush=True)

    def _fold(self, text: str) -> str:
        if len(text) <= self._console.width:
            return text
        return textwrap.fill(
            text, self._console.width, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False
        )


def open_display() -> Display:
    """A display on standard output. Whoever opens it closes it, also when training fails."""
    return Display(sys.stdout)
