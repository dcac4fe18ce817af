"""``python -m greenprune.energy -- COMMAND ...``: the meter alone, as a command."""

from __future__ import annotations

import os
import sys

from greenprune.energy.measure import main
from greenprune.streams import ready_streams

if __name__ == "__main__":
    ready_streams()
    sys.exit(main(sys.argv[1:], os.environ, "python -m greenprune.energy"))
