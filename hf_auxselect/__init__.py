"""Selects, inside one fine-tuning run, the auxiliary tasks that help a target most.

Names are imported when they are first used, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from hf_auxselect._version import __version__ as __version__

if TYPE_CHECKING:
    from hf_auxselect.callback import TaskSelectionCallback as TaskSelectionCallback
    from hf_auxselect.capture.check import GradientCheckError as GradientCheckError
    from hf_auxselect.capture.check import (
        check_per_example_gradients as check_per_example_gradients,
    )
    from hf_auxselect.capture.examples import capture_gradients as capture_gradients
    from hf_auxselect.capture.hooks import NonFiniteError as NonFiniteError
    from hf_auxselect.capture.module_gradients import (
        UnsupportedModuleError as UnsupportedModuleError,
    )
    from hf_auxselect.capture.scalars import ExampleLoss as ExampleLoss
    from hf_auxselect.capture.scalars import UnsupportedLossError as UnsupportedLossError
    from hf_auxselect.clusters import cluster_tasks as cluster_tasks
    from hf_auxselect.estimators import AbstractEstimator as AbstractEstimator
    from hf_auxselect.estimators import Estimate as Estimate
    from hf_auxselect.estimators import FittedEstimator as FittedEstimator
    from hf_auxselect.estimators import GaussNewton as GaussNewton
    from hf_auxselect.estimators import GradExLogistic as GradExLogistic
    from hf_auxselect.estimators import KernelSurrogate as KernelSurrogate
    from hf_auxselect.estimators import LinearizedTraining as LinearizedTraining
    from hf_auxselect.estimators import RidgeSurrogate as RidgeSurrogate
    from hf_auxselect.layers import LayerSelection as LayerSelection
    from hf_auxselect.layers import score_layers as score_layers
    from hf_auxselect.options import Confirmation as Confirmation
    from hf_auxselect.plan import CostPreview as CostPreview
    from hf_auxselect.report import SelectionReport as SelectionReport
    from hf_auxselect.reselection import Reselection as Reselection
    from hf_auxselect.selectors import AbstractSelector as AbstractSelector
    from hf_auxselect.selectors import BackwardElimination as BackwardElimination
    from hf_auxselect.selectors import BeamSearch as BeamSearch
    from hf_auxselect.selectors import ConstrainedSelection as ConstrainedSelection
    from hf_auxselect.selectors import ExhaustiveSearch as ExhaustiveSearch
    from hf_auxselect.selectors import FixedSelection as FixedSelection
    from hf_auxselect.selectors import ForwardSelection as ForwardSelection
    from hf_auxselect.selectors import GradientCoreset as GradientCoreset
    from hf_auxselect.selectors import MixtureOptimization as MixtureOptimization
    from hf_auxselect.selectors import RandomEnsemble as RandomEnsemble
    from hf_auxselect.selectors import Selection as Selection
    from hf_auxselect.selectors import SelectionProblem as SelectionProblem
    from hf_auxselect.selectors import WorstGroupSelection as WorstGroupSelection
    from hf_auxselect.store.arrays import GradientStore as GradientStore
    from hf_auxselect.store.format import StoreError as StoreError
    from hf_auxselect.tasks import concatenate_tasks as concatenate_tasks


_MODULES = {
    "callback": ("TaskSelectionCallback",),
    "capture.check": ("GradientCheckError", "check_per_example_gradients"),
    "capture.examples": ("capture_gradients",),
    "capture.hooks": ("NonFiniteError", "UnsupportedModuleError"),
    "capture.scalars": ("ExampleLoss", "UnsupportedLossError"),
    "clusters": ("cluster_tasks",),
    "estimators": (
        "AbstractEstimator",
        "Estimate",
        "FittedEstimator",
        "GaussNewton",
        "GradExLogistic",
        "KernelSurrogate",
        "LinearizedTraining",
        "RidgeSurrogate",
    ),
    "layers": ("LayerSelection", "score_layers"),
    "options": ("Confirmation",),
    "plan": ("CostPreview",),
    "report": ("SelectionReport",),
    "reselection": ("Reselection",),
    "selectors": (
        "AbstractSelector",
        "BackwardElimination",
        "BeamSearch",
        "ConstrainedSelection",
        "ExhaustiveSearch",
        "FixedSelection",
        "ForwardSelection",
        "MixtureOptimization",
        "GradientCoreset",
        "RandomEnsemble",
        "Selection",
        "SelectionProblem",
        "WorstGroupSelection",
    ),
    "store.arrays": ("GradientStore",),
    "store.format": ("StoreError",),
    "tasks": ("concatenate_tasks",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted(_MODULE_OF)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
