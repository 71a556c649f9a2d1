import os

# No test may reach for a hub, and tokenizers' threads do not survive a fork of data workers.
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", TRL_TELEMETRY="0")

from unittest.mock import patch

import pytest
import torch
from hypothesis import settings

settings.register_profile("default", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("default")


@pytest.fixture(autouse=True)
def _same_random_state():
    """Every test starts from the same global random state, whatever ran before it."""
    torch.manual_seed(0)
    torch.set_num_threads(1)  # tests run side by side


@pytest.fixture(autouse=True)
def _same_environment():
    """Training arguments write to the environment: one compiled run would compile all that follow."""
    with patch.dict(os.environ):
        yield


@pytest.fixture
def run_dir(tmp_path):
    return tmp_path / "run"
