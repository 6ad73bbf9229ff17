"""Shared by the package's tests: one thread, and a teacher cache that only this test session sees."""

import pytest
import torch

from seeding import pytest_runtest_call, pytest_runtest_setup  # noqa: F401


@pytest.fixture(scope="session", autouse=True)
def _session(tmp_path_factory):
    torch.set_num_threads(1)  # several test processes share two cores, and sums keep one order
    patch = pytest.MonkeyPatch()
    patch.setenv("KD_CACHE", str(tmp_path_factory.mktemp("kd-cache")))
    yield
    patch.undo()
