"""An environment of its own for each peer, with its published package in it, below ``build/peers``."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

ENVIRONMENTS = Path(__file__).parents[1] / "build" / "peers"


class PeerUnavailable(RuntimeError):
    """A peer cannot be had here; the message says why in one line."""


def same_version(*packages: str) -> list[str]:
    """Requirements for packages in the versions that run here, so that peers differ in nothing else."""
    return [f"{name}=={importlib.metadata.version(name)}" for name in packages]


def peer_python(name: str, requirements: list[str], folder: Path | None = None) -> Path:
    """The Python of a peer's environment, which is made once and kept as long as its requirements stay the same.

    Args:
        name: What the environment is called.
        requirements: What pip installs into it.
        folder: Where to make it; default: ``build/peers/NAME``.

    Raises:
        PeerUnavailable: It cannot be made; most often there is no network.
    """
    home = folder or ENVIRONMENTS / name
    python, installed = home / "bin" / "python", home / "requirements.json"
    if installed.exists() and json.loads(installed.read_text()) == requirements:
        return python
    print(f"installing {', '.join(requirements)} into {home}", flush=True)
    for command in (
        [sys.executable, "-m", "venv", "--clear", str(home)],
        [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *requirements],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            said = done.stderr.strip().splitlines() or ["nothing"]
            raise PeerUnavailable(f"{name} cannot be installed: {said[-1]}")
    installed.write_text(json.dumps(requirements))
    return python
