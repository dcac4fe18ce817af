"""Keeping secrets out of whatever is written."""

from __future__ import annotations

import re
from collections.abc import Mapping

_SECRET = re.compile(r"(^|_)(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)($|_)", re.IGNORECASE)
_LEAST_SECRET = 6  # shorter ones are flags, and would blot out half of a text


def without_secrets(text: str, environment: Mapping[str, str]) -> str:
    """A text that may be written anywhere: what the environment calls a key, token or password is blotted out.

    Args:
        text: For a log, a file or the terminal.
        environment: The process's environment.
    """
    for name, value in environment.items():
        if _SECRET.search(name) and len(value) >= _LEAST_SECRET:
            text = text.replace(value, "***")
    return re.sub(r"(://)[^/@\s]+@", r"\1***@", text)
