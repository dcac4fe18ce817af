"""A run as a command: flags in, exit code out. Torch is imported only once the config is known to be right."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from contextlib import suppress

from greenprune.config import UserError, parse_config
from greenprune.redaction import without_secrets


def run_command(args: list[str], environment: Mapping[str, str], prog: str) -> int:
    """Parse a run's flags, do the run, and say how it ended.

    Args:
        args: Command-line arguments without the program's name.
        environment: The process's environment: GREENPRUNE_DATA, and the launcher's RANK.
        prog: Program name for the help text.

    Returns:
        Exit code: 0 done, 1 diverged, damaged or ended by a file, 2 not runnable as asked, 128 + n stopped by signal n.
    """
    code, message, for_rank_0 = _outcome(args, environment, prog)
    if message and (int(environment.get("RANK", "0")) == 0 or not for_rank_0):
        with suppress(OSError):  # the terminal may be gone, and with it the reader
            print(f"greenprune: {without_secrets(message, environment)}", file=sys.stderr, flush=True)
    return code


def _outcome(args: list[str], environment: Mapping[str, str], prog: str) -> tuple[int, str, bool]:
    """Exit code and last words of a run, and whether all ranks have the same, so that rank 0 can speak for them."""
    try:
        config = parse_config(args, prog)
    except UserError as error:
        return 2, f"error: {error}", True

    from greenprune.allocation import keep_freed_memory
    from greenprune.checkpoint import CheckpointCorrupt
    from greenprune.engine import PeerLost, RankMismatch
    from greenprune.formatting import leave_closed_pipe
    from greenprune.interrupt import Interrupted
    from greenprune.progress import open_display
    from greenprune.report import print_summary
    from greenprune.run import train
    from greenprune.trainer import TrainingDiverged

    keep_freed_memory()
    try:
        result = train(config, environment, open_display)
    except Interrupted as stop:
        return 128 + stop.signal, stop.advice, True
    except TrainingDiverged as error:
        return 1, f"error: {error}", True
    except PeerLost:
        return 1, "", False
    except (UserError, CheckpointCorrupt, RankMismatch, OSError) as error:
        code = 2 if isinstance(error, UserError) and not error.ended_run else 1
        return code, f"error: {error}", getattr(error, "known_to_all", False)
    except (MemoryError, RuntimeError) as error:
        if not _is_lack_of_memory(error):
            raise  # the program's own mistake, whose traceback is needed
        return 1, f"error: {' '.join(str(error).split()) or 'memory is full'}", False
    if result.is_main:
        try:
            if result.was_finished:
                print("Finished before, so nothing was done; the figures, CO2e among them, are told as they were then.")
            print_summary(result.summary, result.folder.path)
        except (OSError, SystemExit):  # with which rich leaves a closed pipe
            leave_closed_pipe()  # nobody reads it; the run is done all the same
    return 0, "", True


def _is_lack_of_memory(error: Exception) -> bool:
    """Whether memory was full: this process's, its GPU's, or that of a loader process, which the system then kills."""
    from torch import OutOfMemoryError

    if isinstance(error, MemoryError | OutOfMemoryError):
        return True
    told = r"DataLoader worker .*(killed|exited)|can't allocate memory|not enough memory"
    return re.search(told, str(error)) is not None
