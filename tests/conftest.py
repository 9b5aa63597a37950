"""Shared by all tests: the project's modules on the path, and where real data is, if anywhere."""

import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


@pytest.fixture(scope="session")
def omniglot_root() -> Path:
    """The folder that holds the real Omniglot; tests of it are skipped where there is none."""
    root = Path(os.environ.get("MAML_DATA_ROOT") or ROOT / "data")
    if not any(
        (root / "omniglot-py" / name).exists() for name in ("images_background.zip", "images_background")
    ):
        pytest.skip("no Omniglot: set MAML_DATA_ROOT to the folder that holds omniglot-py/")
    return root


@pytest.fixture(autouse=True)
def _threads_as_before():
    """A run of the command line may set the number of threads; the next test has its own again."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
