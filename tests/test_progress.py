"""What a run shows while it goes on."""

from __future__ import annotations

import io
import os
import pty
import re
import threading
from typing import Any

import pytest
from rich.console import Console

from greenprune.formatting import format_joules, format_percent, format_seconds, format_si, sparkline, worst_quality
from greenprune.progress import Display, RunStatus, open_display

Event = dict[str, Any]


def structure(blocks: int = 4, gates: int = 4, flops: int = 1000) -> Event:
    return {
        "structure/blocks": blocks,
        "structure/gates": gates,
        "structure/params": 500,
        "structure/kept_cost": 1.0,
        "flops/forward": flops,
    }


def spending(energy_j: float | None, time_s: float = 0.0) -> Event:
    power_w = None if energy_j is None else 40.6
    return {"energy/total_j": energy_j, "energy/power_w": power_w, "energy/co2_g": None, "time_s": time_s}


def start(**changes: object) -> Event:
    return {
        "time": 100.0,
        "step": 0,
        "kind": "start",
        "run": "it",
        "attempt": 1,
        "resumed_from": None,
        "model": "resnet38",
        "data": "digits",
        "gated": True,
        "budget_target": 0.5,
        "budget_unit": "flops",
        "device": "cpu",
        "world_size": 1,
        "batch_size": 64,
        "accuracy_kind": "test",
        "epochs": 4,
        "steps_per_epoch": 10,
        "units": ["a", "b", "c", "d"],
        "energy_sources": [["cpu", "CodeCarbon: load of 8 W", "estimate"]],
        "notes": ["cpu: an estimate,\n because there is no counter"],
        **structure(),
        "flops/forward_dense": 1000,
        "time_s": 0.0,
        **changes,
    }


def train(step: int, energy_j: float | None = 50.0, step_time_s: float = 0.1, **changes: object) -> Event:
    return {
        "time": 100.0 + step,
        "step": step,
        "kind": "train",
        "epoch": step / 10,
        "train/loss": 1.5,
        "train/accuracy": 0.5,
        "train/lr": 0.1,
        "train/samples_per_s": 64 / step_time_s,
        "train/step_time_s": step_time_s,
        "gate/price": 0.25,
        **structure(),
        **spending(energy_j, float(step)),
        **changes,
    }


def epoch(number: int, energy_j: float | None = 50.0, epoch_j: float | None = 50.0, **changes: object) -> Event:
    return {
        "time": 100.0 + 10 * number,
        "step": 10 * number,
        "kind": "epoch",
        "epoch": number,
        "train/loss": 1.25,
        "train/accuracy": 0.5,
        "eval/loss": 1.0,
        "eval/accuracy": 0.7326,
        **structure(),
        **spending(energy_j, 10.0 * number),
        "energy/epoch_j": epoch_j,
        **changes,
    }


def change(kind: str, unit: str, reason: str) -> Event:
    now = structure(blocks=2, gates=1, flops=450)
    return {"time": 120.0, "step": 20, "kind": kind, "epoch": 2.0, "unit": unit, "reason": reason, **now}


def piped(*events: Event) -> list[str]:
    stream = io.StringIO()
    display = Display(stream)
    for event in events:
        display(event)
    display.close()
    return stream.getvalue().splitlines()


def panel(*events: Event, width: int = 80) -> str:
    status = RunStatus()
    for event in events:
        status.take(event)
    console = Console(file=io.StringIO(), width=width)
    console.print(status.panel())
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_piped_the_start_tells_the_run_its_goal_its_meter_and_its_notes() -> None:
    lines = piped(start())
    assert lines[0] == "it: resnet38 on digits, 4 epochs of 10 steps of 64 images, cpu, 1 process"
    assert lines[1] == "to keep: 50 % of the dense FLOPs; now 4 blocks, 1.00 kFLOPs an image, 4 gates"
    assert lines[2] == "joules: estimate: CodeCarbon"
    assert lines[3] == "note: cpu: an estimate, because there is no counter"
    assert lines[4].split("  ")[0] == "epoch"
    assert len(lines) == 5


def test_piped_an_epoch_is_one_line_in_stable_columns() -> None:
    lines = piped(
        start(),
        train(5, 20.0, step_time_s=0.1),
        train(10, 45.0, step_time_s=0.3),
        epoch(1, 50.0),
        {"time": 111.0, "step": 10, "kind": "checkpoint", "path": "p", "pause_s": 0.1},
        train(20, 12_000.0),
        epoch(2, 12_345.0, 12_295.0),
    )
    header, first, second = lines[-3:]
    # 5 steps of 0.1 s and 5 of 0.3 s are 640 images in 2 s.
    assert " ".join(first.split()) == "1/4 1.2500 73.26 % 320 50.0 J 50.0 J 4/4 100 %"
    assert " ".join(second.split()) == "2/4 1.2500 73.26 % 640 12.3 kJ 12.3 kJ 4/4 100 %"
    assert len(header) <= len(first) == len(second) <= 80


def test_removals_of_one_boundary_are_one_line() -> None:
    lines = piped(
        start(),
        train(20),
        change("removal", "b", "off"),
        change("removal", "c", "settled"),
        change("removal", "a", "off"),
        change("freeze", "d", "on"),
        {"time": 120.0, "step": 20, "kind": "surgery", "pause_s": 0.1},
    )
    assert lines[-1] == (
        "removed at step 20 (epoch 2): b, a (off); c (settled). Left: 2 of 4 blocks, 1 gate, 45 % of the dense FLOPs"
    )
    assert len(lines) == 6


def test_removals_are_told_even_if_the_run_breaks_off_there() -> None:
    assert piped(start(), change("removal", "b", "off"))[-1].startswith("removed at step 20 (epoch 2): b (off)")


def test_a_boundary_that_only_freezes_is_silent() -> None:
    assert len(piped(start(), change("freeze", "d", "on"), train(21))) == 5


def test_a_resumed_run_says_so_and_guesses_no_joules_that_are_not_told() -> None:
    lines = piped(
        start(step=10, attempt=2, resumed_from="runs/it/checkpoints/step-000000010"),
        train(20, 70.0),
        epoch(2, 75.0, None),
        train(30, 95.0),
        epoch(3, 100.0, 25.0),
    )
    assert lines[1] == "attempt 2: goes on after step 10 from runs/it/checkpoints/step-000000010"
    assert "unknown    75.0 J" in lines[-2]
    assert "25.0 J" in lines[-1]


def test_unknown_energy_is_never_zero() -> None:
    sources = [["gpu", None, None]]
    events = [start(energy_sources=sources), train(10, None), epoch(1, None, None)]
    lines = piped(*events)
    assert lines[2] == "joules: not measured: gpu"
    assert lines[-1].count("unknown") == 2
    assert " 0 J" not in lines[-1]
    assert "power unknown · energy unknown (not measured: gpu)" in panel(*events)


def test_a_dense_run_says_so() -> None:
    lines = piped(start(gated=False, budget_target=None, **{"structure/gates": 0}))
    assert lines[1] == "dense run: 4 blocks, 1.00 kFLOPs an image; nothing is gated or removed"
    assert "dense run, 4 blocks" in panel(start(gated=False), train(10) | {"gate/price": None})


def test_an_interrupt_is_told() -> None:
    stop = {"time": 105.0, "step": 5, "kind": "interrupt", "signal": "SIGTERM", "checkpoint": "a/step-000000005"}
    assert piped(start(), stop)[-1] == "SIGTERM after step 5: checkpoint step-000000005 is written"


def test_the_panel_shows_where_the_run_stands() -> None:
    text = panel(start(), train(10, 1234.0), epoch(1, 1234.0), train(15, 1234.0))
    assert "epoch 2/4" in text
    assert "step 15/40  0:00:25 left" in text  # a second a step
    assert "loss 1.5000 · accuracy 50.0 % (training, test 73.26 %) · 640 images/s" in text
    assert "41 W · 1,234 J (estimate: CodeCarbon)" in text
    assert "4 of 4 blocks · 4 gates · 100 % of the dense FLOPs · price 0.25" in text


def test_the_panel_knows_a_removal_before_the_next_step_is_recorded() -> None:
    status = [start(), train(20), change("removal", "b", "off"), {"time": 120.0, "step": 20, "kind": "surgery"}]
    assert "2 of 4 blocks · 1 gate · 45 % of the dense FLOPs" in panel(*status)


def test_the_panel_names_every_source_once_and_the_co2_if_known() -> None:
    gpus = [[f"GPU-{index}", "NVML energy counter", "counter"] for index in range(8)]
    event = train(10, 5000.0, **{"energy/co2_g": 0.08})
    text = panel(start(energy_sources=[*gpus, ["dram", "CodeCarbon: 20 W", "estimate"]]), event, width=120)
    assert "5,000 J (counter: NVML energy counter; estimate: CodeCarbon) · 80.0 mg CO2e" in text


def test_before_the_first_step_nothing_is_claimed() -> None:
    text = panel(start())
    assert "waiting for the first steps" in text
    assert "energy not read yet" in text
    assert "? left" in text


def test_a_time_left_follows_the_pace_of_the_last_epoch() -> None:
    slow = [train(step, time_s=10.0 * step) for step in (5, 10)]
    fast = [train(step, time_s=100.0 + (step - 10)) for step in (15, 20)]
    assert "0:00:20 left" in panel(start(), *slow, *fast)


def test_a_time_left_does_not_hang_on_the_clock_on_the_wall() -> None:
    """Which may be set, while the seconds of a run only grow."""
    back = [train(10), *(train(step, time=100.0 + step - 3600) for step in (15, 20))]
    assert "0:00:20 left" in panel(start(), *back)


@pytest.mark.parametrize(("set_back_s", "left"), [(0, "0:00:20 left"), (3600, "? left")])
def test_where_no_seconds_are_told_the_clock_on_the_wall_has_to_do(set_back_s: int, left: str) -> None:
    events = [start(), train(10), *(train(step, time=100.0 + step - set_back_s) for step in (15, 20))]
    old = [{key: value for key, value in event.items() if key != "time_s"} for event in events]
    assert left in panel(*old)


def test_a_stream_without_unicode_is_served_too() -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    display = Display(stream)
    display(start(run="é"))
    display.close()
    assert isinstance(stream.buffer, io.BytesIO)
    assert stream.buffer.getvalue().startswith(b"?: resnet38")


class _Gone(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(5, "Input/output error")


def test_a_terminal_that_is_gone_does_not_stop_the_run() -> None:
    display = Display(_Gone())
    display(start())
    display(train(10))
    display.close()
    display.close()


def test_the_display_is_on_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    display = open_display()
    display(start())
    display.close()
    assert capsys.readouterr().out.startswith("it: resnet38")


class Terminal:
    """A pseudo-terminal whose output is collected."""

    def __init__(self) -> None:
        self._master, slave = pty.openpty()
        self.stream = os.fdopen(slave, "w", encoding="utf-8")
        self._chunks: list[bytes] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        while True:
            try:
                chunk = os.read(self._master, 4096)
            except OSError:  # the other end is closed
                return
            if not chunk:
                return
            self._chunks.append(chunk)

    def text(self) -> str:
        self.stream.close()
        self._reader.join()
        os.close(self._master)
        return b"".join(self._chunks).decode()


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delenv("TTY_INTERACTIVE", raising=False)
    return Terminal()


HIDE_CURSOR, SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"


def test_a_terminal_has_a_panel_and_is_given_back(terminal: Terminal) -> None:
    display = Display(terminal.stream)
    for event in (start(), train(10), epoch(1)):
        display(event)
    display.close()
    display.close()
    text = terminal.text()
    assert "╭" in text
    assert "epoch 1/4" in text
    assert "73.26 %" in text
    assert text.count(HIDE_CURSOR) == text.count(SHOW_CURSOR) == 1
    assert text.index(HIDE_CURSOR) < text.index(SHOW_CURSOR)


def test_nothing_is_shown_after_the_end(terminal: Terminal) -> None:
    display = Display(terminal.stream)
    display(start())
    display.close()
    display(epoch(1))
    text = terminal.text()
    assert "73.26 %" not in text
    assert text.count(HIDE_CURSOR) == text.count(SHOW_CURSOR) == 1


def test_a_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    terminal = Terminal()
    display = Display(terminal.stream)
    display(start())
    display.close()
    text = terminal.text()
    assert text.startswith("it: resnet38")
    assert "\x1b" not in text


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (format_si(10_341_632, "FLOPs"), "10.3 MFLOPs"),
        (format_si(999_600, "FLOPs"), "1.00 MFLOPs"),
        (format_si(561_082), "561 k"),
        (format_si(0.0022, "g"), "2.20 mg"),
        (format_si(0, "g"), "0 g"),
        (format_si(None, "g"), "unknown"),
        (format_joules(1234.4), "1,234 J"),
        (format_joules(12_345), "12.3 kJ"),
        (format_joules(0.5), "0.50 J"),
        (format_joules(None), "unknown"),
        (format_seconds(0.0148), "14.8 ms"),
        (format_seconds(119.4), "119 s"),
        (format_seconds(744), "12.4 min"),
        (format_seconds(11_160), "3.10 h"),
        (format_seconds(None), "unknown"),
        (format_percent(0.8871, 1), "88.7 %"),
        (format_percent(None), "unknown"),
    ],
)
def test_numbers_have_human_units(shown: str, expected: str) -> None:
    assert shown == expected


def test_a_sum_is_as_good_as_its_worst_part() -> None:
    assert worst_quality(["counter", "estimate", None]) == "estimate"
    assert worst_quality(["counter"]) == "counter"
    assert worst_quality([None]) is None


# Channels.

CHANNELS = {"channels": {"a:hidden": 16, "b:hidden": 84}}


def test_channels_have_a_column_and_are_counted_not_listed() -> None:
    gone = [change("removal", "a:hidden", "off") | {"channels": list(range(9)), "structure/channels": 61}]
    gone += [change("removal", "b:hidden", "off") | {"channels": list(range(30)), "structure/channels": 61}]
    gone += [change("removal", "c", "settled") | {"channels": None, "structure/channels": 61}]
    lines = piped(
        start(**CHANNELS, **{"structure/channels": 100}),
        train(10, **{"structure/channels": 100}),
        epoch(1, **{"structure/channels": 100}),
        *gone,
        epoch(2, **{"structure/channels": 61}),
    )
    text = "\n".join(lines)
    assert "now 4 blocks with 100 channels, 1.00 kFLOPs an image, 4 gates" in text
    assert "39 channels of 2 blocks (off); c (settled). Left: 2 of 4 blocks, 61 of 100 channels, 1 gate" in text
    header, first, second = (line for line in lines if line.lstrip().startswith(("epoch", "1/4", "2/4")))
    assert len(header) == len(first) == len(second)
    assert header.split()[-2] == "channels"
    assert "100/100" in first
    assert "61/100" in second


def test_one_channel_names_its_block() -> None:
    gone = change("removal", "stages.1.2:hidden", "settled") | {"channels": [3], "structure/channels": 99}
    text = "\n".join(piped(start(**CHANNELS, **{"structure/channels": 100}), gone, train(21)))
    assert "1 channel of stages.1.2 (settled)" in text


def test_a_run_without_gated_channels_has_no_column_for_them() -> None:
    text = "\n".join(piped(start(), epoch(1)))
    assert "channels" not in text


def test_joules_saved_are_told_against_the_pace_of_the_whole_network() -> None:
    begun = start(**spending(10.0), **{"structure/channels": 0})
    whole = train(20, 50.0)  # 2 J a step
    assert "pace" not in panel(begun, whole)
    after = train(30, 62.0)  # 10 more steps at the old pace: 70 J
    assert "8.00 J under what the whole network's pace would have taken" in panel(
        begun, whole, change("removal", "b", "off"), after
    )
    worse = train(30, 75.0)
    assert "5.00 J over what" in panel(begun, whole, change("removal", "b", "off"), worse)


@pytest.mark.parametrize(
    "begun",
    [
        start(**spending(None)),
        start(**spending(10.0), gated=False),
        start(**spending(10.0)) | {"structure/blocks": 3},  # an attempt that begins with a network cut already
    ],
)
def test_no_saving_is_told_that_nothing_is_known_of(begun: Event) -> None:
    events = [begun, train(20, 50.0), change("removal", "b", "off"), train(30, 62.0)]
    if begun["energy/total_j"] is None:
        events = [begun, train(20, None), change("removal", "b", "off"), train(30, None)]
    assert "pace" not in panel(*events)


def test_the_panel_draws_loss_and_watts() -> None:
    falling = [
        train(step, **{"train/loss": loss, "energy/power_w": 10.0 * step}) for step, loss in ((1, 2.0), (2, 1.0))
    ]
    text = panel(start(), *falling)
    assert "loss █▁" in text
    assert "watts ▁█" in text
    assert "watts ▁" not in panel(start(), train(1, None), train(2, None))


def test_a_sparkline_spans_its_own_range() -> None:
    assert sparkline([1, 2, 3]) == "▁▅█" or sparkline([1, 2, 3]) == "▁▄█"
    assert sparkline([5, 5]) == "▁▁"
    assert sparkline([1.0, float("nan"), 2.0]) == "▁·█"
    assert sparkline([]) == ""


def test_events_of_an_older_version_are_shown_with_what_they_tell() -> None:
    old_start = {key: value for key, value in start().items() if key not in ("accuracy_kind", "notes", "resumed_from")}
    old_epoch = {key: value for key, value in epoch(1).items() if key not in ("energy/epoch_j", "energy/co2_g")}
    lines = piped(old_start, train(10), old_epoch)
    assert "unknown    50.0 J" in lines[-1]
    assert "eval acc" in lines[-2]


def test_no_color_is_honoured(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    display = Display(terminal.stream)
    for event in (start(), train(10), train(20), epoch(2), change("removal", "b", "off"), train(30)):
        display(event)
    display.close()
    text = terminal.text()
    assert "╭" in text
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]m", text)
