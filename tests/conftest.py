"""Fixtures that several test files share."""

from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def root() -> Path:
    """The project's root folder."""
    return ROOT


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Real data and golden vectors kept beside the project; tests that need them skip without."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("needs ../shared (real data and golden vectors)")
    return folder


@pytest.fixture(scope="session")
def tokenizer_dir() -> Path:
    """The folder of the tokenizer that ships with the project."""
    return ROOT / "model" / "minimind_tokenizer"


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny tensors gain nothing from threads, and waiting threads cost much on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
