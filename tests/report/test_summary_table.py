"""The table at the end of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from greenprune.config import UserError
from greenprune.report import print_summary
from greenprune.summary_file import read_whole_summary


def summary_of(**changes: object) -> dict[str, Any]:
    summary: dict[str, Any] = {
        "run": "digits-resnet38-block-0.5-seed0",
        "model": "resnet38",
        "data": "digits",
        "seed": 0,
        "gated": True,
        "accuracy": 0.9359,
        "accuracy_kind": "test",
        "loss": 0.189,
        "params": 65_978,
        "params_dense": 561_082,
        "flops_forward": 4_738_304,
        "flops_forward_dense": 10_341_632,
        "flops_train": 176_611_590_144,
        "flops_train_dense": 261_942_607_872,
        "kept_cost": 0.458,
        "budget_target": 0.5,
        "budget_unit": "flops",
        "gates_left": 0,
        "blocks": 16,
        "blocks_dense": 18,
        "removals": [
            {"unit": "stages.2.3", "step": 44, "epoch": 2.0, "reason": "off"},
            {"unit": "stages.2.2", "step": 66, "epoch": 3.0, "reason": "settled"},
        ],
        "energy_j": 14_395.4,
        "energy_quality": "estimate",
        "energy_by_phase_j": {"train": 14_000.0, "eval": 395.4},
        "energy_by_device_j": {"cpu (CodeCarbon: load of 8 W)": 14_395.4},
        "energy_lost_j": 0.0,
        "co2_g": None,
        "carbon_intensity_g_per_kwh": None,
        "time_s": 454.0,
        "step_time_s": {"before": 0.04, "after": 0.015},
        "attempts": 1,
        "samples": 8448,
        "steps": 132,
        "epochs": 6,
        "batch_size": 64,
        "precision": "no",
        "device": "cpu",
        "world_size": 1,
    }
    return {**summary, **changes}


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)

    def show(path: Path = Path("runs/it"), **changes: object) -> str:
        print_summary(summary_of(**changes), path)
        return capsys.readouterr().out

    return show


def test_it_tells_what_was_gained_and_spent(printed: Any) -> None:
    text = printed()
    assert "93.59 % on the test set" in text
    assert "2 of 18 blocks: stages.2.3 (epoch 2, off); stages.2.2 (epoch 3, settled)" in text
    assert "45.8 % of the dense FLOPs, for a budget of 50.0 %" in text
    assert "66.0 k, dense 561 k (12 %)" in text
    assert "4.74 MFLOPs, dense 10.3 MFLOPs (46 %)" in text
    assert "177 GFLOPs, the dense twin's 262 GFLOPs (32.6 % saved)" in text
    assert "14.4 kJ (estimate)" in text
    assert "train 14.0 kJ, eval 395 J" in text
    assert "unknown: set energy.country" in text
    assert "7.57 min, 8,448 images, 1 process" in text
    assert "40.0 ms before the first removal, 15.0 ms after the last (0.38x)" in text


def test_what_took_more_than_its_twin_claims_no_saving(printed: Any) -> None:
    """Gates cost something, and a budget of 1 removes nothing."""
    text = printed(flops_train=round(1.002 * 261_942_607_872), epochs=1)
    assert "262 GFLOPs, the dense twin's 262 GFLOPs (0.2 % more)" in text
    assert ", 1 epoch " in text


def test_piped_it_has_no_control_characters_and_an_unbroken_path(printed: Any) -> None:
    path = Path("/a") / ("long" * 60)
    text = printed(path)
    assert "\x1b" not in text
    assert str(path) in text


def test_a_dense_run_claims_no_saving(printed: Any) -> None:
    text = printed(
        gated=False,
        removals=[],
        params=561_082,
        flops_forward=10_341_632,
        flops_train=261_942_607_872,
        budget_target=None,
        step_time_s={"before": 0.04, "after": None},
    )
    assert "nothing: a dense run" in text
    assert "saved" not in text
    assert "budget" not in text
    assert "40.0 ms" in text


def test_unknown_energy_is_never_zero(printed: Any) -> None:
    text = printed(
        energy_j=None,
        energy_quality=None,
        energy_by_phase_j={"train": None},
        energy_by_device_j={"gpu": None},
        carbon_intensity_g_per_kwh=56.0,
    )
    assert "unknown: nothing could be read" in text
    assert "unknown, as the energy is" in text
    assert "0 J" not in text


def test_a_device_that_was_not_read_makes_the_sum_a_lower_bound(printed: Any) -> None:
    text = printed(energy_by_device_j={"cpu (RAPL counter)": 14_395.4, "GPU-1": None})
    assert "at least 14.4 kJ" in text
    assert "unknown, GPU-1" in text


def test_why_joules_are_missing_is_told_of_each_device(printed: Any) -> None:
    text = printed(energy_complete=False, energy_missing={"GPU-1": "GPU is lost", "cpu": "it was restarted"})
    assert "missing" in text
    assert "GPU-1: GPU is lost" in text
    assert "cpu: it was restarted" in text


def test_work_done_again_and_gates_that_are_left_are_told(printed: Any) -> None:
    text = printed(energy_lost_j=20.0, attempts=2, gates_left=3, co2_g=0.224, carbon_intensity_g_per_kwh=56.0)
    assert "20.0 J of it for work that was lost and done again" in text
    assert "in 2 attempts" in text
    assert "3 gates are left" in text
    assert "224 mg, at 56 g/kWh" in text


def test_bounds_attempts_and_joules_a_sample_are_told_where_they_are_known(printed: Any) -> None:
    text = printed(
        energy_complete=False,
        energy_bound_j=60.0,
        energy_per_sample_j=1.704,
        energy_per_epoch_j=2399.0,
        energy_by_attempt=[
            {"attempt": 1, "energy_j": 9_000.0, "lost_j": 500.0},
            {"attempt": 2, "energy_j": 5_395.4, "lost_j": 0.0},
        ],
        energy_slurm_j=30_000.0,
        co2_g=0.3,
        carbon_intensity_g_per_kwh=56.0,
        pue=1.3,
    )
    assert "at least 14.4 kJ ± 60.0 J (estimate)" in text
    assert "1.70 J an image trained on, 2,399 J an epoch" in text
    assert "1: 9,000 J (500 J done again), 2: 5,395 J" in text
    assert "30.0 kJ for the job, on whole nodes" in text
    assert "56 g/kWh and a PUE of 1.3" in text


def test_channels_are_counted_beside_the_blocks(printed: Any) -> None:
    removals = [
        {"unit": "stages.2.3", "step": 44, "epoch": 2.0, "reason": "off", "channels": None},
        {"unit": "stages.0.1:hidden", "step": 44, "epoch": 2.0, "reason": "off", "channels": 7},
        {"unit": "stages.0.2:hidden", "step": 44, "epoch": 2.0, "reason": "off", "channels": 5},
        {"unit": "stages.0.2:hidden", "step": 66, "epoch": 3.0, "reason": "settled", "channels": 1},
    ]
    text = " ".join(printed(removals=removals, blocks=17, channels=660, channels_dense=673).split())
    assert (
        "1 of 18 blocks, 13 of 673 channels inside blocks: stages.2.3, 12 channels of 2 blocks (epoch 2, off); 1"
        in text
    )
    assert "1 channel of stages.0.2 (epoch 3, settled)" in text


def test_an_edited_summary_is_told_or_refused(tmp_path: Path) -> None:
    """Each figure taken out, unknown, or of another kind: the table is printed, or one message says what is wrong."""
    path = tmp_path / "summary.json"
    whole = summary_of(
        channels=None, channels_dense=None, energy_by_attempt=[], energy_missing={}, energy_complete=True
    )
    whole |= {
        "pue": 1.0,
        "energy_bound_j": None,
        "energy_slurm_j": None,
        "energy_per_sample_j": 0.1,
        "energy_per_epoch_j": 9.0,
    }
    told = refused = 0
    for key in whole:
        others = [{**whole, key: value} for value in ("x", None, 2.5, [], {}, [{"unit": 1}], {"a": "b"})]
        for summary in ({other: whole[other] for other in whole if other != key}, *others):
            path.write_text(json.dumps(summary))
            try:
                read_whole_summary(path)
            except UserError:
                refused += 1
            else:
                print_summary(summary, tmp_path)
                told += 1
    assert told > len(whole)
    assert refused > len(whole)


def test_a_summary_without_a_result_is_none_of_a_finished_run(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    path.write_text("{}")
    with pytest.raises(UserError, match=r"summary\.json' does not tell run; expected the summary of a finished run"):
        read_whole_summary(path)
