"""Standard streams that can be written to, whatever the terminal can show and whether or not there is one."""

from __future__ import annotations

import io
import os
import sys


def ready_streams() -> None:
    """Have standard output and error take any text: what their encoding lacks is escaped, as in ``\\xfc``.

    A name in a run's folder or a sign such as µ would otherwise end a command whose work is done. Of a stream that is
    closed (``>&-``), for which Python has None, there is one that leads nowhere; it takes the place that the first
    file of a run would get, and with it whatever a library prints.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 (open to the end)
    for stream in (sys.stdout, sys.stderr):
        # Who has asked for another way by PYTHONIOENCODING gets it.
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")
