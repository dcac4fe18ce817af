"""Keeping secrets out of whatever is written."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from urllib.parse import quote

# What bears a secret by its name. Names are told apart by _ - and . alike; case does not count.
_WORDS = "KEYS?|TOKEN|SECRETS?|CREDENTIALS?|AUTH(?!_SOCK)|AUTHORIZATION|WEBHOOKS?"
# Databases, shells and programmers run some of these words together with what stands before: PGPASSWORD, accessToken.
_ENDINGS = "PASSWORDS?|PASSWD|PASSPHRASE|API_?KEYS?|(?:ACCESS|PRIVATE|SECRET)KEY|[A-Z]TOKEN|[A-Z]SECRETS?"
# PWD is a folder where it stands alone, and short for a password after an underscore, as in MYSQL_PWD.
_LAST = "(?:^|_)(?:PASS|PAT)$|_PWD(?:_|$)"
_SECRET_NAME = re.compile(f"(?:^|_)(?:{_WORDS})(?:_|$)|(?:{_ENDINGS})(?:_|$)|{_LAST}")
# Of a flag the last word counts: --api-key KEY, but --key-file PATH.
_SECRET_FLAG = re.compile(f"(?:^|_)(?:{_WORDS})$|(?:{_ENDINGS})$|{_LAST}")
_SIGNATURES = ("SIG", "SIGNATURE", "X_AMZ_SIGNATURE")  # in addresses that let in who has them

# Who logs in with which password, which may hold what should have been escaped: a slash, an @.
_LOGIN = re.compile(r"(://)([^/:@\s]*:[^\s\"'<>]*|[^/@\s]+)@")
_QUOTED = r"""(?:"(?:\\.|[^"\\\n])+"|'(?:\\.|[^'\\\n])+'|"[^"\n]+"|'[^'\n]+')"""
_VALUE = rf"""(?P<value>{_QUOTED}|[^\s"']+)"""
_MAPPED = re.compile(rf"""(?P<before>(["'])(?P<name>[\w.-]+)\2\s*:\s*)(?P<value>{_QUOTED})""")
_PARAMETER = re.compile(r"(?P<before>[?&;])(?P<name>[\w.-]+)=(?P<value>[^\s&#;\"'<>]+)")
_ASSIGNED = re.compile(r"(?<![\w.?&;-])(?P<name>-{0,2}[A-Za-z_][\w.-]*)=(?!=)" + _VALUE)
_NEXT_WORD = re.compile(r"(?<![\w.-])(?P<name>--?[A-Za-z][\w.-]*)(?P<gap>[ \t]+)(?!-)" + _VALUE)
_HEADER = re.compile(
    r"(?<![\w-])((?:[a-z]+-)+(?:key|token|secret|password)[\"']?\s*:\s*[\"']?)[^\s\"',]+", re.IGNORECASE
)
_SCHEMES = r"(?:basic|bearer|digest|token|negotiate)\b"
_AUTHORIZATION = re.compile(
    rf"(\bauthorization[\"']?\s*[:=]\s*[\"']?(?:{_SCHEMES}\s+)?)(?!{_SCHEMES})[^\s\"',]+", re.IGNORECASE
)
_BEARER = re.compile(r"(\bbearer\s+)(?=[^\s\"']*\d|[^\s\"']{20})[\w~+/=-][\w.~+/=-]{4,}[\w~+/=-]", re.IGNORECASE)
_REFERENCE = re.compile(r"\$(?:\w+|\{[^}]*\}|\([^)]*\))")
_GAP = r"(?:\s|\\[nrt]|%0[9AD]|%20|\+)+"  # between the words of a secret, as of a key in lines
_LEAST_SECRET = 6  # shorter ones are flags, and would blot out half of a text


def names_secret(name: str) -> bool:
    """Whether a variable of this name holds a secret: a key, token, password or the like."""
    return _SECRET_NAME.search(_plain(name)) is not None


def _is_secret_flag(flag: str) -> bool:
    name = _plain(flag.lstrip("-"))
    return not name.startswith("NO_") and _SECRET_FLAG.search(name) is not None


def _plain(name: str) -> str:
    return re.sub("[-.]", "_", name).upper()


def without_secrets(text: str, environment: Mapping[str, str]) -> str:
    """A text that may be written anywhere: secrets are blotted out.

    They are what the environment calls a key, token or password, and what stands in the text itself as one: as the
    value of a flag, variable, parameter or key of such a name, in a header, or as the login of an address.

    Args:
        text: For a log, a file or the terminal.
        environment: The process's environment.
    """
    secrets = {value.strip() for name, value in environment.items() if names_secret(name)}
    forms = {form for secret in secrets if len(secret) >= _LEAST_SECRET for form in _forms_of(secret)}
    for form in sorted(forms, key=len, reverse=True):  # of one that begins with another the end would be left
        text = re.sub(form, "***", text)
    text = _LOGIN.sub(r"\1***@", text)
    text = _AUTHORIZATION.sub(r"\1***", text)
    text = _BEARER.sub(r"\1***", text)
    text = _HEADER.sub(r"\1***", text)
    text = _MAPPED.sub(_blot_mapped, text)
    text = _PARAMETER.sub(_blot_parameter, text)
    text = _ASSIGNED.sub(_blot_assigned, text)
    return _NEXT_WORD.sub(_blot_next_word, text)


def _forms_of(secret: str) -> set[str]:
    """Patterns of how a text may have a secret: as it is, quoted or in an address, on one line or on several."""
    ways = (str, lambda word: repr(word)[1:-1], lambda word: json.dumps(word)[1:-1], partial(quote, safe=""))
    return {_GAP.join(re.escape(way(word)) for word in secret.split()) for way in ways}


def _blot_parameter(found: re.Match[str]) -> str:
    is_secret = names_secret(found["name"]) or _plain(found["name"]) in _SIGNATURES
    return f"{found['before']}{found['name']}=***" if is_secret else found.group()


def _blot_mapped(found: re.Match[str]) -> str:
    return f"{found['before']}{_blotted(found['value'])}" if _is_assigned_secret(found["name"]) else found.group()


def _blot_assigned(found: re.Match[str]) -> str:
    return f"{found['name']}={_blotted(found['value'])}" if _is_assigned_secret(found["name"]) else found.group()


def _blot_next_word(found: re.Match[str]) -> str:
    if not _is_secret_flag(found["name"]):
        return found.group()
    return f"{found['name']}{found['gap']}{_blotted(found['value'])}"


def _is_assigned_secret(name: str) -> bool:
    """Whether what stands before an equals sign bears a secret; a key alone is more often one to sort by."""
    return _is_secret_flag(name) if name.startswith("-") else name != "key" and names_secret(name)


def _blotted(value: str) -> str:
    quote = value[0] if value[0] in "\"'" else ""
    return f"{quote}***{quote}"


def without_command_secrets(words: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """A command line, word by word, without secrets: see :func:`without_secrets`.

    Args:
        words: The command and its arguments.
        environment: The process's environment.
    """
    shown: list[str] = []
    is_value = False
    for word in words:
        name, equals, _ = word.partition("=")
        if is_value and not word.startswith("-"):
            shown.append("***")
        elif equals and re.fullmatch(r"-{0,2}\w[\w.-]*", name) and _is_assigned_secret(name):
            shown.append(f"{name}=***")  # also after a space, which a text would end it at
        else:
            shown.append(without_secrets(word, environment))
        is_value = not equals and word.startswith("-") and _is_secret_flag(word)
    return shown


def holds_secret(text: str) -> bool:
    """Whether a secret stands in a line of shell; one that a variable or a command gives does not stand in it."""
    without = _REFERENCE.sub("\n", text)
    without = re.sub(r"\bssh://[\w.-]+@", "ssh://", without)  # a name, with which nobody gets in
    return without_secrets(without, {}) != without


def print_error(error: object, environment: Mapping[str, str], prog: str = "greenprune") -> None:
    """Say on standard error, without secrets, why a command could not be carried out.

    Args:
        error: What is wrong, in one line.
        environment: The process's environment.
        prog: The program's name.
    """
    print(f"{prog}: error: {without_secrets(str(error), environment)}", file=sys.stderr)
