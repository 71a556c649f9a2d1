"""Names of other packages that begin with an underscore: which we use, and only where."""

import ast
import inspect
import re
import sys
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import pytest
from accelerate.state import GradientState
from packaging.specifiers import SpecifierSet
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter
from transformers import Trainer
from trl import SFTTrainer

import hf_auxselect

PACKAGE = Path(hf_auxselect.__file__).parent


class Private(NamedTuple):
    """A private name of another package.

    ``releases`` says which ones must have it; the package does without it in all others.
    """

    owner: type
    package: str
    releases: str = ""


PRIVATES = {
    "_clip_grad_norm": Private(Trainer, "transformers", ">=5.3"),
    "_created_lr_scheduler": Private(Trainer, "transformers"),
    "_eval_dataloaders": Private(Trainer, "transformers"),
    "_finish_current_push": Private(Trainer, "transformers"),
    "_get_collator_with_removed_columns": Private(Trainer, "transformers"),
    "_get_output_dir": Private(Trainer, "transformers"),
    "_get_train_sampler": Private(Trainer, "transformers"),
    "_load_rng_state": Private(Trainer, "transformers"),
    "_prepare_inputs": Private(Trainer, "transformers"),
    "_remove_unused_columns": Private(Trainer, "transformers"),
    "_set_signature_columns_if_needed": Private(Trainer, "transformers"),
    "_signature_columns": Private(Trainer, "transformers"),
    "_metrics": Private(SFTTrainer, "trl"),
    "_prepare_dataset": Private(SFTTrainer, "trl"),
    "_skip_prepare_dataset": Private(SFTTrainer, "trl", ">=1.7"),
    "_set_sync_gradients": Private(GradientState, "accelerate"),
    "_iterator": Private(DataLoader, "torch"),
    "_shutdown_workers": Private(_MultiProcessingDataLoaderIter, "torch"),
    "_last_lr": Private(LRScheduler, "torch"),
}
OF_PYTHON = {"_getframe"}  # sys._getframe

# Outside of `trainer/`, by file, and why.
ALLOWED = {
    "script.py": {"_verify_again"},  # of our callback; no option of the public class
    "zero.py": {"_hp_mapping", "_z3_optimizer"},  # of DeepSpeed, which has no others for all of it
    "capture/memory.py": {"_C", "_are_functorch_transforms_active", "_cdata"},  # torch has no other
}


def is_private(name):
    return re.fullmatch(r"_[A-Za-z]\w*", name) is not None


def attributes_of_others(tree):
    """Private attributes of anything but ``self`` and ``cls``, and of the module's own classes."""
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    inner = [node for owner in classes for node in ast.walk(owner)]
    own = {node.name for node in inner if isinstance(node, ast.FunctionDef)}
    own |= {
        getattr(target, "attr", getattr(target, "id", ""))
        for node in inner
        if isinstance(node, ast.Assign | ast.AnnAssign)
        for target in getattr(node, "targets", [getattr(node, "target", None)])
        if not isinstance(target, ast.Attribute) or ast.unparse(target.value) == "self"
    }
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and is_private(node.attr)
        and node.attr not in own
        and ast.unparse(node.value) not in ("self", "cls")
    }


def private_strings(tree):
    """Private names that are looked up by a string, as with ``getattr``."""
    return {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and is_private(node.value)
        and not node.value.startswith("_auxselect")
    }


def is_there(private, name):
    """Whether a class has the attribute, or its methods assign it."""
    if hasattr(private.owner, name):
        return True
    return any(
        f"self.{name}" in inspect.getsource(base)
        for base in private.owner.__mro__
        if base.__module__.partition(".")[0] == private.package
    )


def test_the_installed_releases_have_the_privates_that_we_use():
    missing = {
        f"{private.package} {version(private.package)}: {private.owner.__name__}.{name}"
        for name, private in PRIVATES.items()
        if version(private.package) in SpecifierSet(private.releases, prereleases=True)
        and not is_there(private, name)
    }
    assert not missing
    assert all(hasattr(sys, name) for name in OF_PYTHON)


def test_a_private_that_is_gone_is_found_missing():
    assert not is_there(PRIVATES["_prepare_inputs"], "_prepare_nothing")


def test_the_list_is_what_the_trainer_package_uses():
    used = set()
    for path in (PACKAGE / "trainer").glob("*.py"):
        tree = ast.parse(path.read_text())
        used |= attributes_of_others(tree) | private_strings(tree)
    assert used == set(PRIVATES) | OF_PYTHON


@pytest.mark.parametrize(
    "path",
    [path for path in sorted(PACKAGE.rglob("*.py")) if path.parent.name != "trainer"],
    ids=lambda path: path.relative_to(PACKAGE).as_posix(),
)
def test_no_other_module_uses_privates_of_others(path):
    allowed = ALLOWED.get(path.relative_to(PACKAGE).as_posix(), set())
    assert attributes_of_others(ast.parse(path.read_text())) <= allowed
