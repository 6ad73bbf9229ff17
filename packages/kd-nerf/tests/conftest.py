"""Every test starts from the same random numbers."""

from seeding import pytest_runtest_call, pytest_runtest_setup  # noqa: F401
