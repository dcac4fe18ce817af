"""The result of one run as a short table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from greenprune.energy import format_intensity
from greenprune.formatting import (
    UNKNOWN,
    cost_name,
    format_joules,
    format_number,
    format_percent,
    format_removed,
    format_seconds,
    format_share,
    format_si,
    open_console,
)


def print_summary(summary: dict[str, Any], path: Path) -> None:
    """Print a run's result to standard output, without colours where that is not a terminal.

    Args:
        summary: Content of summary.json.
        path: The run's folder.
    """
    console = open_console()
    console.print(summary_table(summary))
    console.print(Text(f"The run's files are in {path}"), soft_wrap=True)  # a path that wraps cannot be copied


def summary_table(summary: dict[str, Any]) -> Table:
    """A run's result, one line for each thing that was gained or spent."""
    table = Table(
        title=Text(
            f"{summary['run']}: {summary['model']} on {summary['data']}, {format_number(summary['epochs'], 'epoch')}"
        ),
        title_justify="left",
        show_header=False,
        box=None,
        padding=(0, 2, 0, 0),
    )
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for name, value in _rows(summary):
        table.add_row(name, Text(value))
    return table


def _rows(summary: dict[str, Any]) -> list[tuple[str, str]]:
    accuracy = format_percent(summary["accuracy"], 2)
    return [
        ("accuracy", f"{accuracy} on the {summary['accuracy_kind']} set"),
        *_structure_rows(summary),
        ("parameters", _against_dense(summary["params"], summary["params_dense"], "")),
        (
            "inference",
            _against_dense(summary["flops_forward"], summary["flops_forward_dense"], "FLOPs")
            + ", for one image (a multiply-add counts as 2)",
        ),
        ("training", _training(summary)),
        *_energy_rows(summary),
        ("CO2e", _co2(summary)),
        ("time", _time(summary)),
        ("a step", _step_time(summary["step_time_s"])),
    ]


def _structure_rows(summary: dict[str, Any]) -> list[tuple[str, str]]:
    if not summary["gated"] and not summary.get("structure_given"):
        return [("removed", "nothing: a dense run")]
    removals = summary["removals"]
    when: dict[str, list[dict[str, Any]]] = {}
    for removal in removals:
        when.setdefault(f"epoch {removal['epoch']:.3g}, {removal['reason']}", []).append(removal)
    units = "; ".join(f"{format_removed(those)} ({key})" for key, those in when.items())
    removed = f"{summary['blocks_dense'] - summary['blocks']} of {summary['blocks_dense']} blocks"
    if summary.get("channels_dense") and summary.get("channels") is not None:
        gone = summary["channels_dense"] - summary["channels"]
        removed += f", {gone:,} of {summary['channels_dense']:,} channels inside blocks"
    removed += f": {units}" if units else ""
    cost = cost_name(summary["budget_unit"])
    kept = f"{format_percent(summary['kept_cost'], 1)} of the dense {cost}"
    if not summary["gated"]:
        return [("removed", removed), ("kept", f"{kept}, given before training")]
    gates = f"; {summary['gates_left']} gates are left" if summary["gates_left"] else ""
    target = format_percent(summary["budget_target"], 1)
    return [("removed", removed), ("kept", f"{kept}, for a budget of {target}{gates}")]


def _against_dense(now: float | None, dense: float | None, unit: str) -> str:
    if now == dense:
        return format_si(now, unit)
    return f"{format_si(now, unit)}, dense {format_si(dense, unit)} ({format_share(now, dense)})"


def _training(summary: dict[str, Any]) -> str:
    flops, dense = summary["flops_train"], summary["flops_train_dense"]
    if flops is None or not dense or flops == dense:
        return format_si(flops, "FLOPs")
    share = 1 - flops / dense
    saved = f"{format_percent(abs(share), 1)} {'saved' if share >= 0 else 'more'}"
    return f"{format_si(flops, 'FLOPs')}, the dense twin's {format_si(dense, 'FLOPs')} ({saved})"


def _energy_rows(summary: dict[str, Any]) -> list[tuple[str, str]]:
    energy_j, by_device = summary["energy_j"], summary["energy_by_device_j"]
    if energy_j is None:
        return [("energy", f"{UNKNOWN}: nothing could be read (greenprune doctor says why)")]
    least = "at least " if None in by_device.values() or not summary.get("energy_complete", True) else ""
    bound = f" ± {format_joules(summary['energy_bound_j'])}" if summary.get("energy_bound_j") is not None else ""
    rows = [("energy", f"{least}{format_joules(energy_j)}{bound} ({summary['energy_quality'] or 'quality unknown'})")]
    if summary["energy_lost_j"]:
        lost = format_joules(summary["energy_lost_j"])
        rows.append(("", f"{lost} of it for work that was lost and done again"))
    if summary.get("energy_per_sample_j") is not None:
        each = f"{format_si(summary['energy_per_sample_j'], 'J')} an image trained on"
        rows.append(("", f"{each}, {format_joules(summary.get('energy_per_epoch_j'))} an epoch"))
    attempts = summary.get("energy_by_attempt") or []
    if len(attempts) > 1:
        rows.append(("  by attempt", ", ".join(map(_attempt, attempts))))
    if summary.get("energy_slurm_j") is not None:
        rows.append(("  by Slurm", f"{format_joules(summary['energy_slurm_j'])} for the job, on whole nodes"))
    phases = sorted(summary["energy_by_phase_j"].items(), key=lambda item: -(item[1] or 0))
    rows.append(("  by phase", ", ".join(f"{name} {format_joules(joules)}" for name, joules in phases)))
    rows += [
        ("  by device" if index == 0 else "", f"{format_joules(joules)}, {device}")
        for index, (device, joules) in enumerate(by_device.items())
    ]
    missing = (summary.get("energy_missing") or {}).items()
    rows += [("" if index else "  missing", f"{device}: {why}") for index, (device, why) in enumerate(missing)]
    return rows


def _attempt(attempt: dict[str, Any]) -> str:
    lost = f" ({format_joules(attempt['lost_j'])} done again)" if attempt["lost_j"] else ""
    return f"{attempt['attempt']}: {format_joules(attempt['energy_j'])}{lost}"


def _co2(summary: dict[str, Any]) -> str:
    intensity = summary["carbon_intensity_g_per_kwh"]
    if summary["co2_g"] is not None:
        pue = f" and a PUE of {summary['pue']:g}" if (summary.get("pue") or 1.0) != 1 else ""
        at = "an intensity that is not told" if intensity is None else format_intensity(intensity)
        return f"{format_si(summary['co2_g'], 'g')}, at {at}{pue}"
    if intensity is None:
        return f"{UNKNOWN}: set energy.country, or afterwards: greenprune report --country"
    return f"{UNKNOWN}, as the energy is"


def _time(summary: dict[str, Any]) -> str:
    attempts = "" if summary["attempts"] == 1 else f" in {summary['attempts']} attempts"
    processes = "1 process" if summary["world_size"] == 1 else f"{summary['world_size']} processes"
    return f"{format_seconds(summary['time_s'])}{attempts}, {summary['samples']:,} images, {processes}"


def _step_time(step_time_s: dict[str, float | None]) -> str:
    before, after = step_time_s.get("before"), step_time_s.get("after")
    if before is None or after is None:
        return format_seconds(before if after is None else after)
    ratio = f"{after / before:.2f}x"
    return f"{format_seconds(before)} before the first removal, {format_seconds(after)} after the last ({ratio})"
