"""DistilledSegmentor: what mmengine's Runner trains, from stock config dicts of teacher and student.

    model = dict(
        type="DistilledSegmentor",
        student=dict(type="EncoderDecoder", ...),
        teachers=dict(teacher=dict(model=dict(type="EncoderDecoder", ...), checkpoint="teacher.pth")),
        distiller=dict(type="TappedDistiller", losses=dict(kl=dict(type="PixelKL", temperature=4.0))),
    )

It validates and predicts as the student does. Its state dict leaves the frozen teachers out.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from mmengine.logging import MessageHub
from mmengine.model import BaseModel
from mmseg.models.data_preprocessor import SegDataPreProcessor
from mmseg.registry import MODELS
from torch import Tensor, nn

from kd_segmentation.engine.batch import SegBatch
from kd_segmentation.integrations.networks import build, build_teacher, num_classes
from kdcore.distiller import Distiller, LossTerms, is_frozen
from kdcore.errors import InputError, did_you_mean

LABELLED = "labelled"


@MODELS.register_module()
class StreamPreprocessor(SegDataPreProcessor):
    """SegDataPreProcessor that also takes several streams, {name: {"inputs": ..., "data_samples": ...}}."""

    def forward(self, data: dict[str, Any], training: bool = False) -> dict[str, Any]:
        if "inputs" in data:
            return super().forward(data, training)
        streams = {name: super(StreamPreprocessor, self).forward(stream, training) for name, stream in data.items()}
        return {
            "inputs": {name: stream["inputs"] for name, stream in streams.items()},
            "data_samples": {name: stream["data_samples"] for name, stream in streams.items()},
        }


class DistilledModel(BaseModel):
    """A BaseModel whose losses are those of a `kdcore.distiller.Distiller`.

    `terms` holds the last step's raw terms for hooks; `scales` multiplies terms by name, for hooks that switch stages.
    """

    def __init__(self, distiller: Distiller, data_preprocessor: Any):
        super().__init__(data_preprocessor=data_preprocessor)
        self.distiller = distiller
        self.terms: LossTerms | None = None
        self.scales: dict[str, float] = {}
        self.register_state_dict_post_hook(_leave_out_frozen)
        self.register_load_state_dict_post_hook(_expect_no_frozen)

    @property
    def student(self) -> nn.Module:
        return self.distiller.student

    def init_weights(self) -> None:
        """Initialises the student, and what else of the distiller learns; the teachers have their weights."""
        for module in self.distiller.children():
            if hasattr(module, "init_weights") and not is_frozen(module):
                module.init_weights()

    def loss(self, inputs: Any, data_samples: Any) -> dict[str, Tensor]:
        """The weighted terms under `loss_<name>`, which mmengine sums."""
        hub, progress = MessageHub.get_current_instance(), self.distiller.progress
        progress.step, progress.steps = hub.get_info("iter", 0), hub.get_info("max_iters", 1)
        terms = LossTerms(
            {
                name: (weight * self.scales.get(name, 1.0), term)
                for name, (weight, term) in self.distiller.loss(batch_of(inputs, data_samples)).items()
            }
        )
        self.terms = terms
        return {f"loss_{name}": weight * term for name, (weight, term) in terms.items() if weight != 0}

    def forward(self, inputs: Any, data_samples: Any = None, mode: str = "tensor") -> Any:
        if mode == "loss":
            return self.loss(inputs, data_samples)
        return self.student(inputs, data_samples, mode=mode)


def _leave_out_frozen(module: DistilledModel, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for skip in module.distiller.frozen_prefixes():
        for name in [name for name in state if name.startswith(f"{prefix}distiller.{skip}")]:
            del state[name]


def _expect_no_frozen(module: DistilledModel, keys: Any) -> None:
    skip = tuple(f"distiller.{prefix}" for prefix in module.distiller.frozen_prefixes())
    if skip:
        keys.missing_keys[:] = [name for name in keys.missing_keys if not name.startswith(skip)]


def batch_of(inputs: Any, data_samples: Any) -> SegBatch:
    """The preprocessed batch of mmseg as a SegBatch; among streams the first is labelled where none is called so."""
    if isinstance(inputs, Tensor):
        return SegBatch(inputs, labels_of(data_samples), samples=list(data_samples or ()))
    names = list(inputs)
    own = LABELLED if LABELLED in inputs else names[0]
    others = tuple(inputs[name] for name in names if name != own)
    samples = data_samples[own]
    return SegBatch(inputs[own], labels_of(samples), others, samples=list(samples or ()))


def labels_of(data_samples: Any) -> Tensor | None:
    """(B, H, W) int64, or None where a sample has no truth."""
    if not data_samples or not all("gt_sem_seg" in sample for sample in data_samples):
        return None
    return torch.stack([sample.gt_sem_seg.data for sample in data_samples]).squeeze(1).long()


@MODELS.register_module()
class DistilledSegmentor(DistilledModel):
    """The student behind a distiller, as mmengine's Runner trains it.

    student: a stock config dict. teachers: name -> dict(model=stock config dict, checkpoint=path), or config=a stock
    config file in the place of model. distiller: a registered Distiller's type and arguments; it is made with
    `student=` and `teachers=` (name -> frozen network). data_preprocessor: the student's own by default.
    same_classes: whether teachers must have the student's number of classes; features can be distilled without.
    Raises InputError for a config that does not fit.
    """

    def __init__(
        self,
        student: Mapping[str, Any],
        teachers: Mapping[str, Mapping[str, Any]] | None = None,
        distiller: Mapping[str, Any] | None = None,
        data_preprocessor: Mapping[str, Any] | None = None,
        same_classes: bool = True,
    ):
        preprocessor = data_preprocessor or student.get("data_preprocessor")
        network = build({**student, "data_preprocessor": preprocessor}, "model.student")
        frozen = nn.ModuleDict()
        for name, config in (teachers or {}).items():
            field = f"model.teachers.{name}"
            teacher = build_teacher(config, field, preprocessor)
            if same_classes:
                check_classes(network, teacher.network, field)
            frozen[name] = teacher
        super().__init__(make_distiller(distiller, network, frozen), stream_preprocessor(preprocessor))


def check_classes(student: nn.Module, teacher: nn.Module, field: str) -> None:
    """Raises InputError where the numbers of classes differ."""
    own, theirs = num_classes(student), num_classes(teacher)
    if own != theirs and None not in (own, theirs):
        raise InputError(
            f"{field}: has {theirs} classes, the student has {own}; distil between networks of the same classes, "
            "or features alone with model.same_classes = False"
        )


def stream_preprocessor(config: Mapping[str, Any] | None) -> dict[str, Any]:
    """A StreamPreprocessor of the arguments of a SegDataPreProcessor; another type is kept."""
    config = copy.deepcopy(dict(config or {}))
    if config.get("type", "SegDataPreProcessor") == "SegDataPreProcessor":
        config["type"] = "StreamPreprocessor"
    return config


def make_distiller(config: Mapping[str, Any] | None, student: nn.Module, teachers: nn.ModuleDict) -> Distiller:
    """The registered Distiller that a config names, TappedDistiller by default."""
    arguments = dict(config or {})
    kind = arguments.pop("type", "TappedDistiller")
    found = MODELS.get(kind) if isinstance(kind, str) else kind
    if found is None or not issubclass(found, Distiller):
        known = [
            name for name, item in MODELS.module_dict.items() if isinstance(item, type) and issubclass(item, Distiller)
        ]
        raise InputError(f"model.distiller.type = {kind!r}: not a registered Distiller{did_you_mean(str(kind), known)}")
    try:
        return found(student=student, teachers=teachers, **arguments)
    except TypeError as error:
        raise InputError(f"model.distiller: {error}") from None
