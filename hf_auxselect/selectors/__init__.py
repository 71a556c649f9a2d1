"""Selectors: choose a subset or mixture of tasks, given only a way to estimate its loss."""

from hf_auxselect.selectors.base import AbstractSelector as AbstractSelector
from hf_auxselect.selectors.base import BackwardElimination as BackwardElimination
from hf_auxselect.selectors.base import ExhaustiveSearch as ExhaustiveSearch
from hf_auxselect.selectors.base import FixedSelection as FixedSelection
from hf_auxselect.selectors.base import ForwardSelection as ForwardSelection
from hf_auxselect.selectors.base import RandomEnsemble as RandomEnsemble
from hf_auxselect.selectors.base import Selection as Selection
