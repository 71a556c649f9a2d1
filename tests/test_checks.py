"""Checks of numbers."""

import numpy as np
import pytest

from hf_auxselect.checks import is_count, is_number, require_count


@pytest.mark.parametrize(
    ("value", "count", "number"),
    [
        (2, True, True),
        (1, False, True),
        (2.0, False, True),
        (True, False, False),
        ("2", False, False),
        (None, False, False),
        (float("nan"), False, False),
        (float("inf"), False, False),
        (np.int64(2), False, False),
        (np.float64(2), False, True),
        (np.array([2, 3]), False, False),
    ],
)
def test_what_counts_as_a_number(value, count, number):
    assert is_count(value, 2) == count
    assert is_number(value) == number


def test_infinity_may_be_allowed():
    assert is_number(float("-inf"), finite=False)
    assert not is_number(float("nan"), finite=False)


def test_the_error_says_what_is_expected():
    require_count("n", None, 1, optional=True)
    with pytest.raises(ValueError, match=r"^n must be an int of at least 1, or None; got 0\.5\.$"):
        require_count("n", 0.5, 1, optional=True)
    with pytest.raises(ValueError, match=r"^n must be an int of at least 1, got None\.$"):
        require_count("n", None, 1)
