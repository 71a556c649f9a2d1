"""Hashes of rows by their values: to find a row again, in another dataset or in another process."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence, Set
from typing import Any

import numpy as np
import torch

_DEEPEST = 16
"""Levels of an unknown object's attributes that are read; a cycle ends here."""


def digest(*values: Any) -> bytes:
    """A hash of values that depends on what they are, not on what holds them; 16 bytes.

    A list, a tuple, a NumPy array and a tensor of the same shape and numbers are equal, whatever
    their types: integers and whole floats are compared as int64, other floats as float32, in which
    models read them. Mappings are compared by their items, in any order. An image is its pixels;
    one that has not been decoded is its file's bytes, or its path where there are none. The hash is
    the same in every process: no address, hash seed or abbreviated ``repr`` takes part.
    """
    state = hashlib.blake2b(digest_size=16)
    for value in values:
        _update(state, _plain(value, 0))
    return state.digest()


def _plain(value: Any, depth: int) -> Any:
    """A value as None, str, bytes, an array of numbers, a list, or a dict with sorted keys."""
    if value is None or isinstance(value, str | bytes):
        return value
    if isinstance(value, bytearray | memoryview):
        return bytes(value)
    if isinstance(value, bool | int | float | np.ndarray | np.generic):
        return _plain_array(value, depth)
    if isinstance(value, torch.Tensor):
        return _plain_tensor(value, depth)
    if isinstance(value, list | tuple):
        return _plain_list(value, depth)
    if isinstance(value, Mapping):
        if set(value) == {"bytes", "path"}:  # a file of ``datasets`` that has not been decoded
            return value["path"] if value["bytes"] is None else value["bytes"]
        items = sorted((str(key), _plain(item, depth + 1)) for key, item in _items(value))
        return dict(items)
    return _plain_object(value, depth)


def _items(value: Mapping[Any, Any]) -> list[tuple[Any, Any]]:
    return [(key, value[key]) for key in value]


def _plain_array(value: Any, depth: int) -> Any:
    array = np.asarray(value)
    if array.dtype.kind in "biu":
        return array
    if array.dtype.kind == "f":
        return _as_integers(array)
    if array.dtype.kind == "c":
        return _plain([array.real, array.imag], depth + 1)
    if array.dtype.kind in "mM":
        return [str(array.dtype), array.view(np.int64)]
    if array.dtype.names:
        return _plain({name: array[name] for name in array.dtype.names}, depth + 1)
    if array.ndim == 0:
        return repr(value) if array.dtype.kind == "O" else _plain(array.item(), depth)
    return _plain_list(array.tolist() if array.dtype.kind in "SU" else list(array), depth)


def _as_integers(array: np.ndarray) -> np.ndarray:
    """Whole floats as the integers that they are, and others in float32: types do not matter."""
    with np.errstate(all="ignore"):
        if np.isfinite(array).all() and (np.abs(array) < 2**53).all():
            integers = array.astype(np.int64)
            if (integers == array).all():
                return integers
        return array.astype(np.float32)


def _plain_tensor(tensor: torch.Tensor, depth: int) -> Any:
    tensor = tensor.detach()
    if tensor.is_nested:
        return _plain_list(list(tensor.unbind()), depth)
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    if tensor.is_quantized:
        tensor = tensor.dequantize()
    if tensor.is_floating_point() and tensor.dtype != torch.float64:
        tensor = tensor.float()  # NumPy knows no bfloat16
    return _plain_array(tensor.resolve_conj().resolve_neg().cpu().numpy(), depth)


def _plain_list(values: Sequence[Any], depth: int) -> Any:
    """An array if the items are numbers, or arrays of one shape; else a list."""
    kinds = set(map(type, values))
    if kinds <= {int, float, bool}:
        array = np.array(values, None if values else np.int64)
        if array.dtype.kind in "biu":
            return array
        if array.dtype.kind == "f" and float in kinds:
            return _as_integers(array)
        return [repr(value) for value in values]  # integers that no array holds
    plain = [_plain(value, depth + 1) for value in values]
    if all(isinstance(value, np.ndarray) for value in plain) and (
        len({value.shape for value in plain}) == 1
    ):
        stacked = np.stack(plain)
        return _as_integers(stacked) if stacked.dtype.kind == "f" else stacked
    return plain


def _plain_object(value: Any, depth: int) -> Any:
    """What is no plain value: a decoded image, sound or video, or any other object."""
    encoded = getattr(value, "_hf_encoded", None)  # of sounds and videos that datasets decodes
    if encoded is not None:
        return _plain(encoded, depth + 1)
    if isinstance(value, Set):
        return sorted(digest(item).hex() for item in value)
    if hasattr(value, "get_palette") and getattr(value, "mode", None) == "P":
        value = value.convert("RGBA")  # its numbers mean nothing without the palette
    if hasattr(value, "__array__") or hasattr(value, "__array_interface__"):
        return _plain_array(np.asarray(value), depth)
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    if depth >= _DEEPEST:
        return kind
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        return [kind, _plain({name: getattr(value, name) for name in names}, depth + 1)]
    text = repr(value)
    if " at 0x" not in text:
        return [kind, text]
    return [kind, _plain(getattr(value, "__dict__", {}), depth + 1)]


def _update(state: Any, value: Any) -> None:
    """Feed a plain value to a hash; no two different values give the same bytes."""
    if value is None:
        state.update(b"n")
    elif isinstance(value, str | bytes):
        kind = b"s" if isinstance(value, str) else b"b"
        data = value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value
        state.update(b"%s%d:" % (kind, len(data)))
        state.update(data)
    elif isinstance(value, np.ndarray):
        if value.dtype == np.float32:
            value = np.where(np.isnan(value), np.float32("nan"), value + np.float32(0))
        elif value.dtype != np.uint64:
            value = value.astype(np.int64, copy=False)
        elif (value <= np.iinfo(np.int64).max).all():
            value = value.astype(np.int64)
        state.update(b"a%s%s:" % (value.dtype.str.encode(), str(value.shape).encode()))
        state.update(np.ascontiguousarray(value))
    elif isinstance(value, dict):
        state.update(b"d%d:" % len(value))
        for key, item in value.items():
            _update(state, key)
            _update(state, item)
    else:
        state.update(b"l%d:" % len(value))
        for item in value:
            _update(state, item)
