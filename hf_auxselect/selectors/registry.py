"""The selectors of this package by name."""

from __future__ import annotations

from hf_auxselect.selectors.backward_elimination import BackwardElimination
from hf_auxselect.selectors.base import AbstractSelector
from hf_auxselect.selectors.beam_search import BeamSearch
from hf_auxselect.selectors.constrained_selection import ConstrainedSelection
from hf_auxselect.selectors.exhaustive_search import ExhaustiveSearch
from hf_auxselect.selectors.fixed_selection import FixedSelection
from hf_auxselect.selectors.forward_selection import ForwardSelection
from hf_auxselect.selectors.gradient_coreset import GradientCoreset
from hf_auxselect.selectors.mixture_optimization import MixtureOptimization
from hf_auxselect.selectors.random_ensemble import RandomEnsemble
from hf_auxselect.selectors.worst_group_selection import WorstGroupSelection

SELECTORS: dict[str, type[AbstractSelector]] = {
    kind.__name__: kind
    for kind in (
        ForwardSelection,
        BackwardElimination,
        BeamSearch,
        RandomEnsemble,
        ExhaustiveSearch,
        MixtureOptimization,
        ConstrainedSelection,
        WorstGroupSelection,
        GradientCoreset,
        FixedSelection,
    )
}
"""Selectors by class name, to read them back from files and command lines."""
