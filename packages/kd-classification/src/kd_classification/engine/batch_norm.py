"""Batch normalisation of a frozen network: which statistics its forward pass uses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """The batch-norm layers (timm's and the synchronised ones are subclasses of torch's)."""
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


@contextmanager
def batch_statistics(model: nn.Module) -> Iterator[None]:
    """Inside the block batch norm uses the statistics of the batch; dropout and drop-path stay as they were.

    The running buffers are neither used nor moved: a layer that tracks nothing does not touch them. Under data
    parallelism the statistics are those of each device's share (those of the whole batch with nn.SyncBatchNorm).
    """
    layers = batch_norms(model)
    before = [(layer.training, layer.track_running_stats) for layer in layers]
    try:
        for layer in layers:
            layer.training, layer.track_running_stats = True, False
        yield
    finally:
        for layer, (training, tracking) in zip(layers, before):
            layer.training, layer.track_running_stats = training, tracking
