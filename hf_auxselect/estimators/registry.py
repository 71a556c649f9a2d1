"""The estimators of this package by class name, to read them back from files and command lines."""

from hf_auxselect.estimators.base import AbstractEstimator
from hf_auxselect.estimators.gauss_newton import GaussNewton
from hf_auxselect.estimators.linearized import LinearizedTraining
from hf_auxselect.estimators.logistic import GradExLogistic
from hf_auxselect.estimators.surrogates import KernelSurrogate, RidgeSurrogate

ESTIMATORS: dict[str, type[AbstractEstimator]] = {
    kind.__name__: kind
    for kind in (LinearizedTraining, GaussNewton, GradExLogistic, RidgeSurrogate, KernelSurrogate)
}
"""Each public estimator by the name of its class."""

RENAMED_OPTIONS = {"look_ahead": "probes"}
"""Options of estimators by their names in reports of version 0.1, and their names now."""
