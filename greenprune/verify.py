"""Whether a run's files are whole and tell the same: checked against each other, not taken on trust."""

from __future__ import annotations

import copy

from torch import nn

from greenprune.checkpoint import Checkpoint, CheckpointCorrupt
from greenprune.config import Config, shaping_values
from greenprune.evaluation import Evaluation
from greenprune.surgery import Structure, StructureMismatch, replay
from greenprune.timing import StepTimes
from greenprune.tracking import Ledger


def check_fits(checkpoint: Checkpoint, config: Config, model: nn.Module) -> Structure:
    """Check that a checkpoint is one of a run: its settings, its structure and its tensors.

    Args:
        checkpoint: What was read.
        config: The run.
        model: The run's dense network with its gates, on the CPU; is left as it is.

    Returns:
        The checkpoint's structure.

    Raises:
        CheckpointCorrupt: It is of another run; the message says what differs.
    """
    state = checkpoint.state
    try:
        theirs, mine = state["config"], shaping_values(config.to_dict())
        different = sorted(key for key in theirs.keys() & mine.keys() if theirs[key] != mine[key])
        if different:
            raise CheckpointCorrupt(f"of another run (it differs in {', '.join(different)})")
        structure = Structure.from_dict(state["structure"])
        Ledger(**state["ledger"])
        StepTimes(**state["step_times"])
        if state["evaluation"] is not None:
            Evaluation(**state["evaluation"])
        if isinstance(state["step"], bool) or not isinstance(state["step"], int) or state["step"] < 0:
            raise CheckpointCorrupt(f"step {state['step']!r} is no number of steps")
        network = copy.deepcopy(model)
        replay(structure, network)
    except (LookupError, TypeError, AttributeError, StructureMismatch) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointCorrupt(f"its state is not that of a run ({reason})") from None
    expected = {name: (tensor.shape, tensor.dtype) for name, tensor in network.state_dict().items()}
    found = {name: (tensor.shape, tensor.dtype) for name, tensor in checkpoint.model.items()}
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        raise CheckpointCorrupt(f"its tensors are not those of its structure, first at {wrong[0]}")
    return structure
