"""The model of a step's time against ranks and structure, and that it finds again what it was made from."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from scaling import CASES, Fabric, Kept, Network, fit_fabric, fit_network, fit_wait, forecast, step_s, validate

NETWORK = Network(host_s=0.01, sample_s=0.001, gradient_bytes=4e6)
FABRIC = Fabric(bandwidth=1e9, latency_s=1e-4, wait_s=3e-3)


def test_one_rank_computes_and_exchanges_nothing() -> None:
    assert step_s(NETWORK, FABRIC, 1, 10, Kept()) == pytest.approx(0.02)
    assert step_s(NETWORK, FABRIC, 1, 10, Kept(blocks=0.5, flops=0.25)) == pytest.approx(0.0075)


def test_two_ranks_add_gradients_buckets_and_gates() -> None:
    exchange = 4e6 / 1e9 + 2 * 1e-4  # half of twice the bytes, in two buckets
    assert step_s(NETWORK, FABRIC, 2, 10, Kept(gates=False)) == pytest.approx(0.02 + exchange + 3e-3)
    assert step_s(NETWORK, FABRIC, 2, 10, Kept()) == pytest.approx(0.02 + exchange + 1e-4 + 3e-3)


def test_an_exchange_hides_behind_compute_as_far_as_it_may() -> None:
    hiding = Fabric(bandwidth=1e9, latency_s=0.0, overlap=0.5, parallel=True)
    assert step_s(NETWORK, hiding, 2, 50, Kept()) == pytest.approx(0.05)
    assert step_s(NETWORK, hiding, 2, 1, Kept()) == pytest.approx(0.01)


def test_fitting_finds_the_numbers_that_steps_and_collectives_were_made_from() -> None:
    sizes = {size: 1e-4 + size / 1e9 for size in (0, 2**20, 2**24)}
    fabric = fit_fabric(sizes)
    assert fabric.bandwidth == pytest.approx(1e9)
    runs = {}
    for ranks in (1, 2):
        rows = [
            {
                "network": name,
                "halved": halved,
                "images": images,
                "flops": 50 if halved else 100,
                "params": 500_000 if halved else 1_000_000,
                "step_s": step_s(NETWORK, FABRIC, ranks, images, Kept(0.5, 0.5, 0.5) if halved else Kept()),
            }
            for name, _, _, batches in CASES
            for halved in (False, True)
            for images in batches
        ]
        runs[ranks] = {"rows": rows, "collectives": sizes}
    assert fit_network(runs[1]["rows"][:3]).sample_s == pytest.approx(0.001)
    fabric = fit_wait(fabric, runs[1], runs[2])
    assert fabric.wait_s == pytest.approx(3e-3)
    found = validate(fabric, runs[1], runs[2])
    assert sum(row["ranks"] == 2 for row in found) == 2 * sum(len(batches) for *_, batches in CASES) - 1
    assert {row["ranks"] for row in found} == {1, 2}
    assert max(abs(row["error"]) for row in found) < 1e-9


def test_the_forecast_covers_three_sizes_both_ways() -> None:
    rows = forecast()
    assert [(row["scaling"], row["ranks"]) for row in rows] == [
        (scaling, ranks) for scaling in ("weak", "strong") for ranks in (8, 64, 4096)
    ]
    assert all(row["half_s"] < row["dense_s"] for row in rows)
