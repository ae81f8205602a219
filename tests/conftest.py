"""Set-up for all tests: one seed, two threads, Triton's interpreter where there is no GPU."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    # read by triton when a kernel is defined, so before any fastlatent.kernels module is imported
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def one_thread(_threads):
    """For batches so small that they only wait for a second thread, and for the last bits."""
    torch.set_num_threads(1)
