"""What a distiller of 3D detectors gets in a step, and what it asks of a network.

A network is a detector of mmdet3d: `network.data_preprocessor(data, training)` gives what it reads from a raw batch,
`network.loss(inputs, samples)` its own losses, `network.extract_feat(inputs, metas)` the features that
`network.pts_bbox_head` takes. CenterPoint and the detectors of this package have these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class DetectionBatch:
    """A batch as mmdet3d's loader collates it, before any network's preprocessor.

    inputs: `points`, a list of (P, F), and/or `img`, a list of (views, 3, H, W). samples: Det3DDataSamples with
    `gt_instances_3d` in the augmented LiDAR frame.
    """

    inputs: Mapping[str, Any]
    samples: Sequence[Any]

    def boxes(self) -> list[Tensor]:
        """For each frame (N, 5), float32: x, y, dx, dy, heading of the true boxes."""
        return [sample.gt_instances_3d.bboxes_3d.bev.float() for sample in self.samples]


def prepared(network: nn.Module, batch: DetectionBatch, *, training: bool) -> tuple[Any, Any]:
    """What `network` reads: its own voxels and normalised images. The batch stays as it is."""
    data = {
        "inputs": {name: list(value) for name, value in batch.inputs.items()},
        "data_samples": list(batch.samples),
    }
    found = network.data_preprocessor(data, training)
    return found["inputs"], found["data_samples"]


@torch.no_grad()
def run_frozen(network: nn.Module, batch: DetectionBatch) -> None:
    """Runs a frozen detector up to its head; taps hold what it gives."""
    inputs, samples = prepared(network, batch, training=False)
    features = network.extract_feat(inputs, [sample.metainfo for sample in samples])
    network.pts_bbox_head(features[1] if isinstance(features, tuple) else features)


def task_terms(losses: Mapping[str, Any]) -> dict[str, Tensor]:
    """The losses among what a detector returns, without the prefix `loss_`; lists are summed."""
    return {
        name.replace("loss_", ""): sum(v.mean() for v in value) if isinstance(value, list) else value.mean()
        for name, value in losses.items()
        if "loss" in name
    }
