"""The versions that are promised in pyproject.toml are those that `make test-versions` runs."""

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BOUNDS = {
    requirement.name: requirement.specifier
    for requirement in map(
        Requirement, PROJECT["dependencies"] + PROJECT["optional-dependencies"]["trl"]
    )
}


def pins(name):
    """Package -> version of a set of constraints."""
    lines = (ROOT / "tests" / "versions" / f"{name}.txt").read_text().splitlines()
    requirements = [Requirement(text) for line in lines if (text := line.partition("#")[0].strip())]
    return {r.name: next(iter(r.specifier)) for r in requirements}


@pytest.mark.parametrize("name", ["oldest", "newest"])
def test_a_set_pins_every_dependency(name):
    versions = pins(name)
    assert set(BOUNDS) <= set(versions)
    assert {pin.operator for pin in versions.values()} == {"=="}
    assert all(BOUNDS[package].contains(versions[package].version) for package in BOUNDS)


@pytest.mark.parametrize("package", BOUNDS)
def test_the_lower_bound_is_the_oldest_that_is_tested(package):
    (bound,) = BOUNDS[package]
    assert bound.operator == ">="
    assert Version(bound.version) == Version(pins("oldest")[package].version)


def test_the_newest_is_no_older_than_the_oldest():
    oldest, newest = pins("oldest"), pins("newest")
    assert all(Version(newest[p].version) > Version(oldest[p].version) for p in BOUNDS)
