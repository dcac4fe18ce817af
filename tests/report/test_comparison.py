"""Runs side by side."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parent))
from recording import damage_line

from greenprune.config import Config, DataConfig, GateConfig, ModelConfig, OptimConfig, UserError, dump_config
from greenprune.energy import CarbonIntensity
from greenprune.report import Comparison, compare_runs

DENSE: dict[str, Any] = {
    "model": "resnet38",
    "data": "digits",
    "seed": 0,
    "epochs": 6,
    "batch_size": 64,
    "precision": "no",
    "device": "cpu",
    "world_size": 1,
    "gated": False,
    "accuracy": 0.98,
    "accuracy_kind": "test",
    "params": 1000,
    "flops_forward": 2000,
    "flops_train": 8000,
    "energy_j": 200.0,
    "energy_quality": "counter",
    "co2_g": None,
    "time_s": 10.0,
    "step_time_s": {"before": 0.04, "after": None},
    "blocks": 18,
    "blocks_dense": 18,
}
GATED = DENSE | {
    "gated": True,
    "accuracy": 0.97,
    "flops_forward": 1000,
    "flops_train": 6000,
    "energy_j": 130.0,
    "time_s": 8.0,
    "step_time_s": {"before": 0.05, "after": 0.02},
    "blocks": 9,
}


def write_run(folder: Path, summary: dict[str, Any], cpu: str = "a CPU") -> Path:
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "provenance.jsonl").write_text(json.dumps({"cpu": cpu, "gpus": []}) + "\n")
    return folder


def render(comparison: Comparison, width: int = 120) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(comparison)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_twin_agrees_in_all_that_shapes_it(tmp_path: Path) -> None:
    """Their summaries are alike, but the learning rates are not."""
    for lr in (0.1, 0.2):
        for name, summary in (("dense", DENSE), ("gated", GATED)):
            folder = write_run(tmp_path / f"{name}-{lr}", summary)
            config = Config(optim=OptimConfig(lr=lr), gate=GateConfig(enabled=summary["gated"]))
            (folder / "config.yaml").write_text(dump_config(config))
    assert {run.name: run.twin for run in compare_runs([tmp_path]).runs if run.summary["gated"]} == {
        "gated-0.1": "dense-0.1",
        "gated-0.2": "dense-0.2",
    }


def test_a_gated_run_is_set_against_its_dense_twin(tmp_path: Path) -> None:
    write_run(tmp_path / "dense", DENSE)
    write_run(tmp_path / "gated", GATED)
    dense, gated = compare_runs([tmp_path]).runs
    assert dense.twin is None
    assert gated.twin == "dense"
    assert gated.against_twin == pytest.approx(
        {
            "accuracy_points": -1.0,
            "params": 1.0,
            "flops_forward": 0.5,
            "flops_train": 0.75,
            "energy_j": 0.65,
            "co2_g": None,
            "time_s": 0.8,
            "step_time_s": 0.5,  # after the last removal, against the twin's only figure
        }
    )


def test_the_table_shows_figures_ratios_and_the_meter(tmp_path: Path) -> None:
    text = render(compare_runs([write_run(tmp_path / "dense", DENSE), write_run(tmp_path / "gated", GATED)]))
    for fact in ("98.00 %", "-1.00 pts", "0.50x", "0.65x", "9/18", "130 J", "counter", "20.0 ms", "against dense"):
        assert fact in text
    assert "CO2e" not in text  # nobody knows it here
    assert "\x1b" not in text


def test_figures_are_whole_at_80_columns(tmp_path: Path) -> None:
    name = "digits-resnet38-block-0.5-seed0"
    paths = [write_run(tmp_path / f"{name}-dense", DENSE), write_run(tmp_path / name, GATED)]
    text = render(compare_runs(paths), width=80)
    for fact in ("97.00 %", "-1.00 pts", "130 J", "20.0 ms", "counter"):
        assert fact in text
    assert "…" not in text


@pytest.mark.parametrize("width", [30, 40, 80])
def test_figures_and_names_are_whole_at_any_width(tmp_path: Path, width: int) -> None:
    more = {"co2_g": 0.0123, "carbon_intensity_g_per_kwh": 56.0, "pue": 1.0, "channels": 1234, "channels_dense": 5678}
    for name, summary in (("dense-run-of-digits", DENSE), ("gated-run-of-digits", GATED)):
        write_run(tmp_path / name, summary | more)
    text = render(compare_runs([tmp_path]), width)
    facts = ["97.00 %", "-1.00 pts", "130 J", "20.0 ms", "counter", "1234/5678", "12.3 mg", "9/18", "0.65x"]
    for fact in [*facts, "gated-run-of-digits", "against"]:
        assert fact in text
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width


@pytest.mark.parametrize(
    ("key", "other"),
    [("model", "another"), ("data", "another"), ("seed", 99), ("epochs", 99), ("batch_size", 99), ("precision", "x")],
)
def test_a_dense_run_of_another_config_is_no_twin(tmp_path: Path, key: str, other: object) -> None:
    write_run(tmp_path / "dense", DENSE | {key: other})
    write_run(tmp_path / "gated", GATED)
    comparison = compare_runs([tmp_path])
    assert [run.twin for run in comparison.runs] == [None, None]
    assert "gated has no dense twin here" in comparison.notes[0]


def test_seconds_and_joules_of_other_hardware_are_not_compared(tmp_path: Path) -> None:
    write_run(tmp_path / "dense", DENSE, cpu="another CPU")
    write_run(tmp_path / "gated", GATED)
    comparison = compare_runs([tmp_path])
    against = comparison.runs[1].against_twin
    assert against is not None
    assert [against[key] for key in ("energy_j", "co2_g", "time_s", "step_time_s")] == [None] * 4
    assert against["flops_train"] == 0.75
    assert "different hardware" in comparison.notes[0]


@pytest.mark.parametrize(
    ("attempts", "alike"),
    [
        ([{}], True),
        ([{}, {}], True),  # stopped, and went on with the same
        ([{"gpus": ["A GPU that it did not use"]}], True),
        ([{"threads": 8}], False),
        ([{"cpu_cores_usable": 2}], False),
        ([{"processes": 2}, {"processes": 1}], False),
        ([{"cpu": "another CPU"}, {}], False),
        ([{"device": "cuda:0", "gpus": ["a GPU"]}, {}], False),
    ],
)
def test_the_same_hardware_is_what_every_attempt_used(
    tmp_path: Path, attempts: list[dict[str, Any]], alike: bool
) -> None:
    usual = {"cpu": "a CPU", "threads": 1, "cpu_cores_usable": 8, "gpus": [], "device": "cpu"}
    for name, summary, made in (("dense", DENSE, [{}]), ("gated", GATED, attempts)):
        folder = write_run(tmp_path / name, summary)
        lines = [json.dumps(usual | attempt) + "\n" for attempt in made]
        (folder / "provenance.jsonl").write_text("".join(lines))
    comparison = compare_runs([tmp_path])
    against = comparison.runs[1].against_twin
    assert against is not None
    assert [against[key] is not None for key in ("energy_j", "time_s", "step_time_s")] == [alike] * 3
    assert ["different hardware" in note for note in comparison.notes] == ([] if alike else [True])


@pytest.mark.parametrize(
    ("mine", "alike"),
    [
        ({}, True),
        ({"cpu": "another CPU"}, False),
        ({"cpus": ["a CPU", "a CPU"]}, False),  # of two machines
        ({"cpu_cores_usable": 2}, False),
        ({"threads": 2}, True),  # of the processor; the work is the GPU's
    ],
)
def test_on_a_gpu_the_processor_matters_too_because_its_joules_count(
    tmp_path: Path, mine: dict[str, Any], alike: bool
) -> None:
    usual = {"cpu": "a CPU", "cpu_cores_usable": 8, "threads": 8, "gpus": ["a GPU"], "device": "cuda:0"}
    for name, summary, made in (("dense", DENSE, usual), ("gated", GATED, usual | mine)):
        folder = write_run(tmp_path / name, summary | {"device": "cuda"})
        (folder / "provenance.jsonl").write_text(json.dumps(made) + "\n")
    comparison = compare_runs([tmp_path])
    assert comparison.runs[0].hardware == ("a GPU, a CPU, usable cores 8",)
    against = comparison.runs[1].against_twin
    assert against is not None
    assert [against[key] is not None for key in ("energy_j", "time_s", "flops_train")] == [alike, alike, True]
    assert ["different hardware" in note for note in comparison.notes] == ([] if alike else [True])


@pytest.mark.parametrize(
    ("mine", "alike"),
    [
        ({"gpus": ["an H100"], "device": "cuda:0", "machines": ["m"]}, True),
        ({"gpus": ["an H100"], "device": "cuda:0"}, True),  # masked, as an older version told it
        ({"gpus": ["an A100"], "device": "cuda:0", "machines": ["m"]}, False),
        ({"gpus": ["an H100"] * 2, "device": "cuda:0", "machines": ["m"], "processes": 2}, False),
    ],
)
def test_gpus_that_a_run_could_see_and_did_not_use_do_not_matter(
    tmp_path: Path, mine: dict[str, Any], alike: bool
) -> None:
    """The twin is of an older version, and had a node of eight to itself."""
    whole_node = {"cpu": "a CPU", "gpus": ["an H100"] * 8, "device": "cuda:0", "processes": 1}
    for name, summary, made in (("dense", DENSE, whole_node), ("gated", GATED, {"cpu": "a CPU"} | mine)):
        folder = write_run(tmp_path / name, summary | {"device": "cuda:0"})
        (folder / "provenance.jsonl").write_text(json.dumps(made) + "\n")
    comparison = compare_runs([tmp_path])
    against = comparison.runs[1].against_twin
    assert against is not None
    assert (against["energy_j"] is not None) == alike
    assert ["different hardware" in note for note in comparison.notes] == ([] if alike else [True])


def test_of_several_twins_the_one_on_the_same_hardware_counts(tmp_path: Path) -> None:
    write_run(tmp_path / "dense-1", DENSE, cpu="another CPU")
    write_run(tmp_path / "dense-2", DENSE)
    write_run(tmp_path / "gated", GATED)
    assert compare_runs([tmp_path]).runs[2].twin == "dense-2"


def write_configured(folder: Path, summary: dict[str, Any], **model: Any) -> None:
    write_run(folder, summary)
    config = Config(model=ModelConfig(**model), gate=GateConfig(enabled=summary["gated"]))
    (folder / "config.yaml").write_text(dump_config(config))


@pytest.mark.parametrize("model", [{"compile": True}, {"cuda_graph": False}])
def test_seconds_and_joules_of_steps_executed_otherwise_are_not_compared(tmp_path: Path, model: dict[str, Any]) -> None:
    write_configured(tmp_path / "dense", DENSE)
    write_configured(tmp_path / "gated", GATED, **model)
    comparison = compare_runs([tmp_path])
    against = comparison.runs[1].against_twin
    assert against is not None
    assert [against[key] for key in ("energy_j", "co2_g", "time_s", "step_time_s")] == [None] * 4
    assert against["flops_train"] == 0.75
    (key,) = model
    assert comparison.notes == (f"gated and dense differ in model.{key}: no ratios of joules, CO2e and seconds",)


def test_of_several_twins_the_one_executed_alike_counts(tmp_path: Path) -> None:
    write_configured(tmp_path / "dense-1", DENSE)
    write_configured(tmp_path / "dense-2", DENSE, compile=True)
    write_configured(tmp_path / "gated", GATED, compile=True)
    comparison = compare_runs([tmp_path])
    assert comparison.runs[2].twin == "dense-2"
    assert not comparison.notes


@pytest.mark.parametrize(
    ("name", "roots", "is_twin"),
    [
        ("image_folder", ("/images/cats", "/images/dogs"), False),
        ("image_folder", ("/images/cats", "/images/../images/cats/"), True),
        ("image_folder", ("/images/cats", None), True),  # perhaps the same, by the environment
        ("cifar10", ("/data", "/copy/of/data"), True),
    ],
)
def test_another_folder_of_images_is_another_data_set(
    tmp_path: Path, name: str, roots: tuple[str | None, str | None], is_twin: bool
) -> None:
    for summary, root in zip((DENSE, GATED), roots, strict=True):
        folder = write_run(tmp_path / ("gated" if summary["gated"] else "dense"), summary | {"data": name})
        config = Config(data=DataConfig(name=name, root=root), gate=GateConfig(enabled=summary["gated"]))
        (folder / "config.yaml").write_text(dump_config(config))
    assert compare_runs([tmp_path]).runs[1].twin == ("dense" if is_twin else None)


@pytest.mark.parametrize(("digests", "is_twin"), [(("a", "a"), True), (("a", "b"), False)])
def test_images_are_told_apart_by_what_they_are_rather_than_by_their_place(
    tmp_path: Path, digests: tuple[str, str], is_twin: bool
) -> None:
    for summary, digest, place in zip((DENSE, GATED), digests, ("/here", "/there"), strict=True):
        about = {"data": "image_folder", "data_digest": digest}
        folder = write_run(tmp_path / ("gated" if summary["gated"] else "dense"), summary | about)
        config = Config(
            data=DataConfig(name="image_folder", root=place if is_twin else "/one"),
            gate=GateConfig(enabled=summary["gated"]),
        )
        (folder / "config.yaml").write_text(dump_config(config))
    assert compare_runs([tmp_path]).runs[1].twin == ("dense" if is_twin else None)


def test_an_estimate_is_not_compared_with_a_counter(tmp_path: Path) -> None:
    write_run(tmp_path / "dense", DENSE | {"energy_quality": "estimate"})
    write_run(tmp_path / "gated", GATED)
    comparison = compare_runs([tmp_path])
    against = comparison.runs[1].against_twin
    assert against is not None
    assert against["energy_j"] is None
    assert against["time_s"] == pytest.approx(0.8)
    assert "not metered alike" in comparison.notes[0]


GPU, CPU = "GPU-1a NVIDIA H100 (counter: NVML energy counter)", "cpu (estimate: CodeCarbon: load of 280 W (EPYC))"


@pytest.mark.parametrize("without_joules", ["dense", "gated"])
def test_joules_that_are_a_lower_bound_are_not_compared(tmp_path: Path, without_joules: str) -> None:
    """NVML failed in one run, which has the estimate of the CPU alone."""
    whole = {"energy_j": 10_000.0, "energy_quality": "estimate", "energy_complete": True}
    whole["energy_by_device_j"] = {GPU: 9000.0, CPU: 1000.0}
    part = whole | {"energy_j": 900.0, "energy_complete": False, "energy_by_device_j": {"GPU-1a": None, CPU: 900.0}}
    for name, summary in (("dense", DENSE), ("gated", GATED)):
        write_run(tmp_path / name, summary | (part if name == without_joules else whole))
    comparison = compare_runs([tmp_path])
    against = comparison.runs[1].against_twin
    assert against is not None
    assert against["energy_j"] is None
    assert against["time_s"] == pytest.approx(0.8)
    assert comparison.notes == (f"some joules of {without_joules} could not be read: no ratios of joules and CO2e",)
    assert render(comparison).count("at least") == 1


@pytest.mark.parametrize(
    ("devices", "alike"),
    [
        ({GPU: 9.0, CPU: 1.0}, True),
        ({GPU.replace("1a", "2b"): 9.0, CPU: 1.0}, True),  # another GPU of the kind
        ({f"node-1: {GPU}": 9.0, f"cpu-2: {CPU}": 1.0}, True),
        ({CPU: 1.0}, False),
        ({"GPU-1a NVIDIA H100 (integrated power: NVML power samples)": 9.0, CPU: 1.0}, False),
        ({GPU: 9.0, CPU.replace("280", "8"): 1.0}, False),
        ({GPU: 9.0, CPU: 1.0, "dram (estimate: CodeCarbon: constant 20 W)": 1.0}, False),
    ],
)
def test_joules_of_other_parts_or_by_other_meters_are_not_compared(
    tmp_path: Path, devices: dict[str, float], alike: bool
) -> None:
    """The worst quality is the same in all of them."""
    write_run(tmp_path / "dense", DENSE | {"energy_by_device_j": {GPU: 90.0, CPU: 10.0}})
    write_run(tmp_path / "gated", GATED | {"energy_by_device_j": devices})
    comparison = compare_runs([tmp_path])
    against = comparison.runs[1].against_twin
    assert against is not None
    assert (against["energy_j"] is not None) == alike
    assert [("not metered alike" in note) for note in comparison.notes] == ([] if alike else [True])


@pytest.mark.parametrize(
    ("mine", "theirs", "alike"),
    [
        ((369.0, 1.0), (369.0, 1.0), True),
        ((369.0, None), (369.0, 1.0), True),  # as a version told it that knew no PUE
        ((56.0, 1.0), (369.0, 1.0), False),
        ((369.0, 1.5), (369.0, 1.0), False),
    ],
)
def test_co2_of_another_grid_or_site_is_not_compared(
    tmp_path: Path, mine: tuple[float, float | None], theirs: tuple[float, float | None], alike: bool
) -> None:
    """Joules are, and seconds."""
    for name, summary, (g_per_kwh, pue), co2_g in (("dense", DENSE, theirs, 2.0), ("gated", GATED, mine, 1.0)):
        about = {"co2_g": co2_g, "carbon_intensity_g_per_kwh": g_per_kwh, "pue": pue}
        write_run(tmp_path / name, summary | about)
    comparison = compare_runs([tmp_path])
    against = comparison.runs[1].against_twin
    assert against is not None
    assert against["co2_g"] == (0.5 if alike else None)
    assert [against["energy_j"], against["time_s"]] == pytest.approx([0.65, 0.8])
    told = ("CO2e of gated and dense is told at different carbon intensities or PUEs: no ratio of CO2e",)
    assert comparison.notes == (() if alike else told)


@pytest.mark.parametrize("again", ["dense", "gated"])
@pytest.mark.parametrize(
    "lost",
    [
        {"energy_lost_j": 90.0, "energy_complete": False},  # killed
        {"energy_lost_j": 90.0, "energy_complete": True},  # stopped, and the newest checkpoint was damaged
        {"energy_lost_j": 0.0, "energy_complete": False, "energy_j": None},  # killed, and nothing was metered
    ],
)
def test_joules_and_seconds_of_work_that_was_done_twice_are_not_compared(
    tmp_path: Path, again: str, lost: dict[str, Any]
) -> None:
    for name, summary in (("dense", DENSE), ("gated", GATED)):
        write_run(tmp_path / name, summary | (lost | {"attempts": 2} if name == again else {}))
    comparison = compare_runs([tmp_path])
    against = comparison.runs[1].against_twin
    assert against is not None
    assert [against[key] for key in ("energy_j", "co2_g", "time_s")] == [None] * 3
    assert against["step_time_s"] == 0.5
    assert comparison.notes == (f"{again} did work twice, or may have: no ratios of joules, CO2e and time",)


def test_joules_and_seconds_of_a_run_that_was_stopped_in_good_order_are_compared(tmp_path: Path) -> None:
    write_run(tmp_path / "dense", DENSE | {"attempts": 2, "energy_lost_j": 0.0, "energy_complete": True})
    write_run(tmp_path / "gated", GATED)
    comparison = compare_runs([tmp_path])
    against = comparison.runs[1].against_twin
    assert against is not None
    assert [against["energy_j"], against["time_s"]] == pytest.approx([0.65, 0.8])
    assert not comparison.notes


@pytest.mark.parametrize(
    ("ended_with", "goes_on_at", "lost"),
    [
        ("interrupt", 10, False),
        ("interrupt", 5, True),  # the newest checkpoint was damaged
        ("train", 10, True),  # killed: what it did after that is on no record
    ],
)
def test_a_device_that_could_never_be_read_is_no_work_that_was_done_twice(
    tmp_path: Path, ended_with: str, goes_on_at: int, lost: bool
) -> None:
    """As a part of a GPU (MIG): its run was stopped, and went on."""
    unreadable = {"energy_by_device_j": {"GPU-1a": None, CPU: 130.0}, "energy_complete": False, "energy_lost_j": 0.0}
    write_run(tmp_path / "dense", DENSE | {"energy_complete": True})
    folder = write_run(tmp_path / "gated", GATED | unreadable | {"attempts": 2})
    kinds = (("start", 0), (ended_with, 10), ("start", goes_on_at), ("end", 20))
    events = [{"time": 1.0, "step": step, "kind": kind} for kind, step in kinds]
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    comparison = compare_runs([tmp_path])
    against = comparison.runs[1].against_twin
    assert against is not None
    assert against["energy_j"] is None
    assert (against["time_s"] is None) == lost
    told = "gated did work twice, or may have: no ratios of joules, CO2e and time"
    assert comparison.notes == (
        (told if lost else "some joules of gated could not be read: no ratios of joules and CO2e"),
    )


def test_joules_that_were_added_up_in_another_order_are_no_lost_work(tmp_path: Path) -> None:
    write_run(tmp_path / "dense", DENSE)
    write_run(tmp_path / "gated", GATED | {"attempts": 2, "energy_lost_j": 2.8e-14})
    assert not compare_runs([tmp_path]).notes


@pytest.mark.parametrize(
    "worse",
    [
        {"energy_complete": False},
        {"energy_lost_j": 50.0, "attempts": 2},
        {"energy_quality": "estimate"},
        {"energy_by_device_j": {"GPU-1a NVIDIA H100 (counter: NVML energy counter)": 9.0}},
        {"co2_g": 1.0, "carbon_intensity_g_per_kwh": 10.0},
    ],
)
def test_of_several_twins_the_one_whose_joules_can_be_compared_counts(tmp_path: Path, worse: dict[str, Any]) -> None:
    carbon = {"co2_g": 1.0, "carbon_intensity_g_per_kwh": 369.0}
    write_run(tmp_path / "dense-1", DENSE | carbon | worse)
    write_run(tmp_path / "dense-2", DENSE | carbon)
    write_run(tmp_path / "gated", GATED | carbon)
    comparison = compare_runs([tmp_path])
    assert comparison.runs[2].twin == "dense-2"
    assert not comparison.notes


def test_of_a_sweeps_folder_the_runs_are_meant(tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "dense", DENSE)
    assert [run.name for run in compare_runs([tmp_path]).runs] == ["dense"]


def test_a_copy_of_a_run_is_left_out_and_named(tmp_path: Path) -> None:
    """The one that came further stays."""
    for name, summary in (("backup", DENSE), ("dense", DENSE), ("gated", GATED)):
        write_run(tmp_path / name, summary)
    (tmp_path / "dense" / "id.txt").write_text("dense-1\n")
    (tmp_path / "backup" / "id.txt").write_text("dense-1\n")
    (tmp_path / "backup" / "summary.json").unlink()
    (tmp_path / "backup" / "events.jsonl").write_text("")
    comparison = compare_runs([tmp_path])
    assert [run.name for run in comparison.runs] == ["dense", "gated"]
    copy, whole = (str(tmp_path / name) for name in ("backup", "dense"))
    assert comparison.notes[0] == f"{copy} is left out: it is a copy of {whole}"


def test_validation_and_test_accuracy_are_not_compared(tmp_path: Path) -> None:
    write_run(tmp_path / "dense", DENSE | {"accuracy_kind": "validation"})
    write_run(tmp_path / "gated", GATED)
    against = compare_runs([tmp_path]).runs[1].against_twin
    assert against is not None
    assert against["accuracy_points"] is None


def test_unknown_energy_gives_no_ratio(tmp_path: Path) -> None:
    write_run(tmp_path / "dense", DENSE | {"energy_j": None, "energy_quality": None})
    write_run(tmp_path / "gated", GATED | {"energy_j": None, "energy_quality": None})
    comparison = compare_runs([tmp_path])
    against = comparison.runs[1].against_twin
    assert against is not None
    assert against["energy_j"] is None
    assert "unknown" in render(comparison)


def test_an_unfinished_run_is_told_from_its_events(tmp_path: Path) -> None:
    start = {
        "time": 0.0,
        "step": 0,
        "kind": "start",
        "run": "half",
        "model": "resnet38",
        "data": "digits",
        "gated": True,
        "epochs": 6,
        "steps_per_epoch": 22,
        "units": ["a", "b", "c"],
        "energy_sources": [["cpu", "RAPL counter", "counter"], ["dram", "CodeCarbon: constant 20 W", "estimate"]],
        "structure/blocks": 3,
        "flops/forward": 2000,
    }
    train = {"time": 1.0, "step": 10, "kind": "train", "train/step_time_s": 0.03, "energy/total_j": 12.0}
    removal = {"time": 1.0, "step": 10, "kind": "removal", "unit": "b", "structure/blocks": 2, "flops/forward": 1500}
    stop = {"time": 2.0, "step": 10, "kind": "interrupt", "signal": "SIGTERM"}
    (tmp_path / "half").mkdir()
    lines = [json.dumps(event) + "\n" for event in (start, train, removal, stop)]
    (tmp_path / "half" / "events.jsonl").write_text("".join(lines) + '{"cut off')
    comparison = compare_runs([tmp_path / "half"])
    run = comparison.runs[0]
    assert run.state == "unfinished: step 10 of 132, stopped by SIGTERM"
    assert not run.is_finished
    assert run.summary["energy_j"] == 12.0
    assert run.summary["energy_quality"] == "estimate"
    assert run.summary["blocks"] == 2
    assert run.summary["flops_forward"] == 1500
    assert run.summary["accuracy"] is None
    assert "unfinished: step 10 of 132" in render(comparison)
    failure = {"time": 2.0, "step": 10, "kind": "failure", "error": f"the loss is nan; {'and so on ' * 30}"}
    (tmp_path / "half" / "events.jsonl").write_text("".join([*lines[:-1], json.dumps(failure) + "\n"]))
    state = compare_runs([tmp_path / "half"]).runs[0].state
    assert state.startswith("unfinished: step 10 of 132, crashed: the loss is nan; and so on")
    assert len(state) < 150


def test_a_run_that_only_has_a_config_has_done_nothing_yet(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    assert compare_runs([tmp_path]).runs[0].state == "unfinished: nothing is recorded yet"


def test_a_run_named_twice_is_shown_once_and_equal_names_with_their_parents(tmp_path: Path) -> None:
    one = write_run(tmp_path / "a" / "run", DENSE)
    two = write_run(tmp_path / "b" / "run", DENSE)
    runs = compare_runs([one, one / "summary.json", two]).runs
    assert [run.name for run in runs] == ["a/run", "b/run"]


def test_a_run_by_other_spellings_of_its_path_is_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path / "run", DENSE)
    (tmp_path / "link").symlink_to("run")
    monkeypatch.chdir(tmp_path / "run")
    runs = compare_runs([Path("."), Path("../run"), tmp_path / "run", tmp_path / "link"]).runs
    assert [run.name for run in runs] == ["run"]


def test_json_holds_everything(tmp_path: Path) -> None:
    write_run(tmp_path / "dense", DENSE)
    write_run(tmp_path / "gated", GATED)
    values = json.loads(json.dumps(compare_runs([tmp_path]).to_dict()))
    assert values["runs"][1]["summary"] == GATED
    assert values["runs"][1]["twin"] == "dense"
    assert values["runs"][0]["against_twin"] is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        ({}, "holds no run"),
        ({"notes.txt": "x"}, "holds no run"),
        ({"summary.json": "{"}, "cannot be read"),
        ({"summary.json": "[1]"}, "holds no summary"),
        ({"summary.json": '{"energy_j": "12 J"}'}, "energy_j '12 J' is no number"),
        ({"summary.json": '{"model": ["resnet38"]}'}, r"model \['resnet38'\] is no text"),
        ({"summary.json": '{"step_time_s": {"after": "fast"}}'}, "step_time_s .* is no object of numbers"),
        ({"events.jsonl": '{"time": 1, "step": 4, "kind": "end", "summary": {"accuracy": "?"}}\n'}, "accuracy"),
        ({"events.jsonl": "nonsense\n"}, "cannot be read"),
    ],
)
def test_what_is_no_run_is_named(tmp_path: Path, content: dict[str, str] | None, message: str) -> None:
    folder = tmp_path / "it"
    if content is not None:
        folder.mkdir()
        for name, text in content.items():
            (folder / name).write_text(text)
    with pytest.raises(UserError, match=message) as error:
        compare_runs([folder])
    assert str(folder) in str(error.value)
    assert "expected" in str(error.value)


def test_a_figure_that_a_summary_lacks_is_left_open(tmp_path: Path) -> None:
    """As an edited one, or one of an older version, may."""
    write_run(tmp_path / "dense", DENSE)
    write_run(tmp_path / "gated", {key: value for key, value in GATED.items() if key != "energy_j"})
    text = render(compare_runs([tmp_path]), 120)
    assert "unknown" in text
    assert "-1.00 pts" in text


def test_another_file_is_not_a_run(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UserError, match="is not a summary"):
        compare_runs([tmp_path / "notes.txt"])


def write_events(folder: Path, epochs: list[tuple[float | None, float | None]]) -> None:
    events = [
        {"time": 1.0, "step": 10 * n, "kind": "epoch", "eval/accuracy": accuracy, "energy/total_j": energy_j}
        for n, (accuracy, energy_j) in enumerate(epochs, start=1)
    ]
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))


def test_joules_to_an_accuracy_are_those_when_an_evaluation_first_reached_it(tmp_path: Path) -> None:
    write_events(write_run(tmp_path / "dense", DENSE), [(None, 10.0), (0.7, 50.0), (0.9, 100.0), (0.95, 200.0)])
    write_events(write_run(tmp_path / "gated", GATED), [(0.6, 30.0), (0.91, 60.0), (0.85, 90.0), (0.92, 130.0)])
    comparison = compare_runs([tmp_path], to_accuracy=0.9)
    assert [run.summary["energy_to_accuracy_j"] for run in comparison.runs] == [100.0, 60.0]
    assert comparison.runs[1].against_twin is not None
    assert comparison.runs[1].against_twin["energy_to_accuracy_j"] == pytest.approx(0.6)
    assert comparison.to_dict()["to_accuracy"] == 0.9
    text = render(comparison)
    assert "90.0 %" in text
    assert "0.60x" in text
    never = compare_runs([tmp_path], to_accuracy=0.99)
    assert [run.summary["energy_to_accuracy_j"] for run in never.runs] == [None, None]


def test_a_damaged_line_is_named_and_the_other_lines_count(tmp_path: Path) -> None:
    write_events(write_run(tmp_path / "dense", DENSE), [(0.7, 50.0), (0.9, 100.0)])
    write_events(write_run(tmp_path / "gated", GATED), [(0.6, 30.0), (0.7, 40.0), (0.91, 60.0)])
    write_events(tmp_path, [(0.6, 30.0), (0.7, 40.0)])
    (tmp_path / "half").mkdir()
    start = {"time": 0.0, "step": 0, "kind": "start", "model": "resnet38"}
    (tmp_path / "half" / "events.jsonl").write_text(json.dumps(start) + "\n")
    with (tmp_path / "half" / "events.jsonl").open("a") as file:
        file.write((tmp_path / "events.jsonl").read_text())
    (tmp_path / "events.jsonl").unlink()
    for name in ("gated", "half"):
        damage_line(tmp_path / name, 2)
    told = "events.jsonl of {} cannot be read in whole (line 2 is no event: "
    notes = compare_runs([tmp_path]).notes
    assert [note.startswith(told.format("half")) for note in notes] == [True]  # of the other the summary is enough
    comparison = compare_runs([tmp_path], to_accuracy=0.9)
    assert [run.summary["energy_to_accuracy_j"] for run in comparison.runs] == [100.0, 60.0, None]
    assert [run.is_finished for run in comparison.runs] == [True, True, False]
    assert [
        note.startswith(told.format(name)) for name, note in zip(("gated", "half"), comparison.notes, strict=True)
    ] == [
        True,
        True,
    ]


@pytest.mark.parametrize("accuracy", [0.0, 90.0, -1.0])
def test_an_accuracy_that_is_no_share_is_the_users_error(tmp_path: Path, accuracy: float) -> None:
    write_run(tmp_path / "dense", DENSE)
    with pytest.raises(UserError, match=r"--to-accuracy: .* expected a share in \(0, 1\]"):
        compare_runs([tmp_path], to_accuracy=accuracy)


# CO2e at one intensity.

GIVEN = CarbonIntensity(g_per_kwh=360.0, source="given", country=None, region=None, pue=1.5)
OF_ITS_OWN = {"carbon_intensity_g_per_kwh": 50.0, "carbon_intensity_source": "given", "pue": 1.0}


def test_runs_that_knew_no_grid_have_the_co2e_that_is_asked_for(tmp_path: Path) -> None:
    write_run(tmp_path / "dense", DENSE)
    write_run(tmp_path / "gated", GATED)
    comparison = compare_runs([tmp_path], carbon=GIVEN)
    # 200 J at a PUE of 1.5 are a twelve-thousandth of a kWh.
    assert [run.summary["co2_g"] for run in comparison.runs] == pytest.approx([0.030, 0.0195])
    assert (comparison.runs[1].against_twin or {})["co2_g"] == pytest.approx(0.65)
    (note,) = comparison.notes
    assert "360 g/kWh (given) and a PUE of 1.5" in note
    assert "30.0 mg" in render(comparison)


def test_what_was_told_at_different_intensities_is_comparable_at_one(tmp_path: Path) -> None:
    write_run(tmp_path / "dense", DENSE | OF_ITS_OWN | {"co2_g": 0.003})
    write_run(tmp_path / "gated", GATED | OF_ITS_OWN | {"co2_g": 0.1, "pue": 2.0})
    assert (compare_runs([tmp_path]).runs[1].against_twin or {})["co2_g"] is None
    assert (compare_runs([tmp_path], carbon=GIVEN).runs[1].against_twin or {})["co2_g"] == pytest.approx(0.65)


def test_unknown_joules_have_no_co2e_at_any_intensity(tmp_path: Path) -> None:
    write_run(tmp_path / "dense", DENSE | {"energy_j": None})
    assert compare_runs([tmp_path], carbon=GIVEN).runs[0].summary["co2_g"] is None
