"""Keeping secrets out of whatever is written."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping

# Databases and shells run some of these words together with what stands before: PGPASSWORD, OPENAI_APIKEY. PWD is a
# folder where it stands alone, and short for a password after an underscore, as in MYSQL_PWD.
_SECRET_NAME = re.compile(
    r"((^|_)(KEY|TOKEN|SECRET|CREDENTIALS?)|PASSWORD|PASSWD|PASSPHRASE|API_?KEY|_PWD)($|_)", re.IGNORECASE
)
# Who logs in with which password, which may hold what should have been escaped: a slash, an @.
_LOGIN = re.compile(r"(://)([^/:@\s]*:[^\s\"'<>]*|[^/@\s]+)@")
_LEAST_SECRET = 6  # shorter ones are flags, and would blot out half of a text


def names_secret(name: str) -> bool:
    """Whether a variable of this name holds a secret: a key, token, password or the like."""
    return _SECRET_NAME.search(name) is not None


def without_secrets(text: str, environment: Mapping[str, str]) -> str:
    """A text that may be written anywhere: what the environment calls a key, token or password is blotted out.

    Args:
        text: For a log, a file or the terminal.
        environment: The process's environment.
    """
    secrets = {value for name, value in environment.items() if names_secret(name) and len(value) >= _LEAST_SECRET}
    for secret in sorted(secrets, key=len, reverse=True):  # of one that begins with another the end would be left
        text = text.replace(secret, "***")
    return _LOGIN.sub(r"\1***@", text)


def print_error(error: object, environment: Mapping[str, str], prog: str = "greenprune") -> None:
    """Say on standard error, without secrets, why a command could not be carried out.

    Args:
        error: What is wrong, in one line.
        environment: The process's environment.
        prog: The program's name.
    """
    print(f"{prog}: error: {without_secrets(str(error), environment)}", file=sys.stderr)
