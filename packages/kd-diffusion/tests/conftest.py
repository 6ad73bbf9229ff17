"""Shared by the package's tests: one thread, a cache of this session's own, and tiny stock pipelines on disk."""

import pytest
import torch

from kd_diffusion import testing
from seeding import pytest_runtest_call, pytest_runtest_setup  # noqa: F401


@pytest.fixture(scope="session", autouse=True)
def _session(tmp_path_factory):
    torch.set_num_threads(1)  # several test processes share two cores, and sums keep one order
    patch = pytest.MonkeyPatch()
    patch.setenv("KD_CACHE", str(tmp_path_factory.mktemp("kd-cache")))
    yield
    patch.undo()


@pytest.fixture(scope="session")
def tiny_unet_folder(tmp_path_factory):
    """Folder of a class-conditional pixel pipeline in EDM's form with random weights: 8x8, one channel, 10 classes."""
    folder = tmp_path_factory.mktemp("tiny") / "unet"
    testing.unet_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_text_folder(tmp_path_factory):
    """Folder of a Stable Diffusion pipeline with random weights: prompts to 16x16 images of one channel."""
    folder = tmp_path_factory.mktemp("tiny") / "text"
    testing.text_pipeline(tmp_path_factory.mktemp("tokenizer")).save_pretrained(folder)
    return folder
