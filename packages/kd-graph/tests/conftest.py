"""Shared by the package's tests: one thread, a teacher cache that only this session sees, and random graphs."""

import os
from pathlib import Path

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


@pytest.fixture(scope="session")
def kd_data() -> Path:
    if "KD_DATA" not in os.environ:
        pytest.skip("KD_DATA is not set: it names the folder with planetoid/Cora, tu/MUTAG and tu/PROTEINS")
    return Path(os.environ["KD_DATA"])


@pytest.fixture
def random_graph():
    """seed -> (z, t, edge_index): float64 logits (8, 4) of student and teacher, an undirected graph on 8 nodes."""

    def make(seed: int, nodes: int = 8, classes: int = 4):
        generator = torch.Generator().manual_seed(seed)
        z, t = torch.randn(2, nodes, classes, generator=generator, dtype=torch.float64)
        pairs = torch.triu_indices(nodes, nodes, 1)
        pairs = pairs[:, torch.rand(pairs.shape[1], generator=generator) < 0.4]
        return z.requires_grad_(), t, torch.cat([pairs, pairs.flip(0)], 1)

    return make
