"""What every test of the package starts with."""

import pytest

from seeding import pytest_runtest_call, pytest_runtest_setup  # noqa: F401


@pytest.fixture(autouse=True)
def no_accelerator_is_left():
    """Accelerate keeps the state of the first accelerator of a process: its precision would be that of later runs."""
    yield
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def cache(request, tmp_path_factory, monkeypatch):
    """One cache of stages for a test module: its teacher is trained once."""
    name = request.module.__name__.rpartition(".")[2]
    monkeypatch.setenv("KD_CACHE", str(tmp_path_factory.getbasetemp() / f"{name}_cache"))
