"""DistilledDetector3D: what mmengine's Runner trains, from stock config dicts of teacher and student.

    model = dict(
        type="DistilledDetector3D",
        student=dict(type="BEVDetector", ...),
        teachers=dict(teacher=dict(model=dict(type="CenterPoint", ...), checkpoint="teacher.pth")),
        distiller=dict(type="UniDistill", path="L2C", point_cloud_range=[...]),
    )

It validates and predicts as the student does. Its state dict leaves the frozen teachers out. Every network prepares the
raw batch by its own data_preprocessor, so voxels and the normalisation of images may differ between them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from mmdet3d.registry import MODELS
from mmengine.logging import MessageHub
from mmengine.model import BaseDataPreprocessor, BaseModel
from torch import Tensor, nn

from kd_detection3d.engine.batch import DetectionBatch, prepared
from kd_detection3d.integrations.networks import build, build_teacher, class_names
from kdcore.distiller import Distiller, LossTerms, is_frozen
from kdcore.errors import InputError, did_you_mean


class DistilledModel(BaseModel):
    """A BaseModel whose losses are those of a `kdcore.distiller.Distiller`; `terms` holds the last step's raw terms."""

    def __init__(self, distiller: Distiller):
        super().__init__(data_preprocessor=BaseDataPreprocessor())
        self.distiller = distiller
        self.terms: LossTerms | None = None
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
        self.terms = self.distiller.loss(DetectionBatch(inputs, data_samples))
        return {f"loss_{name}": weight * term for name, (weight, term) in self.terms.items() if weight != 0}

    def forward(self, inputs: Any, data_samples: Any = None, mode: str = "tensor") -> Any:
        if mode == "loss":
            return self.loss(inputs, data_samples)
        own_inputs, samples = prepared(self.student, DetectionBatch(inputs, data_samples or []), training=False)
        return self.student(own_inputs, samples, mode=mode)


def _leave_out_frozen(module: DistilledModel, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for skip in module.distiller.frozen_prefixes():
        for name in [name for name in state if name.startswith(f"{prefix}distiller.{skip}")]:
            del state[name]


def _expect_no_frozen(module: DistilledModel, keys: Any) -> None:
    skip = tuple(f"distiller.{prefix}" for prefix in module.distiller.frozen_prefixes())
    if skip:
        keys.missing_keys[:] = [name for name in keys.missing_keys if not name.startswith(skip)]


@MODELS.register_module()
class DistilledDetector3D(DistilledModel):
    """The student behind a distiller, as mmengine's Runner trains it.

    student: a stock config dict. teachers: name -> dict(model=stock config dict, checkpoint=path), or config=a stock
    config file in the place of model. distiller: a registered Distiller's type and arguments; it is made with
    `student=` and `teachers=` (name -> frozen network). Raises InputError for a config that does not fit.
    """

    def __init__(
        self,
        student: Mapping[str, Any],
        teachers: Mapping[str, Mapping[str, Any]] | None = None,
        distiller: Mapping[str, Any] | None = None,
    ):
        network = build(student, "model.student")
        frozen = nn.ModuleDict()
        for name, config in (teachers or {}).items():
            frozen[name] = build_teacher(config, f"model.teachers.{name}")
            check_classes(network, frozen[name], f"model.teachers.{name}")
        super().__init__(make_distiller(distiller, network, frozen))


def check_classes(student: nn.Module, teacher: nn.Module, field: str) -> None:
    """Raises InputError where the classes differ."""
    own, theirs = class_names(student), class_names(teacher)
    if own is not None and theirs is not None and own != theirs:
        raise InputError(
            f"{field}: has {len(theirs)} classes ({', '.join(theirs)}), the student has {len(own)} ({', '.join(own)}); "
            "distil between networks of the same classes in the same order"
        )


def make_distiller(config: Mapping[str, Any] | None, student: nn.Module, teachers: nn.ModuleDict) -> Distiller:
    """The registered Distiller that a config names, Supervised by default."""
    arguments = dict(config or {})
    kind = arguments.pop("type", "Supervised")
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


@torch.no_grad()
def predict(network: nn.Module, batch: Mapping[str, Any]) -> list[Any]:
    """The Det3DDataSamples of a collated batch, with `pred_instances_3d`."""
    inputs, samples = prepared(network, DetectionBatch(batch["inputs"], batch["data_samples"]), training=False)
    return network(inputs, samples, mode="predict")
