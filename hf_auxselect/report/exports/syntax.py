"""Strings as YAML, bash and comments write them, whatever a task is called."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def quoted(text: str) -> str:
    """A YAML string in double quotes; no character of it is invisible, or ends the line."""
    return '"' + "".join(_escaped(character) for character in text) + '"'


def _escaped(character: str) -> str:
    if character in '"\\':
        return "\\" + character
    if character.isprintable():
        return character
    code = ord(character)
    if code < 0x10000:
        return f"\\u{code:04x}"
    return f"\\U{code:08x}"


def yaml(value: Any) -> str:
    """A value of a source as YAML on one line."""
    if isinstance(value, str):
        return quoted(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{quoted(k)}: {yaml(v)}" for k, v in value.items()) + "}"
    if is_list(value):
        return "[" + ", ".join(yaml(item) for item in value) + "]"
    if isinstance(value, float):  # never 1e-05, which YAML takes for a string
        return np.format_float_positional(value, trim="0")
    return str(value)


def yaml_entry(fields: Mapping[str, Any]) -> str:
    """An item of a YAML list, under ``datasets:``; fields that are None are left out."""
    lines = [f"{key}: {yaml(value)}" for key, value in fields.items() if value is not None]
    return "  - " + "\n    ".join(lines) + "\n"


def is_list(value: Any) -> bool:
    """Whether a value is a list of values."""
    return isinstance(value, Sequence) and not isinstance(value, str)


def bash_word(text: str) -> str:
    """A word of bash. Invisible characters are escaped, byte by byte for any locale."""
    if text.isprintable():
        return shlex.quote(text)
    plain = ("\\" + c if c in "'\\" else c for c in text)
    escaped = (
        c if c.isprintable() else "".join(f"\\x{byte:02x}" for byte in c.encode()) for c in plain
    )
    return "$'" + "".join(escaped) + "'"


def bash_array(name: str, lines: Sequence[str]) -> str:
    """An assignment of a bash array; each line holds one or several words of it."""
    return f"{name}=(\n" + "".join(f"  {line}\n" for line in lines) + ")\n"
