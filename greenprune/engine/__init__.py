"""The engine: processes, devices, precision and data parallelism, behind a few verbs.

The only room that knows Accelerate and DeepSpeed. Everything above it works on one network, one optimizer and plain
tensors.
"""

from greenprune.engine.engine import Engine, RankMismatch
from greenprune.engine.peers import PeerLost

__all__ = ["Engine", "PeerLost", "RankMismatch"]
