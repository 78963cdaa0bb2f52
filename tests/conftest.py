"""What every test shares. The environment is set here, before anything imports triton or transformers."""

from __future__ import annotations

import gc
import os
import random
import shutil
import tempfile

# No test reaches a network, or reads or writes the caches of whoever runs it.
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="sparsify-tests-")
os.environ["XDG_CACHE_HOME"] = os.environ["HF_HOME"]  # where `sparsify tune` keeps what it measured
os.environ["MPLBACKEND"] = "Agg"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import pytest
import torch
from hypothesis import settings

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    # Read by triton when it is imported: kernels then run on the CPU, in its interpreter.
    os.environ["TRITON_INTERPRET"] = "1"

# The same examples on every machine and in every run; the time limit of a test is pytest-timeout's matter.
settings.register_profile("sparsify", derandomize=True, deadline=None, max_examples=50)
settings.load_profile("sparsify")

# Tests run side by side, one process a core.
torch.set_num_threads(1)


def pytest_unconfigure() -> None:
    gc.unfreeze()
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)


def pytest_collection_finish() -> None:
    """What imports have made stays: the collections of garbage, one in every training, need not look through it."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not HAS_GPU:
        skip = pytest.mark.skip(reason="needs a CUDA GPU")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random state, whichever tests ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
