"""A stand-in for the tree in which Linux shows the CPU's energy counters."""

from __future__ import annotations

from pathlib import Path


class Powercap:
    """A powercap tree as Linux shows it: all zones side by side in one folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def zone(self, zone: str, name: str, energy_uj: int | str, max_uj: int = 262_143_328_850) -> Path:
        folder = self.root / zone
        folder.mkdir(parents=True)
        (folder / "name").write_text(f"{name}\n")
        (folder / "max_energy_range_uj").write_text(f"{max_uj}\n")
        (folder / "energy_uj").write_text(f"{energy_uj}\n")
        return folder / "energy_uj"
