"""Saved networks on a data set: AP by centre distance, also as a metric of mmengine's loops, and pictures."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmdet3d.registry import METRICS
from mmengine.dataset import pseudo_collate
from mmengine.evaluator import BaseMetric
from torch import nn
from torch.utils.data import DataLoader

from kd_detection3d import metrics, pictures
from kd_detection3d.engine.batch import DetectionBatch
from kd_detection3d.integrations.detector import predict
from kd_detection3d.integrations.networks import open_saved
from kd_detection3d.integrations.stage import check_dataset, quiet_mmengine
from kd_detection3d.metrics import Frame


def open_networks(artefacts: Mapping[str, Path]) -> dict[str, nn.Module]:
    """The student and every teacher of a run, in eval mode, on the accelerator where there is one."""
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    roles = [name for name in artefacts if name == "student" or name == "teacher" or name.startswith("teacher_")]
    with quiet_mmengine(), redirect_stdout(io.StringIO()):  # mmengine prints the path of what it loads
        return {name: open_saved(artefacts[name], device) for name in sorted(roles)}


def parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def frame_of(boxes: Any, labels: Any, scores: Any = None, limits: Sequence[float] | None = None) -> Frame:
    """A Frame of mmdet3d's boxes; with `limits`, x0 y0 z0 x1 y1 z1, those whose centre is inside on the ground."""
    values = boxes.tensor[:, :7].detach().cpu().double().numpy()
    labels = np.asarray(labels.cpu() if isinstance(labels, torch.Tensor) else labels)
    ones = np.ones(len(labels))
    scores = ones if scores is None else scores.detach().cpu().double().numpy()
    if limits is not None:
        low, high = np.array(limits[:2]), np.array(limits[3:5])
        kept = ((values[:, :2] >= low) & (values[:, :2] <= high)).all(1)
        values, labels, scores = values[kept], labels[kept], scores[kept]
    return Frame(values, labels, scores)


def predicted(sample: Any, limits: Sequence[float] | None = None) -> Frame:
    found = sample.pred_instances_3d
    return frame_of(found.bboxes_3d, found.labels_3d, found.scores_3d, limits)


def truth_of(sample: Any, limits: Sequence[float] | None = None) -> Frame:
    """The true boxes of a test sample, as the data set annotates it."""
    annotated = sample.eval_ann_info
    return frame_of(annotated["gt_bboxes_3d"], annotated["gt_labels_3d"], None, limits)


@METRICS.register_module()
class CenterDistanceMetric(BaseMetric):
    """`metrics.detection_scores` in mmengine's validation and test loops, for any data set with 3D boxes.

    point_cloud_range: only boxes whose centre is inside count; None: all.
    """

    default_prefix = ""

    def __init__(self, point_cloud_range: Sequence[float] | None = None, **arguments: Any):
        super().__init__(**arguments)
        self.limits = point_cloud_range

    def process(self, data_batch: Any, data_samples: Sequence[Mapping[str, Any]]) -> None:
        for sample in data_samples:
            found, annotated = sample["pred_instances_3d"], sample["eval_ann_info"]
            guess = frame_of(found["bboxes_3d"], found["labels_3d"], found["scores_3d"], self.limits)
            self.results.append(
                (guess, frame_of(annotated["gt_bboxes_3d"], annotated["gt_labels_3d"], None, self.limits))
            )

    def compute_metrics(self, results: list[tuple[Frame, Frame]]) -> dict[str, float]:
        guesses, truths = [item[0] for item in results], [item[1] for item in results]
        return metrics.detection_scores(guesses, truths, self.dataset_meta["classes"])


def batches(config: Any, section: Mapping[str, Any], field: str) -> tuple[Any, Iterator[Any]]:
    """The test data set and its collated batches."""
    data = check_dataset({**section, "test_mode": True}, field)
    size = int(config.test_dataloader.get("batch_size", 1))
    workers = int(config.test_dataloader.get("num_workers", 0))
    return data, iter(DataLoader(data, batch_size=size, num_workers=workers, collate_fn=pseudo_collate))


def measure(
    networks: Mapping[str, nn.Module],
    config: Any,
    section: Mapping[str, Any],
    field: str,
    limits: Sequence[float] | None,
) -> dict[str, dict[str, float]]:
    """`metrics.detection_scores` of each network on a data set, within `limits`."""
    with quiet_mmengine():
        data, loader = batches(config, section, field)
        truths: list[Frame] = []
        guesses: dict[str, list[Frame]] = {role: [] for role in networks}
        for batch in loader:
            truths.extend(truth_of(sample, limits) for sample in batch["data_samples"])
            for role, network in networks.items():
                guesses[role].extend(predicted(sample, limits) for sample in predict(network, batch))
    names = data.metainfo["classes"]
    return {role: metrics.detection_scores(found, truths, names) for role, found in guesses.items()}


def annotated_frames(
    config: Any, section: Mapping[str, Any], most: int
) -> Iterator[tuple[DetectionBatch, list[torch.Tensor]]]:
    """Batches of the first frames of a data set, raw, with their true boxes as (N, 5): x, y, dx, dy, heading."""
    with quiet_mmengine():
        _, loader = batches(config, section, "test_dataloader.dataset")
        seen = 0
        for batch in loader:
            samples = batch["data_samples"]
            boxes = [sample.eval_ann_info["gt_bboxes_3d"].bev.float() for sample in samples]
            yield DetectionBatch(batch["inputs"], samples), boxes
            seen += len(samples)
            if seen >= most:
                return


def clutter(
    network: nn.Module, config: Any, section: Mapping[str, Any], limits: Sequence[float], most: int
) -> dict[str, float]:
    """Detections a frame on the painted patches of rendered scenes; nothing for other data."""
    with quiet_mmengine():
        data = check_dataset({**section, "test_mode": True}, "test_dataloader.dataset")
        count = min(most, len(data))
        paint = [data.get_data_info(index).get("paint") for index in range(count)]
        if any(item is None for item in paint):
            return {}
        found = 0
        size = int(config.test_dataloader.get("batch_size", 1))
        for start in range(0, count, size):
            batch = pseudo_collate([data[index] for index in range(start, min(start + size, count))])
            for place, sample in enumerate(predict(network, batch)):
                truth = truth_of(batch["data_samples"][place], limits)
                found += metrics.on_clutter(predicted(sample, limits), truth, np.asarray(paint[start + place]))
    return {"clutter_detections": found / max(count, 1)}


def rows(
    networks: Mapping[str, nn.Module],
    config: Any,
    section: Mapping[str, Any],
    field: str,
    limits: Sequence[float],
    count: int,
) -> list[dict[str, Any]]:
    """Rows of pictures, evenly spread over the data set."""
    found = []
    with quiet_mmengine():
        data = check_dataset({**section, "test_mode": True}, field)
        order = [*(role for role in networks if role != "student"), "student"]
        for index in np.unique(np.linspace(0, len(data) - 1, min(count, len(data))).astype(int)) if count else ():
            batch = pseudo_collate([data[int(index)]])
            frames = {role: predicted(predict(networks[role], batch)[0], limits) for role in order if role in networks}
            truth = truth_of(batch["data_samples"][0], limits)
            points = batch["inputs"].get("points")
            images = batch["inputs"].get("img")
            camera = None if images is None else images[0].reshape(-1, *images[0].shape[-3:])[0]
            picture = None if camera is None else camera.permute(1, 2, 0).numpy()[..., ::-1].clip(0, 255)
            area = (limits[0], limits[1], limits[3], limits[4])
            if picture is not None:
                picture = np.ascontiguousarray(picture.astype(np.uint8))
                cameras = batch["data_samples"][0].metainfo.get("lidar2img")
                if cameras is not None and "student" in frames:
                    view = np.asarray(cameras[0], dtype=float)
                    picture = pictures.camera_view(picture, view, truth, frames["student"])
            shown = pictures.row(
                area,
                picture,
                None if points is None else points[0].numpy(),
                truth,
                frames,
            )
            found.append({"caption": f"frame {int(index)}", "images": shown})
    return found
