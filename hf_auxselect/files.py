"""The files of a run: written whole or not at all, and read as untrusted input.

JSON and safetensors only, which cannot run code. JSON is checked here rather than by pydantic: that
refuses ``typing.TypedDict`` before Python 3.12, accepts NaN unless each record is configured, and
is no dependency of the oldest transformers supported.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints, is_typeddict

JsonDict = dict[str, Any]
T = TypeVar("T")

_LARGEST = 2**63
"""Typed numbers must be smaller, as the arrays that they become."""


def write_atomically(path: str | Path, content: bytes | str | Iterator[bytes | memoryview]) -> None:
    """Write a file under a temporary name and rename it: it appears whole or not at all.

    An iterator's items are written one after another, so that they need not fit into memory.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            if isinstance(content, str):
                content = content.encode()
            file.writelines(iter([content]) if isinstance(content, bytes) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def to_json(content: Mapping[str, object]) -> str:
    """Render a JSON file of this package: readable, sorted as given, never NaN."""
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def read_json(path: Path, kind: type[T]) -> T:
    """A JSON file that holds a dataclass or a TypedDict.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or holds something else; names it.
    """
    content = path.read_bytes()
    try:
        return _conform(json.loads(content), kind, "it")
    except (ValueError, RecursionError) as error:  # as those of decoding are
        raise ValueError(f"{path}: damaged ({error}).") from error


def _conform(value: Any, kind: Any, where: str) -> Any:
    """A JSON value as an object of a type, checked all the way down.

    Known are dataclasses (no unknown fields), TypedDicts (further keys are left alone), lists,
    tuples of one type, dicts, optional and plain values; numbers must be finite.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{where} is {_shortened(value)}, expected a finite number")
        if isinstance(value, dict):
            return _conform(value, dict[str, Any], where)
        return _conform(value, list[Any], where) if isinstance(value, list) else value
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (kind,) = (argument for argument in arguments if argument is not type(None))
        return _conform(value, kind, where)
    if dataclasses.is_dataclass(kind) or is_typeddict(kind):
        return _conform_record(value, kind, where)
    if origin in (list, tuple) and isinstance(value, list):
        items = (_conform(item, arguments[0], f"{where}[{i}]") for i, item in enumerate(value))
        return origin(items)
    if (origin or kind) is dict and isinstance(value, dict):
        of_values = arguments[1] if arguments else Any
        return {key: _conform(item, of_values, f"{where}[{key!r}]") for key, item in value.items()}
    plain = (int, float) if kind is float else kind
    is_plain = origin is None and isinstance(value, plain)
    if not is_plain or (isinstance(value, bool) and kind is not bool):
        name = getattr(origin or kind, "__name__", kind)
        raise ValueError(f"{where} is {_shortened(value)}, expected {name}")
    if kind in (int, float) and not abs(value) < _LARGEST:
        raise ValueError(
            f"{where} is {_shortened(value)}, expected a finite number smaller than 2**63"
        )
    return value


def _conform_record(value: Any, kind: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{where} is {_shortened(value)}, expected an object")
    hints = get_type_hints(kind)
    if dataclasses.is_dataclass(kind):
        fields = {f.name: f for f in dataclasses.fields(kind)}
        required = {
            name
            for name, f in fields.items()
            if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        }
        unknown = sorted(value.keys() - fields.keys())
        if unknown:
            raise ValueError(f"{where} has the unknown field {unknown[0]!r}")
    else:
        required = set(kind.__required_keys__)
    missing = sorted(required - value.keys())
    if missing:
        raise ValueError(f"{where} has no {missing[0]!r}")
    known = {
        name: _conform(item, hints[name], f"{where}[{name!r}]") if name in hints else item
        for name, item in value.items()
    }
    return kind(**known)


def _shortened(value: Any) -> str:
    text = json.dumps(value)[:41]
    return text if len(text) <= 40 else text[:37] + "..."
