"""Estimators: the target's loss after fine-tuning on any mixture of tasks, without fine-tuning.

An estimator is a frozen dataclass whose fields are its options; ``fit(store)`` prepares it for one
gradient store, and the fitted estimator's ``estimate(weights)`` answers for many mixtures at once.
"""

from hf_auxselect.estimators.base import AbstractEstimator as AbstractEstimator
from hf_auxselect.estimators.base import Estimate as Estimate
from hf_auxselect.estimators.base import FittedEstimator as FittedEstimator
from hf_auxselect.estimators.base import normalize_mixtures as normalize_mixtures
from hf_auxselect.estimators.calibration import FittedCalibrated as FittedCalibrated
from hf_auxselect.estimators.gauss_newton import GaussNewton as GaussNewton
from hf_auxselect.estimators.linearized import LinearizedTraining as LinearizedTraining
from hf_auxselect.estimators.logistic import GradExLogistic as GradExLogistic
from hf_auxselect.estimators.registry import ESTIMATORS as ESTIMATORS
from hf_auxselect.estimators.surrogates import KernelSurrogate as KernelSurrogate
from hf_auxselect.estimators.surrogates import RidgeSurrogate as RidgeSurrogate
