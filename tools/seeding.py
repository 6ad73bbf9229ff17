"""Every test starts from the same random numbers, whichever tests a worker ran before it.

A conftest.py imports the two hooks. Networks with random weights that no test seeds are then the same in every run: a
test that one draw in a thousand fails would otherwise fail somewhere in a long suite every other day.
"""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch


def seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    seed()  # before the fixtures that the test brings along


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call() -> None:
    seed()  # and again, because a fixture that an earlier test brought along draws nothing now
