"""Saved networks on a data set: confusion matrices, and pictures for the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.dataset import pseudo_collate
from torch import Tensor, nn
from torch.utils.data import DataLoader

from kd_segmentation import metrics, pictures
from kd_segmentation.engine.mechanisms import Complements, TokenSimilarity
from kd_segmentation.integrations.hooks import rgb
from kd_segmentation.integrations.networks import open_saved
from kd_segmentation.integrations.stage import check_dataset, quiet_mmengine


def open_networks(artefacts: Mapping[str, Path]) -> dict[str, nn.Module]:
    """The student and every teacher of a run, in eval mode, on the accelerator where there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    roles = [name for name in artefacts if name == "student" or name == "teacher" or name.startswith("teacher_")]
    with quiet_mmengine():
        return {name: open_saved(artefacts[name], device) for name in sorted(roles)}


def parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@torch.no_grad()
def measure(
    networks: Mapping[str, nn.Module],
    config: Any,
    section: Mapping[str, Any],
    field: str,
    observers: Sequence[Complements | TokenSimilarity] = (),
) -> tuple[dict[str, Tensor], Sequence[str]]:
    """Confusion matrix of each network on a data set, and the names of its classes; observers look on."""
    with quiet_mmengine(), ExitStack() as stack:
        for observer in observers:
            stack.enter_context(observer.watching())
        data = check_dataset({**section, "test_mode": True}, field)
        names = data.metainfo["classes"]
        counts = {role: torch.zeros(len(names), len(names), dtype=torch.int64) for role in networks}
        size = int(config.test_dataloader.get("batch_size", 1))
        workers = int(config.test_dataloader.get("num_workers", 0))
        for batch in DataLoader(data, batch_size=size, num_workers=workers, collate_fn=pseudo_collate):
            samples = {role: network.test_step(_copied(batch)) for role, network in networks.items()}
            for role, found in samples.items():
                for sample in found:
                    labels = sample.pred_sem_seg.data.cpu(), sample.gt_sem_seg.data.cpu()
                    counts[role] += metrics.confusion(*labels, len(names))
            for observer in observers:
                observer.add(samples)
    return counts, names


def _copied(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Data samples are written into by a network; each gets its own."""
    return {"inputs": list(batch["inputs"]), "data_samples": [sample.clone() for sample in batch["data_samples"]]}


@torch.no_grad()
def rows(
    networks: Mapping[str, nn.Module], config: Any, section: Mapping[str, Any], field: str, count: int
) -> list[dict[str, Any]]:
    """Rows of pictures, evenly spread over the data set."""
    found = []
    with quiet_mmengine():
        data = check_dataset({**section, "test_mode": True}, field)
        palette = data.metainfo["palette"]
        order = ["student", *(role for role in networks if role != "student")]
        for index in np.unique(np.linspace(0, len(data) - 1, min(count, len(data))).astype(int)) if count else ():
            batch = pseudo_collate([data[int(index)]])
            samples = {role: networks[role].test_step(_copied(batch))[0] for role in order}
            first = samples["student"]
            truth = first.gt_sem_seg.data[0].cpu().numpy()
            labels = {role: samples[role].pred_sem_seg.data[0].cpu().numpy() for role in reversed(order)}
            image = rgb(batch["inputs"][0], networks["student"].data_preprocessor, first.ori_shape)
            where = "" if field.startswith("test_dataloader") else f" ({field.removeprefix('domains.')})"
            caption = f"{Path(first.img_path).stem}{where}"
            found.append({"caption": caption, "images": pictures.row(image, truth, labels, palette)})
    return found
