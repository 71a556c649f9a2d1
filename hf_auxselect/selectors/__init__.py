"""Selectors: choose a subset or mixture of tasks, given estimates of the loss that each leads to.

A selector is a frozen dataclass whose fields are its options; ``select(problem)`` returns a
:class:`Selection`.
"""

from hf_auxselect.selectors.backward_elimination import BackwardElimination as BackwardElimination
from hf_auxselect.selectors.base import AbstractSelector as AbstractSelector
from hf_auxselect.selectors.base import DifferenceFn as DifferenceFn
from hf_auxselect.selectors.base import EstimateFn as EstimateFn
from hf_auxselect.selectors.base import Selection as Selection
from hf_auxselect.selectors.base import SelectionProblem as SelectionProblem
from hf_auxselect.selectors.base import Step as Step
from hf_auxselect.selectors.beam_search import BeamSearch as BeamSearch
from hf_auxselect.selectors.constrained_selection import (
    ConstrainedSelection as ConstrainedSelection,
)
from hf_auxselect.selectors.exhaustive_search import ExhaustiveSearch as ExhaustiveSearch
from hf_auxselect.selectors.fixed_selection import FixedSelection as FixedSelection
from hf_auxselect.selectors.forward_selection import ForwardSelection as ForwardSelection
from hf_auxselect.selectors.gradient_coreset import GradientCoreset as GradientCoreset
from hf_auxselect.selectors.mixture_optimization import MixtureOptimization as MixtureOptimization
from hf_auxselect.selectors.problem import selection_problem as selection_problem
from hf_auxselect.selectors.random_ensemble import RandomEnsemble as RandomEnsemble
from hf_auxselect.selectors.random_ensemble import random_alternatives as random_alternatives
from hf_auxselect.selectors.registry import SELECTORS as SELECTORS
from hf_auxselect.selectors.worst_group_selection import (
    WorstGroupSelection as WorstGroupSelection,
)
