"""What users type for options of estimators and selectors."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import pytest

from hf_auxselect import GaussNewton, KernelSurrogate, RidgeSurrogate
from hf_auxselect.cli.options import UsageError, make_strategy, split_options


@dataclass(frozen=True)
class Options:
    number: int | float = 0
    whole: int | None = None
    flag: bool = False
    text: str | None = None
    choice: Literal["fast", "exact"] = "fast"
    sizes: tuple[float, ...] | None = None
    ceilings: Mapping[str, float] | None = None
    tasks: tuple[str, ...] | Mapping[str, float] = ()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("number=3", 3),
        ("number=0.5", 0.5),
        ("whole=-2", -2),
        ("whole=None", None),
        ("flag=true", True),
        ("flag=False", False),
        ("text=a=b", "a=b"),
        ("text=none", None),
        ("choice=exact", "exact"),
        ("sizes=1e-3, 2", (0.001, 2.0)),
        ("sizes=[1, 2.5]", (1.0, 2.5)),
        ("ceilings=math=1.5,code=2", {"math": 1.5, "code": 2.0}),
        ('ceilings={"a,b": 1}', {"a,b": 1.0}),
        ("tasks=a", ("a",)),
        ("tasks=a,b", ("a", "b")),
        ("tasks=a=1,b=3", {"a": 1.0, "b": 3.0}),
        ('tasks=["x=1"]', ("x=1",)),
    ],
)
def test_texts_become_the_types_of_the_fields(text, value):
    (name,) = options = split_options([text], "--option")
    read = getattr(make_strategy(Options, options, "--option"), name)
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize(
    "text",
    ["number=many", "number=nan", "number=true", "whole=1.0", "flag=1", "flag=", "choice=slow",
     "sizes=a", "sizes=[1, null]", "ceilings=math", 'ceilings={"math": "low"}', "sizes=[1"],
)  # fmt: skip
def test_what_does_not_fit_is_refused(text):
    with pytest.raises(UsageError, match=r"--option .*: expected .*Options has the options number"):
        make_strategy(Options, split_options([text], "--option"), "--option")


def test_values_of_yaml_are_checked_too():
    assert make_strategy(Options, {"whole": 3, "sizes": [1, 2]}, "x") == Options(
        whole=3, sizes=(1.0, 2.0)
    )
    with pytest.raises(UsageError, match="whole=True: expected integer or none"):
        make_strategy(Options, {"whole": True}, "x")


def test_an_estimator_within_one_is_named():
    assert make_strategy(RidgeSurrogate, {"base": "GaussNewton"}, "x").base == GaussNewton()
    with pytest.raises(UsageError, match="base=Newton: expected AbstractEstimator"):
        make_strategy(KernelSurrogate, {"base": "Newton"}, "x")


def test_an_option_is_given_once():
    with pytest.raises(UsageError, match="--option 'a=2': the option 'a' was given before"):
        split_options(["a=1", "a=2"], "--option")
