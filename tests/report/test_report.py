"""Reports of runs: their numbers, their forms, and runs that are not as they should be."""

from __future__ import annotations

import base64
import csv
import html
import io
import json
import os
import re
import shutil
import statistics
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from greenprune.cli import main
from greenprune.config import UserError
from greenprune.energy import CO2_IS_UNKNOWN, CarbonIntensity
from greenprune.formatting import format_joules, format_percent, format_si
from greenprune.locking import FolderLock
from greenprune.report.comparison import compare_runs
from greenprune.report.contents import build_report
from greenprune.report.figures import (
    accuracy_against_joules,
    gate_map_figure,
    group_styles,
    mean_over_epochs,
    overview,
    part_means,
)
from greenprune.report.history import REMOVED, read_history
from greenprune.report.page import render_page
from greenprune.report.parts import Report
from greenprune.report.words import render_csv, render_json, render_markdown
from greenprune.report.writing import write_report, write_run_report
from greenprune.tracking import RunFolder

sys.path.insert(0, str(Path(__file__).parent))
from recording import SOURCES, STEPS, config, damage_line, record_run, stop_before, write_events


def record_four(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Two seeds, dense and gated."""
    return {
        f"{kind}-{seed}": record_run(folder / f"{kind}-{seed}", seed=seed, gated=kind == "gated")
        for kind in ("dense", "gated")
        for seed in (0, 1)
    }


def text_of(page: str) -> str:
    """What a reader sees of a page: without its scripts, styles and tags."""
    bare = re.sub(r"<(script|style)\b.*?</\1>", "", page, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", bare)).split())


def embedded(page: str, name: str) -> Any:
    found = re.search(rf'<script type="application/json" id="{name}">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    return json.loads(found.group(1))


# Every number, recomputed from the events alone.


def test_every_number_is_that_of_the_events(tmp_path: Path) -> None:
    recorded = record_four(tmp_path)
    for name in recorded:
        (tmp_path / name / "summary.json").unlink()  # the events are enough
    report = build_report([tmp_path])
    values = json.loads(render_json(report))
    rows = {row["run"]: row for row in csv.DictReader(io.StringIO(render_csv(report)))}
    seen = text_of(render_page(report, "1"))
    for run in values["runs"]:
        events = recorded[run["name"]]
        epochs = [event for event in events if event["kind"] == "epoch"]
        total_j = next(event for event in events if event["kind"] == "end")["summary"]["energy_j"]
        expected = {
            "accuracy": epochs[-1]["eval/accuracy"],
            "flops_train": epochs[-1]["flops/train"],
            "flops_train_dense": epochs[-1]["flops/train_dense"],
            "flops_forward": epochs[-1]["flops/forward"],
            "blocks": epochs[-1]["structure/blocks"],
            "channels": epochs[-1]["structure/channels"],
            "params": epochs[-1]["structure/params"],
            "energy_j": total_j,
        }
        assert {key: run["summary"][key] for key in expected} == expected
        assert {key: float(rows[run["name"]][key]) for key in expected} == expected
        assert [row["energy_j"] for row in run["history"]["epochs"]] == [e["energy/total_j"] for e in epochs]
        assert [row["epoch_j"] for row in run["history"]["epochs"]] == pytest.approx(
            [
                now["energy/total_j"] - before
                for now, before in zip(epochs, [0.5, *(e["energy/total_j"] for e in epochs[:-1])], strict=True)
            ]
        )
        assert sum(run["history"]["energy_by_phase_j"].values()) == pytest.approx(total_j)
        for shown in (
            format_percent(expected["accuracy"], 2),
            format_joules(total_j),
            format_si(expected["flops_train"]),
            f"{expected['blocks']}/6",
        ):
            assert shown in seen
    for kind, group in zip(("dense", "gated"), values["tasks"][0]["groups"], strict=True):
        ends = [recorded[f"{kind}-{seed}"][-1]["summary"] for seed in (0, 1)]
        for key in ("accuracy", "energy_j", "flops_train"):
            spread = group["spreads"][key]
            assert spread["mean"] == pytest.approx(statistics.fmean(end[key] for end in ends))
            assert spread["sd"] == pytest.approx(statistics.stdev(end[key] for end in ends))
            assert spread["n"] == 2
    ratios = [
        recorded[f"gated-{seed}"][-1]["summary"]["energy_j"] / recorded[f"dense-{seed}"][-1]["summary"]["energy_j"]
        for seed in (0, 1)
    ]
    against = values["tasks"][0]["groups"][1]["against_twins"]
    assert against["energy_j"]["mean"] == pytest.approx(statistics.fmean(ratios))
    assert f"{statistics.fmean(ratios):.2f} ± {statistics.stdev(ratios):.2f}x the joules" in seen


def test_curves_of_the_page_are_those_of_the_events(tmp_path: Path) -> None:
    recorded = record_four(tmp_path)
    figures = embedded(render_page(build_report([tmp_path]), "1"), "figures")

    def numbers(array: Any) -> list[float]:
        kinds = {"f8": "d", "i1": "b", "i2": "h", "u1": "B", "i4": "i"}
        content = base64.b64decode(array["bdata"])
        kind = kinds[array["dtype"]]
        return list(struct.unpack(f"<{len(content) // struct.calcsize(kind)}{kind}", content))

    for figure, key in (("t0-joules", "energy/total_j"), ("t0-flops", "flops/train")):
        lines = {trace["meta"]["run"]: trace for trace in figures[figure]["data"] if "run" in trace.get("meta", {})}
        assert lines.keys() == recorded.keys()
        for name, trace in lines.items():
            epochs = [event for event in recorded[name] if event["kind"] == "epoch"]
            assert numbers(trace["x"]) == [event["epoch"] for event in epochs]
            assert numbers(trace["y"]) == [event[key] for event in epochs]
        means = [trace for trace in figures[figure]["data"] if "group" in trace.get("meta", {})]
        both = [[e[key] for e in recorded[f"gated-{seed}"] if e["kind"] == "epoch"] for seed in (0, 1)]
        assert numbers(means[1]["y"]) == pytest.approx([statistics.fmean(pair) for pair in zip(*both, strict=True)])


def test_the_gate_map_goes_from_open_to_gone(tmp_path: Path) -> None:
    record_run(tmp_path / "gated")
    (run,) = build_report([tmp_path]).runs
    gates = run.history.gate_map
    rows = dict(zip(gates.units, gates.open_share, strict=True))
    assert gates.epochs == (1, 2, 3, 4)
    assert gates.units[:2] == ("stages.0.0", "stages.0.0:hidden")
    assert rows["stages.1.2"] == (0.75, REMOVED, REMOVED, REMOVED)
    assert rows["stages.1.2:hidden"] == (pytest.approx(7 / 8), REMOVED, REMOVED, REMOVED)
    assert rows["stages.1.1"] == (0.75, 0.75, REMOVED, REMOVED)
    assert rows["stages.0.0:hidden"][:2] == (pytest.approx(7 / 8), pytest.approx(4 / 8))
    network = {fate.name: fate for fate in run.history.network}
    assert network["stages.1.2"].removed is not None
    assert network["stages.1.2"].removed.epoch == 2
    assert network["stages.0.0"].removed is None
    assert network["stages.0.0"].sets[0].left == 4
    assert gate_map_figure(gates).data[0].z.shape == (12, 4)
    seen = text_of(render_page(build_report([tmp_path]), "1"))
    assert "stages.1.2 removed at epoch 2 (off)" in seen
    assert "hidden: 4 of 8 channels, cut at epoch 2" in seen
    assert "2 of 6 blocks are gone, and 20 of 48 gated channels" in seen


def test_a_channel_set_that_is_frozen_shows_the_share_that_is_left() -> None:
    def event(kind: str, step: int, **values: Any) -> dict[str, Any]:
        return {"time": 0.0, "step": step, "kind": kind, **values}

    gates = read_history(
        [
            event("start", 0, units=["a"], channels={"a:hidden": 4}),
            event("epoch", 1, epoch=1),
            event("window", 2, units={"a:hidden": {"unit": [0, 1, 2, 3], "rate": [1, 1, 1, 0], "openness": [1] * 4}}),
            event("removal", 2, unit="a:hidden", reason="off", channels=[3]),
            event("freeze", 2, unit="a:hidden", reason="on", channels=None),
            event("epoch", 2, epoch=2),
        ]
    ).gate_map
    assert gates.open_share == ((None, 0.75),)
    colours = gate_map_figure(gates).data[0].z.tolist()
    assert colours[0][1] == 75
    assert colours[0][0] > 140  # not known, and not taken for gone


def test_the_front_holds_what_nothing_beats(tmp_path: Path) -> None:
    record_four(tmp_path)
    task = build_report([tmp_path]).tasks[0]
    means = {g.label: (g.spreads["energy_j"].mean, g.spreads["accuracy"].mean) for g in task.groups}  # type: ignore[union-attr]
    beaten = {
        label
        for label, (joules, accuracy) in means.items()
        if any(j <= joules and a >= accuracy and (j, a) != (joules, accuracy) for j, a in means.values())
    }
    assert task.front is not None
    assert set(task.front) == means.keys() - beaten


def test_differences_are_exact(tmp_path: Path) -> None:
    record_four(tmp_path)
    other = tmp_path / "gated-other"
    record_run(other, seed=0)
    (other / "config.yaml").write_text(json.dumps(config(0, optim__lr=0.1) | {"new_key": 3}))
    report = build_report([tmp_path])
    assert set(report.differences) == {"gate.enabled", "optim.lr", "new_key"}
    lr = report.differences["optim.lr"]
    assert list(lr.values()) == [(0.05,), (0.05,), (0.1,)]
    assert next(iter(report.differences["new_key"].values())) == ("not in its config",)
    assert len({group.label for group in report.groups}) == 3


def record_with(folder: Path, name: str, seed: int = 0, **changes: Any) -> None:
    """A run with a few other keys in its config."""
    record_run(folder / name, seed=seed)
    (folder / name / "config.yaml").write_text(json.dumps(config(seed, **changes)))


def labels_of(report: Report) -> dict[str, str]:
    """What each run's group is called, without its gating."""
    return {run.name: group.label.partition(" (")[2][:-1] for group in report.groups for run in group.runs}


def test_labels_tell_what_sets_groups_apart_and_nothing_that_only_some_of_their_runs_have(tmp_path: Path) -> None:
    record_with(tmp_path, "a", stall_s=9, data__eval_batch_size=100, energy={"interval_s": 2})
    record_with(tmp_path, "b", stall_s=600, data__eval_batch_size=512, energy={"interval_s": 1})
    record_with(tmp_path, "c", stall_s=600, data__eval_batch_size=512, optim__lr=0.07)
    record_with(tmp_path, "d", stall_s=600, data__eval_batch_size=512, optim__lr=0.08)
    report = build_report([tmp_path])
    assert labels_of(report) == {"a": "lr 0.05", "b": "lr 0.05", "c": "lr 0.07", "d": "lr 0.08"}
    assert "stall_s" in report.differences


def test_labels_of_runs_that_each_differ_in_another_key_name_that_key(tmp_path: Path) -> None:
    every: dict[str, Any] = {"gate__kind": "conditional", "gate__every": 4, "optim__ema": None, "gate__lr": 20}
    changes = {"gate__kind": "static", "gate__every": 2, "optim__ema": 0.9, "gate__lr": 30}
    for key, value in changes.items():
        record_with(tmp_path, key, **every | {key: value})
    record_with(tmp_path, "base", **every)
    record_with(tmp_path, "both", **every | {"gate__every": 2, "optim__ema": 0.9})
    assert labels_of(build_report([tmp_path])) == {
        "gate__kind": "kind static",
        "gate__every": "ema None, every 2",
        "optim__ema": "ema 0.9, every 4",
        "gate__lr": "gate.lr 30",
        "base": "ema None, kind conditional, every 4, gate.lr 20",
        "both": "ema 0.9, every 2",
    }


def test_a_run_that_lacks_the_key_that_sets_another_apart_is_called_by_its_name(tmp_path: Path) -> None:
    record_with(tmp_path, "old")
    record_with(tmp_path, "new", gate__every=4)
    assert labels_of(build_report([tmp_path])) == {"old": "as old", "new": "every 4"}


def test_co2e_is_told_at_the_intensity_that_is_asked_for(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    recorded = record_four(tmp_path)
    asked = ["report", str(tmp_path), "--intensity", "360", "--pue", "1.5"]
    assert main([*asked, "--format", "json"]) == 0
    report = json.loads(capfd.readouterr().out)
    assert len(report["runs"]) == 4
    for run in report["runs"]:
        joules = recorded[run["name"]][-1]["summary"]["energy_j"]
        assert run["summary"]["co2_g"] == pytest.approx(joules * 1.5 / 10_000)
        for epoch in run["history"]["epochs"]:
            assert epoch["co2_g"] == pytest.approx(epoch["energy_j"] * 1.5 / 10_000)
    assert main([*asked, "--format", "md"]) == 0
    told = capfd.readouterr().out
    assert "360 g/kWh (given) and a PUE of 1.5, as asked for" in told
    assert "360 g/kWh, given" in told


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--country", "France"], ["--country: 'France'", "three-letter"]),
        (["--region", "bavaria"], ["--region: 'bavaria'", "--country"]),
        (["--intensity", "-1"], ["--intensity: -1.0", "at least 0"]),
        (["--pue", "1.5"], ["--pue: 1.5", "--country or --intensity"]),
    ],
)
@pytest.mark.parametrize("command", ["report", "compare"])
def test_an_intensity_that_is_none_is_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], command: str, options: list[str], parts: list[str]
) -> None:
    record_run(tmp_path / "it")
    assert main([command, str(tmp_path), *options]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert all(part in line for part in parts)
    assert "energy." not in line


# Runs that are not as they should be.


def forms(report: Report) -> tuple[str, str]:
    """The page as text and the Markdown, after making every form."""
    json.loads(render_json(report))
    render_csv(report)
    overview(report)
    return text_of(render_page(report, "1")), render_markdown(report)


def test_a_killed_run_with_a_truncated_last_line_is_shown_as_far_as_it_came(tmp_path: Path) -> None:
    recorded = record_four(tmp_path)
    stop_before(tmp_path / "gated-1", recorded["gated-1"], 25, '{"time": 17900000')
    report = build_report([tmp_path])
    run = next(run for run in report.runs if run.name == "gated-1")
    assert run.state == "unfinished: step 20 of 40; last event 2026-09-21 14:13 UTC"
    assert [epoch.epoch for epoch in run.history.epochs] == [1, 2]
    gated = report.tasks[0].groups[1]
    assert gated.spreads["accuracy"] is not None
    assert gated.spreads["accuracy"].n == 1  # a run that is not finished is in no mean
    for text in forms(report):
        assert "Not finished, so in no mean and no ratio: gated-1" in text
        assert "unfinished: step 20 of 40" in text


@pytest.mark.parametrize("time", [1e15, -1e12, 1e300])
def test_a_clock_beyond_all_years_stops_no_report(tmp_path: Path, time: float) -> None:
    events = record_run(tmp_path / "it")
    stop_before(tmp_path / "it", events, 25, json.dumps(events[-2] | {"step": 25, "time": time}) + "\n")
    for text in forms(build_report([tmp_path])):
        assert "unfinished: step 25 of 40" in text
        assert "last event" not in text


def test_copies_of_a_run_are_no_seeds(tmp_path: Path) -> None:
    record_run(tmp_path / "a", gated=False)
    (tmp_path / "a" / "id.txt").write_text("a-1\n")
    for name in ("0", "b"):  # the one that still has the name that it was made with is the original
        shutil.copytree(tmp_path / "a", tmp_path / name)
    report = build_report([tmp_path])
    assert [run.name for run in report.runs] == ["a"]
    for text in forms(report):
        assert "0 is left out: it is a copy of" in text
        assert "b is left out: it is a copy of" in text


def record_repeats(folder: Path, seeds: tuple[int, ...]) -> Report:
    """Dense and gated runs of some seeds, which agree in accuracy where they repeat a seed, and not in joules."""
    for number, seed in enumerate(seeds):
        for kind in ("dense", "gated"):
            path = folder / f"{kind}-{number}"
            events = record_run(path, seed=seed, gated=kind == "gated")
            change_summary(path, energy_j=events[-1]["summary"]["energy_j"] + number)
    return build_report([folder])


def test_a_seed_that_runs_repeat_counts_once_in_accuracy(tmp_path: Path) -> None:
    report, once = record_repeats(tmp_path, (0, 0, 0, 1)), record_repeats(tmp_path / "once", (0, 1))
    told, expected = (one.to_dict()["tasks"][0]["groups"] for one in (report, once))
    for group, of_seeds in zip(told, expected, strict=True):
        for key in ("accuracy", "flops_train", "flops_forward"):
            assert group["spreads"][key] == pytest.approx(of_seeds["spreads"][key])
        assert [group["spreads"][key]["n"] for key in ("accuracy", "energy_j", "time_s", "step_time_s")] == [2, 4, 4, 4]
    gated, pairs = (groups[1]["against_twins"] for groups in (told, expected))
    assert gated["accuracy_points"] == pytest.approx(pairs["accuracy_points"])
    assert gated["energy_j"]["n"] == 4
    curve = mean_over_epochs(report.groups[1], "flops_train")
    assert curve[4] == pytest.approx(told[1]["spreads"]["flops_train"]["mean"])
    for text in forms(report):
        assert "Against its dense twins, 2 pairs" in text
        assert "Runs repeat a seed: dense (4 runs of 2 seeds); block + channel gates, keep 50 % (4 runs of 2" in text
    assert not any("repeat a seed" in note for note in once.notes)


def test_repeats_of_one_seed_have_no_spread_of_accuracy(tmp_path: Path) -> None:
    report = record_repeats(tmp_path, (0, 0))
    assert [group["spreads"]["accuracy"]["sd"] for group in report.to_dict()["tasks"][0]["groups"]] == [None, None]
    page, text = forms(report)
    assert "2 runs, seed 0" in page
    for told in (page, text):
        assert re.search(r"dense: [\d.]+ % with [\d.]+ J ± ", told)
        assert re.search(r"Against its dense twin: [+-][\d.]+ points", told)
    figure = accuracy_against_joules(report.tasks[0], group_styles(report))
    assert figure is not None
    assert sum("mean of 2" in trace.hovertemplate for trace in figure.data) == 2


def test_seeds_are_in_the_order_of_numbers(tmp_path: Path) -> None:
    for seed in (10, 9, 2):
        record_run(tmp_path / f"run-{seed}", seed=seed)
    for text in forms(build_report([tmp_path])):
        assert text.index("run-2") < text.index("run-9") < text.index("run-10")


def test_a_row_of_a_run_that_goes_on_tells_its_seed_and_attempts(tmp_path: Path) -> None:
    recorded = record_run(tmp_path / "it", seed=7)
    stop_before(tmp_path / "it", recorded, 20)
    (row,) = csv.DictReader(io.StringIO(render_csv(build_report([tmp_path]))))
    assert (row["seed"], row["attempts"]) == ("7", "1")


def test_the_meters_of_every_attempt_are_told(tmp_path: Path) -> None:
    """A run that went on where a GPU's counter could be read was metered by both."""
    recorded = record_run(tmp_path / "it")
    second = {**recorded[0], "attempt": 2, "energy_sources": [["GPU-1", "NVML energy counter", "counter"]]}
    recorded.insert(-1, second)
    write_events(tmp_path / "it", recorded)
    report = build_report([tmp_path])
    (row,) = csv.DictReader(io.StringIO(render_csv(report)))
    for device, source, quality in (*SOURCES, ("GPU-1", "NVML energy counter", "counter")):
        assert f"{device}: {source} ({quality})" in row["energy_sources"]
    for text in forms(report):
        assert "NVML energy counter" in text
        assert "CodeCarbon" in text


def test_a_run_that_a_process_has_in_hand_is_running(tmp_path: Path) -> None:
    recorded = record_run(tmp_path / "it")
    stop_before(tmp_path / "it", recorded, 20)
    lock = FolderLock(tmp_path / "it")
    try:
        assert build_report([tmp_path]).runs[0].state.startswith("running: step 20 of 40")
    finally:
        lock.release()
    assert build_report([tmp_path]).runs[0].state.startswith("unfinished: step 20 of 40")


def test_work_done_again_counts_once(tmp_path: Path) -> None:
    recorded = record_run(tmp_path / "it")
    first = [event for event in recorded if event["step"] <= 3 * STEPS and event["kind"] != "end"]
    start = recorded[0] | {"step": STEPS, "attempt": 2, "resumed_from": "checkpoints/step-000000010"}
    again = [dict(event) for event in recorded[1:] if event["step"] > STEPS]
    for event in again:
        if "energy/total_j" in event:
            event["energy/total_j"] += 1000.0
    write_events(tmp_path / "it", [*first, start, *again])
    (run,) = build_report([tmp_path]).runs
    assert [epoch.epoch for epoch in run.history.epochs] == [1, 2, 3, 4]
    assert run.history.attempts == 2
    assert [epoch.energy_j is not None and epoch.energy_j > 1000 for epoch in run.history.epochs] == [False] + [
        True
    ] * 3
    assert sum(change.unit == "stages.1.2" for change in run.history.changes) == 1


@pytest.mark.parametrize("kept", [{"run", "model", "data", "gated"}, set()])
def test_events_of_an_older_version_leave_unknown_what_they_do_not_tell(tmp_path: Path, kept: set[str]) -> None:
    recorded = record_run(tmp_path / "old")
    first = {key: value for key, value in recorded[0].items() if key in kept | {"time", "step", "kind"}}
    bare = [
        {"time": e["time"], "step": e["step"], "kind": "epoch", "epoch": e["epoch"]}
        for e in recorded
        if e["kind"] == "epoch"
    ]
    for name in ("summary.json", "config.yaml", "provenance.jsonl"):
        (tmp_path / "old" / name).unlink()
    write_events(tmp_path / "old", [first, *bare])
    report = build_report([tmp_path])
    assert report.runs[0].state.startswith("unfinished: step 40; last event")
    for text in forms(report):
        assert "unknown" in text
    main(["compare", str(tmp_path / "old")])


def test_unknown_energy_is_said_and_not_drawn(tmp_path: Path) -> None:
    recorded = record_run(tmp_path / "it")
    for event in recorded:
        event.update({key: None for key in ("energy/total_j", "energy/power_w", "energy/epoch_j") if key in event})
    recorded[0]["energy_sources"] = [["gpu", None, None]]
    nothing = {"energy_j": None, "energy_quality": None, "energy_by_phase_j": {}, "energy_by_device_j": {}}
    recorded[-1]["summary"].update(nothing)
    write_events(tmp_path / "it", recorded)
    (tmp_path / "it" / "summary.json").write_text(json.dumps(recorded[-1]["summary"]))
    report = build_report([tmp_path])
    assert report.tasks[0].front is None
    text, _ = forms(report)
    assert "No front is drawn: no finished run has both an accuracy and joules" in text or "Nothing to draw" in text
    assert "nothing could be read" in text
    assert " 0 J" not in text


def test_no_twin_is_said(tmp_path: Path) -> None:
    record_run(tmp_path / "alone")
    for text in forms(build_report([tmp_path])):
        assert "alone has no dense twin here" in text


def test_other_data_sets_are_drawn_apart(tmp_path: Path) -> None:
    record_run(tmp_path / "one", gated=False)
    record_run(tmp_path / "two", gated=False, data="cifar10")
    report = build_report([tmp_path])
    assert [task.data for task in report.tasks] == ["cifar10", "digits"]
    figures = embedded(render_page(report, "1"), "figures")
    for number, name in enumerate(("two", "one")):
        runs = {trace["meta"]["run"] for trace in figures[f"t{number}-joules"]["data"] if "run" in trace["meta"]}
        assert runs == {name}
    assert "cifar10: dense" in report.differences["data.name"]


def test_runs_with_other_threads_are_told_apart(tmp_path: Path) -> None:
    for name, threads in (("one", 1), ("two", 2)):
        record_run(tmp_path / name)
        (tmp_path / name / "provenance.jsonl").write_text(json.dumps({"cpu": "a CPU", "threads": threads}) + "\n")
    report = build_report([tmp_path])
    assert [group.label.rpartition(" (")[2] for group in report.groups] == [
        "hardware a CPU, threads 1)",
        "hardware a CPU, threads 2)",
    ]
    assert [*report.differences["hardware"].values()] == [("a CPU, threads 1",), ("a CPU, threads 2",)]
    assert report.tasks[0].front is None


def test_runs_metered_in_other_ways_have_no_common_front(tmp_path: Path) -> None:
    record_run(tmp_path / "one", gated=False)
    record_run(tmp_path / "two")
    (tmp_path / "two" / "provenance.jsonl").write_text('{"cpu": "another CPU", "gpus": []}\n')
    (task,) = build_report([tmp_path]).tasks
    assert task.front is None
    assert "not all metered alike" in task.front_reason


def test_compiled_runs_are_neither_averaged_nor_drawn_with_the_rest(tmp_path: Path) -> None:
    for seed, compiled in ((0, False), (1, True)):
        record_run(tmp_path / f"run-{seed}", seed=seed)
        (tmp_path / f"run-{seed}" / "config.yaml").write_text(json.dumps(config(seed, model__compile=compiled)))
    (task,) = build_report([tmp_path]).tasks
    assert [group.label.rpartition(" (")[2] for group in task.groups] == ["compile False)", "compile True)"]
    assert "executed alike" in task.front_reason


def test_runs_on_two_folders_of_images_are_neither_averaged_nor_drawn_together(tmp_path: Path) -> None:
    for seed, root in enumerate(("/images/cats", "/images/dogs", "/images/dogs")):
        record_run(tmp_path / f"run-{seed}", seed=seed, data="image_folder")
        values = config(seed, data__name="image_folder", data__root=root)
        (tmp_path / f"run-{seed}" / "config.yaml").write_text(json.dumps(values))
    tasks = build_report([tmp_path]).tasks
    assert [(task.data, [len(group.runs) for group in task.groups]) for task in tasks] == [
        ("image_folder /images/cats", [1]),
        ("image_folder /images/dogs", [2]),
    ]


def record_on_images(folder: Path, seed: int, root: str | None, digest: str | None) -> None:
    record_run(folder, seed=seed, data="image_folder")
    values = config(seed, data__name="image_folder", data__root=root)
    (folder / "config.yaml").write_text(json.dumps(values))
    change_summary(folder, data_digest=digest)


def test_runs_on_copies_of_one_folder_of_images_are_seeds_of_one_group(tmp_path: Path) -> None:
    """As of jobs that each stage it to a disk of their own; one of an older version tells the folder alone."""
    stages = (("/job-1/cats", "c"), ("/job-2/cats", "c"), (None, "c"), ("/job-1/cats", None), ("/job-4/dogs", "d"))
    for seed, (root, digest) in enumerate(stages):
        record_on_images(tmp_path / f"run-{seed}", seed, root, digest)
    tasks = build_report([tmp_path]).tasks
    assert [(task.data, [len(group.runs) for group in task.groups]) for task in tasks] == [
        ("image_folder /job-1/cats", [4]),
        ("image_folder /job-4/dogs", [1]),
    ]


def test_one_folder_that_held_other_images_before_is_two_data_sets(tmp_path: Path) -> None:
    for seed, digest in enumerate(("c", "d", None)):
        record_on_images(tmp_path / f"run-{seed}", seed, "/images", digest)
    report = build_report([tmp_path])
    assert [(task.data, len(task.groups[0].runs)) for task in report.tasks] == [
        ("image_folder /images", 1),  # of an older version: either may be meant
        ("image_folder /images, files c", 1),
        ("image_folder /images, files d", 1),
    ]
    assert len(report.groups) == 3


def change_summary(folder: Path, **changes: Any) -> None:
    path = folder / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_joules_of_other_parts_are_neither_averaged_nor_drawn_with_the_rest(tmp_path: Path) -> None:
    record_four(tmp_path)
    change_summary(tmp_path / "gated-1", energy_by_device_j={"dram (estimate: CodeCarbon: constant 20 W)": 10.0})
    (task,) = build_report([tmp_path]).tasks
    assert [len(group.runs) for group in task.groups] == [2, 1, 1]
    assert "joules of dram (estimate: CodeCarbon: constant 20 W)" in task.groups[-1].label
    assert "not all metered alike" in task.front_reason


def test_joules_that_are_a_lower_bound_are_in_no_mean_and_no_ratio(tmp_path: Path) -> None:
    record_four(tmp_path)
    change_summary(tmp_path / "gated-1", energy_complete=False)
    report = build_report([tmp_path])
    gated = report.groups[1]
    spreads = (gated.spreads["accuracy"], gated.spreads["energy_j"], gated.against_twins["energy_j"])
    assert [spread.n if spread else 0 for spread in spreads] == [2, 1, 1]
    assert gated.spreads["energy_j"] is not None
    for part in ("phase", "device"):
        assert sum(part_means(report.tasks[0], part)[1].values()) == pytest.approx(gated.spreads["energy_j"].mean)
    for text in forms(report):
        assert "at least" in text
        assert "so in no mean and no ratio: gated-1." in text


def test_joules_so_far_of_a_run_that_was_killed_before_are_told_as_a_lower_bound(tmp_path: Path) -> None:
    """Killed in its third epoch, it goes on from the second: what the first attempt took last is on no record."""
    events = record_four(tmp_path)["gated-1"]
    folder = tmp_path / "gated-1"
    stop_before(folder, events, 3 * STEPS)
    begun = [event for event in events if event["step"] <= 3 * STEPS]
    assert compare_runs([folder]).runs[0].energy_is_complete
    for last, is_complete in (("interrupt", True), ("train", False)):
        ending = {"time": events[0]["time"], "step": 3 * STEPS, "kind": last}
        write_events(folder, [*begun, ending, events[0] | {"step": 2 * STEPS, "attempt": 2}])
        (run,) = compare_runs([folder]).runs
        assert run.energy_is_complete == is_complete
    counted = events[0] | {"step": 2 * STEPS, "attempt": 2, "energy_sources": [["cpu", "RAPL counter", "counter"]]}
    write_events(folder, [*begun, ending, counted])
    assert compare_runs([folder]).runs[0].summary["energy_quality"] == "estimate"  # as of the first attempt's memory
    unread = events[0] | {"energy_sources": [["GPU-1", "none", None]]}
    write_events(folder, [unread, *begun[1:]])
    assert not compare_runs([folder]).runs[0].energy_is_complete


def test_work_that_was_done_twice_is_in_no_mean_of_joules_and_seconds(tmp_path: Path) -> None:
    record_four(tmp_path)
    change_summary(tmp_path / "gated-1", attempts=2, energy_lost_j=9.0, time_s=100.0)
    report = build_report([tmp_path])
    gated = report.groups[1]
    spreads = [gated.spreads[key] for key in ("accuracy", "step_time_s", "energy_j", "time_s")]
    spreads += [gated.against_twins["time_s"], gated.against_twins["step_time_s"]]
    assert [spread.n if spread else 0 for spread in spreads] == [2, 2, 1, 1, 1, 2]
    for text in forms(report):
        assert "so in no mean and no ratio of joules, CO2e and time: gated-1." in text


def test_seconds_of_a_run_with_a_device_that_was_never_read_are_in_the_mean(tmp_path: Path) -> None:
    """It was stopped in good order and went on: nothing was done twice."""
    recorded = record_four(tmp_path)["gated-1"]
    stop = {"time": recorded[0]["time"], "step": 2 * STEPS, "kind": "interrupt"}
    again = recorded[0] | {"step": 2 * STEPS, "attempt": 2}
    last = [event for event in recorded if event["step"] > 2 * STEPS]
    write_events(tmp_path / "gated-1", [event for event in recorded if event not in last] + [stop, again, *last])
    change_summary(tmp_path / "gated-1", attempts=2, energy_complete=False, energy_by_device_j={"GPU-1": None})
    report = build_report([tmp_path])
    counted = [run.counts("time_s") for run in report.runs if run.name == "gated-1"]
    assert counted == [True]
    assert not any("done again" in note for note in report.notes)


@pytest.mark.parametrize(("g_per_kwh", "mean"), [(369.0, 1.5), (56.0, None)])
def test_co2_of_other_grids_is_not_averaged(tmp_path: Path, g_per_kwh: float, mean: float | None) -> None:
    record_four(tmp_path)
    change_summary(tmp_path / "gated-0", co2_g=1.0, carbon_intensity_g_per_kwh=369.0, pue=1.0)
    change_summary(tmp_path / "gated-1", co2_g=2.0, carbon_intensity_g_per_kwh=g_per_kwh, pue=1.0)
    report = build_report([tmp_path])
    gated = report.groups[1]
    assert len(gated.runs) == 2
    assert gated.spreads["energy_j"] is not None
    assert gated.spreads["energy_j"].n == 2
    assert (gated.spreads["co2_g"] and gated.spreads["co2_g"].mean) == mean
    for text in forms(report):
        assert ("so there is no mean of it:" in text) == (mean is None)


H100 = "NVIDIA H100 (counter: NVML energy counter)"
LOAD = "cpu (estimate: CodeCarbon: load of 280 W (EPYC))"


def record_on_devices(folder: Path, devices: list[dict[str, float]], **changes: Any) -> Report:
    """Runs of one group each, with their joules by device."""
    for number, by_device in enumerate(devices):
        recorded = record_run(folder / f"run-{number:03}", epochs=1)
        recorded[-1]["summary"]["energy_by_device_j"] = by_device
        write_events(folder / f"run-{number:03}", recorded)
        change_summary(folder / f"run-{number:03}", energy_by_device_j=by_device)
        values = config(0, optim__lr=0.01 * (number + 1)) | changes
        (folder / f"run-{number:03}" / "config.yaml").write_text(json.dumps(values))
    return build_report([folder])


def bars(report: Report) -> list[dict[str, Any]]:
    drawn: list[dict[str, Any]] = embedded(render_page(report, "1"), "figures")["t0-device"]["data"]
    return drawn


def test_joules_of_many_devices_are_told_by_kind_and_model(tmp_path: Path) -> None:
    """Each run on a GPU of its own, of which a bar for each would be mostly nothing."""
    report = record_on_devices(tmp_path, [{f"GPU-{n:04x}-ab {H100}": 8.0 + n, LOAD: 2.0} for n in range(20)])
    drawn = bars(report)
    assert len(drawn) == 2 * 20
    assert {trace["legendgroup"] for trace in drawn} == {f"GPU {H100}", LOAD}
    assert sorted(trace["x"][0] for trace in drawn if trace["legendgroup"] != LOAD) == [8.0 + n for n in range(20)]
    shown = [trace["legendgroup"] for trace in drawn if trace["showlegend"]]
    assert sorted(shown) == sorted({f"GPU {H100}", LOAD})
    seen = text_of(render_page(report, "1"))
    assert f"GPU {H100} 8.00 J 9.00 J" in seen  # the table of the figure, a group a column


def test_of_many_devices_of_one_run_the_joules_add_up(tmp_path: Path) -> None:
    devices = {f"node-{n // 4}: GPU-{n:04x} {H100}": 1.0 for n in range(8)}
    devices |= {f"node-{n}: cpu:package-{p} (counter: RAPL counter)": 3.0 for n in range(2) for p in range(2)}
    devices |= {f"node-{n}: dram:package-0 (counter: RAPL counter)": 0.5 for n in range(2)}
    drawn = bars(record_on_devices(tmp_path, [devices]))
    assert {trace["legendgroup"]: trace["x"] for trace in drawn} == {
        f"GPU {H100}": [8.0],
        "cpu (counter: RAPL counter)": [12.0],
        "dram (counter: RAPL counter)": [1.0],
    }


def test_a_few_devices_are_told_one_by_one_and_nothing_is_drawn_where_a_group_has_none(tmp_path: Path) -> None:
    drawn = bars(record_on_devices(tmp_path, [{f"GPU-{n} {H100}": 8.0, LOAD: 2.0} for n in range(3)]))
    assert len(drawn) == 2 * 3
    assert all(trace["x"] != [None] for trace in drawn)
    assert {trace["legendgroup"] for trace in drawn} == {LOAD, *(f"GPU-{n} {H100}" for n in range(3))}
    assert sum(trace["showlegend"] for trace in drawn) == 4


def test_no_note_says_that_co2e_is_unknown_where_an_intensity_is_given(tmp_path: Path) -> None:
    events = record_run(tmp_path / "run")
    events[0]["notes"] += [CO2_IS_UNKNOWN]
    (tmp_path / "run" / "events.jsonl").write_text("".join(f"{json.dumps(event)}\n" for event in events))
    assert CO2_IS_UNKNOWN in build_report([tmp_path]).notes
    notes = build_report([tmp_path], carbon=CarbonIntensity(50.0, "given", None, None)).notes
    assert "a note of the meter" in notes
    assert not any("CO2 is unknown" in note for note in notes)


def test_a_figure_of_another_kind_spoils_no_other_run(tmp_path: Path) -> None:
    """As of a summary that was edited by hand: its run is named, and all others are told."""
    record_run(tmp_path / "good", gated=False)
    record_run(tmp_path / "bad")
    path = tmp_path / "bad" / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"energy_j": "12 J"}))
    report = build_report([tmp_path])
    page, _ = forms(report)
    assert "energy_j '12 J' is no number" in page
    assert next(run for run in report.runs if run.name == "good").is_finished


@pytest.mark.parametrize("damage", ["events.jsonl", "summary.json", "config.yaml", "provenance.jsonl"])
def test_a_file_that_cannot_be_read_spoils_no_other_run(tmp_path: Path, damage: str) -> None:
    record_run(tmp_path / "good", gated=False)
    record_run(tmp_path / "bad")
    (tmp_path / "bad" / damage).write_text("{nonsense: [\n")
    report = build_report([tmp_path])
    assert {run.name for run in report.runs} == {"good", "bad"}
    page, _ = forms(report)
    assert ("cannot be read" in page) == (damage in ("events.jsonl", "summary.json"))
    good = next(run for run in report.runs if run.name == "good")
    assert good.is_finished


def test_a_damaged_line_of_a_finished_run_leaves_its_summary_in_the_means(tmp_path: Path) -> None:
    recorded = record_four(tmp_path)
    epoch_1 = next(n for n, event in enumerate(recorded["gated-1"], start=1) if event["kind"] == "epoch")
    damage_line(tmp_path / "gated-1", epoch_1)
    report = build_report([tmp_path])
    gated = report.groups[1]
    spreads = (gated.spreads["energy_j"], gated.against_twins["energy_j"])
    assert [spread.n if spread else 0 for spread in spreads] == [2, 2]
    run = next(run for run in report.runs if run.name == "gated-1")
    assert [epoch.epoch for epoch in run.history.epochs] == [2, 3, 4]
    for text in forms(report):
        assert f"events.jsonl of gated-1 cannot be read in whole (line {epoch_1} is no event: " in text


def test_without_its_events_a_finished_run_is_metered_by_what_its_summary_tells(tmp_path: Path) -> None:
    record_run(tmp_path / "it")
    (tmp_path / "it" / "events.jsonl").unlink()
    report = build_report([tmp_path])
    devices = report.runs[0].compared.summary["energy_by_device_j"]
    text = render_markdown(report)
    assert devices
    assert "nothing was metered" not in text
    for device, source, quality in report.runs[0].energy_sources:
        assert f"{device} ({quality}: {source})" in devices
        assert f"{device}: {source}" in text
    assert len(report.runs[0].energy_sources) == len(devices)
    change_summary(tmp_path / "it", energy_by_device_j={})
    assert "| energy | unknown | unknown |" in render_markdown(build_report([tmp_path]))


def test_a_run_that_only_has_a_config_is_shown(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "config.yaml").write_text(json.dumps(config(0)))
    for text in forms(build_report([tmp_path])):
        assert "nothing is recorded yet" in text


def test_names_that_look_like_markup_are_only_text(tmp_path: Path) -> None:
    record_run(tmp_path / "<img src=x onerror=alert(1)>", gated=False)
    page = render_page(build_report([tmp_path]), "1")
    assert "<img src=x" not in page
    assert "<img src=x onerror=alert(1)>" in text_of(page)


def test_in_figures_names_and_reasons_that_look_like_markup_are_only_text(tmp_path: Path) -> None:
    """Plotly makes links of <a>, leaves out tags that it does not know, and puts values in for %{x}."""
    name, why = "<a href='x'>%{x}<b>", "expected <class 'int'>"
    recorded = record_run(tmp_path / name, gated=False)
    stop_before(tmp_path / name, recorded, 40)
    with (tmp_path / name / "events.jsonl").open("a") as file:
        file.write(json.dumps({"time": 1e9, "step": 40, "kind": "failure", "error": why}) + "\n")
    report = build_report([tmp_path])
    mark = accuracy_against_joules(report.tasks[0], group_styles(report)).data[0]
    assert not re.search("<a|<class|%{", mark.hovertemplate)
    assert all(part in html.unescape(mark.hovertemplate) for part in (name, why))


def test_what_looks_like_markup_is_only_text_in_every_line_of_markdown(tmp_path: Path) -> None:
    for seed in (0, 1):
        record_on_images(tmp_path / f"run-{seed}", seed, f"/images/<img src=x>|{seed}", None)
    text = render_markdown(build_report([tmp_path]))
    assert "&lt;img src=x>" in text
    assert "<img" not in text


@pytest.mark.parametrize(
    "event",
    [
        {"kind": "removal"},
        {"kind": "freeze", "unit": None},
        {"kind": "end", "summary": None},
        {"kind": "epoch"},
    ],
)
def test_an_event_that_lacks_what_it_is_about_spoils_no_report(tmp_path: Path, event: dict[str, Any]) -> None:
    recorded = record_run(tmp_path / "it")
    damage_line(tmp_path / "it", 3, json.dumps({"time": 1e9, "step": recorded[2]["step"], **event}).encode())
    report = build_report([tmp_path])
    assert report.runs[0].is_finished
    for text in forms(report):
        assert "line 3 is no event: its" in text or event["kind"] == "epoch"


# The command.


def test_the_form_follows_the_file_or_the_flag(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record_run(tmp_path / "runs" / "it")
    runs = str(tmp_path / "runs")
    assert main(["report", runs, "-o", str(tmp_path / "r.md")]) == 0
    assert (tmp_path / "r.md").read_text().startswith("# Runs compared")
    assert main(["report", runs, "-o", str(tmp_path / "r.dat"), "--format", "csv"]) == 0
    assert (tmp_path / "r.dat").read_text().startswith("run,path,group,state")
    capsys.readouterr()
    assert main(["report", runs, "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["runs"][0]["name"] == "it"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nowhere"], "RUN: 'nowhere' does not exist"),
        (["{runs}", "-o", "r.pdf"], "-o: 'r.pdf' has no known ending; expected html, md, csv, json, png"),
        (["{runs}", "-o", "no/folder/r.md"], "-o: cannot write 'no/folder/r.md'"),
    ],
)
def test_a_wrong_command_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], args: list[str], message: str
) -> None:
    record_run(tmp_path / "it")
    assert main(["report", *(arg.format(runs=tmp_path) for arg in args)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_report_that_does_not_fit_leaves_the_earlier_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], files_of_at_most: Any
) -> None:
    record_run(tmp_path / "runs" / "it")
    output = tmp_path / "out" / "report.md"
    output.parent.mkdir()
    output.write_text("the earlier report")
    with files_of_at_most(100):
        assert main(["report", str(tmp_path / "runs"), "-o", str(output)]) == 2
        with pytest.raises(OSError, match="File too large"):
            write_run_report(RunFolder(tmp_path / "runs" / "it"), output.parent)
    assert capsys.readouterr().err == (
        f"greenprune: error: -o: cannot write {str(output)!r} (File too large); expected a file in a folder\n"
    )
    assert output.read_text() == "the earlier report"
    assert os.listdir(output.parent) == ["report.md"]


def test_the_size_of_a_small_report_is_not_told_as_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record_run(tmp_path / "it")
    output = tmp_path / "it.md"
    assert main(["report", str(tmp_path / "it"), "-o", str(output)]) == 0
    assert capsys.readouterr().out == f"{output} is written: {format_si(output.stat().st_size, 'B')}\n"


def test_a_report_goes_to_what_is_no_file(tmp_path: Path) -> None:
    record_run(tmp_path / "it")
    command = [sys.executable, "-m", "greenprune.cli", "report", str(tmp_path / "it"), "--format", "md", "-o"]
    piped = subprocess.run([*command, "/dev/stdout"], check=True, capture_output=True, text=True)
    assert piped.stdout.startswith("# ")
    assert piped.stdout.endswith("/dev/stdout is written\n")
    subprocess.run([*command, "/dev/null"], check=True)
    assert Path("/dev/null").is_char_device()


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record_run(tmp_path / "it")
    monkeypatch.delitem(sys.modules, "greenprune.report.page", raising=False)
    monkeypatch.delitem(sys.modules, "greenprune.report.figures", raising=False)
    monkeypatch.setitem(sys.modules, "plotly", None)
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    with pytest.raises(UserError, match=r"pip install 'greenprune\[report\]'"):
        write_report([tmp_path / "it"], tmp_path / "r.html", None)
    assert write_report([tmp_path / "it"], tmp_path / "r.md", None) == tmp_path / "r.md"


def processor_seconds(command: list[str]) -> tuple[float, str]:
    """What a command takes of the processor, the least of three, and what it prints: the machine may be busy."""
    seconds = []
    for _ in range(3):
        before = os.times()
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        after = os.times()
        seconds.append(after.children_user + after.children_system - before.children_user - before.children_system)
    return min(seconds), done.stdout


def test_twenty_runs_of_two_hundred_epochs_are_quick_and_light(tmp_path: Path) -> None:
    for seed in range(10):
        record_run(tmp_path / f"dense-{seed}", seed=seed, gated=False, epochs=200, blocks=27)
        record_run(tmp_path / f"gated-{seed}", seed=seed, epochs=200, blocks=27)
    output = tmp_path / "report.html"
    command = [sys.executable, "-m", "greenprune.cli", "report", str(tmp_path), "-o", str(output)]
    seconds, _ = processor_seconds(command)
    assert seconds <= 2  # of the five that people are promised
    assert output.stat().st_size <= 6e6


def test_compare_is_quick_and_needs_no_torch_and_no_plotting(tmp_path: Path) -> None:
    record_four(tmp_path)
    code = (
        "import sys; from greenprune.cli import main; "
        f"code = main(['compare', {str(tmp_path)!r}]); "
        "print([name for name in ('torch', 'plotly', 'numpy', 'wandb') if name in sys.modules]); sys.exit(code)"
    )
    seconds, told = processor_seconds([sys.executable, "-c", code])
    assert seconds <= 0.6
    assert told.splitlines()[-1] == "[]"
