"""Figures with a spread in the tables of README and docs are those of the result files, to the last digit."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
FIGURE = re.compile(r"[-+]?\d+\.\d+ ± \d+\.\d+")
RECORDS = ROOT / "docs" / "decisions"  # tell what was measured when they were made


def figures_of(text: str) -> set[str]:
    return {figure.lstrip("+") for figure in FIGURE.findall(text)}


def difference(study: str, cell: str, other: str) -> str:
    """Points of accuracy of one cell of a study over another, seed by seed."""
    points = []
    for file in sorted((RESULTS / "accuracy" / study).glob(f"{cell}-seed*.json")):
        accuracies = [
            json.loads(path.read_text())["accuracy"] for path in (file, file.with_name(other + file.name[len(cell) :]))
        ]
        points.append(100 * (accuracies[0] - accuracies[1]))
    return f"{statistics.mean(points):.2f} ± {statistics.stdev(points):.2f}"


def test_figures_in_tables_are_those_of_the_results() -> None:
    known = {figure for path in RESULTS.rglob("*.md") for figure in figures_of(path.read_text())}
    known.add(difference("cifar10", "channel-20-epochs-0.5", "dense-20-epochs"))
    seen, wrong = 0, []
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            if not line.startswith("|") or RECORDS in path.parents:
                continue
            figures = figures_of(line)
            seen += len(figures)
            wrong += [f"{path.relative_to(ROOT)}:{number}: {figure}" for figure in sorted(figures - known)]
    assert wrong == []
    assert seen > 90  # the tables are where they were
