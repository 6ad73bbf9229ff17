"""The toy domain package of these tests, found like an installed one."""

from pathlib import Path

import pytest
import torch

from seeding import pytest_runtest_call, pytest_runtest_setup  # noqa: F401

TOY_PACKAGE = Path(__file__).with_name("toy_package")


@pytest.fixture
def toy(monkeypatch, tmp_path):
    """Installs the methods `toy` and `plain` (and `ghost`, whose module is missing) and works in an empty folder."""
    monkeypatch.syspath_prepend(TOY_PACKAGE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KD_CACHE", str(tmp_path / "cache"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are tiny: threads would only wait for each other
    yield tmp_path
    torch.set_num_threads(threads)
