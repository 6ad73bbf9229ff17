"""Every test starts from the same random numbers, whichever tests a worker ran before it.

A conftest.py imports the two hooks. Networks with random weights that no test seeds are then the same in every run: a
test that one draw in a thousand fails would otherwise fail somewhere in a long suite every other day.
"""

from __future__ import annotations

import pytest
from accelerate.utils import set_seed


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    set_seed(0)  # before the fixtures that the test brings along


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call() -> None:
    set_seed(0)  # and again, because a fixture that an earlier test brought along draws nothing now
