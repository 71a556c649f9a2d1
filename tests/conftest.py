import gc
import os

# No test may reach for a hub, and tokenizers' threads do not survive a fork of data workers.
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", TRL_TELEMETRY="0")

from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from hypothesis import settings

settings.register_profile("default", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("default")

# Modules most of whose tests train several runs, start processes or run code of the documentation.
# Those that take longest come first, so that no process is left with them when others have ended.
SLOW_MODULES = (
    "trainer/test_two_processes.py",
    "trainer/test_sharded.py",
    "test_recipe_launch.py",
    "test_launch.py",
    "test_existing_script.py",
    "test_notebook.py",
    "test_resume.py",
    "test_callback.py",
    "test_classification.py",
    "test_docs.py",
    "test_recipes.py",
    "test_comparison.py",
    "test_instruction.py",
    "test_chain_of_thought.py",
    "trainer/test_options.py",
    "trainer/test_batches.py",
    "trainer/test_hub.py",
    "trainer/test_trial_runs.py",
    "test_reselection.py",
    "capture/test_optimizer_state.py",
    "estimators/test_calibration.py",
    "test_faults.py",
    "test_fuzz.py",
    "test_packing.py",
)


def pytest_collection_modifyitems(items):
    slow = {Path(__file__).parent / name: i for i, name in enumerate(SLOW_MODULES)}
    for item in items:
        if item.path in slow:
            item.add_marker("slow")
    # Only --no-loadscope-reorder keeps this order; else scopes with the most tests come first.
    items.sort(key=lambda item: slow.get(item.path, len(slow)))


def pytest_collection_finish():
    """Garbage collection passes over what is imported: Trainer collects twice in every run."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _same_random_state():
    """Every test starts from the same global random state, whatever ran before it."""
    torch.default_generator.manual_seed(0)  # torch.manual_seed formats the stack for each device
    torch.set_num_threads(1)  # tests run side by side


@pytest.fixture(autouse=True)
def _same_environment():
    """Training arguments write to the environment: one compiled run would compile all that follow."""
    with patch.dict(os.environ):
        yield


@pytest.fixture(autouse=True)
def _no_rendering(request):
    """Rendering figures takes a third of a tiny run; tests of what shows them, and scripts, do it."""
    if "report" in request.path.parent.parts or request.path.name == "test_tracking.py":
        yield
        return

    def savefig(figure, file, **options):
        file.write(b"\x89PNG")

    with patch("matplotlib.figure.Figure.savefig", savefig):
        yield


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk():
    """No test cuts the power."""
    with patch("os.fsync"):
        yield


@pytest.fixture
def run_dir(tmp_path):
    return tmp_path / "run"


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A checkpoint on disk, as a user would pass with --model."""
    import tiny

    directory = tmp_path_factory.mktemp("model")
    tiny.llama(max_position_embeddings=512).save_pretrained(directory)
    tiny.tokenizer().save_pretrained(directory)
    return str(directory)
