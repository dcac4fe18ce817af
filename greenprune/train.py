"""Entry point of a training process: ``accelerate launch greenprune/train.py --config configs/digits.yaml``."""

import os
import sys

if __name__ == "__main__" and os.path.basename(sys.path[0]) == "greenprune":
    # Launched as a file, this folder comes first on the path; its modules are to be found in the package only.
    del sys.path[0]

from greenprune.interrupt import end_with_launcher, ended_by_ctrl_c
from greenprune.streams import ready_streams

if __name__ == "__main__":
    ready_streams()
    with ended_by_ctrl_c():
        if "ACCELERATE_MIXED_PRECISION" in os.environ:  # set by accelerate launch
            end_with_launcher()
        from greenprune.command import run_command  # which takes its time

        sys.exit(run_command(sys.argv[1:], os.environ, prog="train.py"))
