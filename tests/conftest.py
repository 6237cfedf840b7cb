from __future__ import annotations

import gc
import os

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where tests in nn/ make their tensors, such as cuda")


@pytest.fixture(autouse=True, scope="session")
def device_of_tensors(request: pytest.FixtureRequest) -> None:
    if (device := request.config.getoption("--device")) != "cpu":
        torch.set_default_device(device)
        torch.backends.cudnn.deterministic = True  # exact mode is compared to the last bit


def pytest_collection_finish() -> None:
    """Exclude what is imported by now from garbage collection: a million objects, a twelfth of the tests' time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 1000)


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Tensors here are tiny: on a busy machine a second thread costs more than it brings, four times the time."""
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # of processes that tests start


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
