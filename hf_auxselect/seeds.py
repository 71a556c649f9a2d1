"""Named streams of random words: every random choice of the package is a pure function of a key."""

from __future__ import annotations

import hashlib

import numpy as np


def random_words(count: int, *key: object) -> np.ndarray:
    """uint64 [count]: uniform words that depend on ``key`` alone.

    They are the raw output of the Philox counter generator, which NumPy promises never to change
    (its distributions may): the same key gives the same words on every platform and device, at
    every position of a resumed run, and leaves the global generators untouched.
    """
    digest = hashlib.sha256("/".join(map(repr, key)).encode()).digest()
    return np.random.Philox(key=int.from_bytes(digest[:16], "little")).random_raw(count)


def random_permutation(count: int, *key: object) -> np.ndarray:
    """int64 [count]: a uniform permutation of 0 .. count - 1 that depends on ``key`` alone."""
    return np.argsort(random_words(count, *key), kind="stable")
