"""The stages of GKD: a foundation teacher, representation on timm's transformers, the task on a frozen backbone."""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from mmseg.registry import MODELS
from safetensors.torch import load_file, save_file
from torch import nn

from kd_segmentation import integrations  # noqa: F401  registers
from kd_segmentation.integrations import networks, segmentor
from kd_segmentation.integrations.stage import MMEngineStage, RunnerSetup, check_dataset, quiet_mmengine
from kd_segmentation.runs import (
    artefact,
    check,
    runner_sections,
    saver,
    stock_model,
    student_stage,
    teacher_models,
    teacher_stages,
)
from kdcore.errors import InputError
from kdcore.stages import RunContext, Stage
from kdcore.state_files import read_checkpoint

if TYPE_CHECKING:
    from kd_segmentation.methods.gkd import GKDRun, RepresentationStage

WEIGHTS, BACKBONE = "model.safetensors", "backbone.pth"
# What TIMMBackbone takes besides the arguments of timm's transformer.
WRAPPER = {"type", "model_name", "features_only", "pretrained", "checkpoint_path", "in_channels", "init_cfg"}


@MODELS.register_module()
class RepresentationModel(segmentor.DistilledModel):
    """What the Runner trains in a stage of representation: a distiller between two transformers on images alone."""

    def __init__(self, student: nn.Module, teacher: nn.Module, distiller: Mapping[str, Any], data_preprocessor: Any):
        made = segmentor.make_distiller(distiller, student, nn.ModuleDict({"teacher": teacher}))
        super().__init__(made, segmentor.stream_preprocessor(data_preprocessor))

    def init_weights(self) -> None:
        """The student has its weights: its own public ones, or those of the stage before."""


def all_stages(config: GKDRun) -> list[Stage]:
    """Teacher, representation, task; the joint baseline has one stage after the teacher."""
    args = config.method_args
    if args.joint:
        joint = {"type": "JointGKD", **args.losses()}
        if args.foundation is not None:
            raise InputError("method_args.joint: needs the teacher as model.teachers.teacher, not as foundation")
        check(config, joint)
        return [*teacher_stages(config), student_stage(config, joint)]
    _check(config)
    representation = [
        representation_stage(config, stage, args.representation[index - 1] if index else None)
        for index, stage in enumerate(args.representation)
    ]
    return [*teacher_stages(config), *representation, task_stage(config)]


def _check(config: GKDRun) -> None:
    args = config.method_args
    if not args.representation:
        raise InputError("method_args.representation: needs at least one stage")
    if args.foundation is None and "teacher" not in teacher_models(config):
        raise InputError("method_args.foundation: is required, the teacher from timm; or give model.teachers.teacher")
    check(config, {"type": "TappedDistiller"})
    with quiet_mmengine(), torch.random.fork_rng(devices=[]):
        for stage in args.representation:
            data = check_dataset(stage.train_dataloader["dataset"], f"representation.{stage.name}.train_dataloader")
            student = student_vit(config, stage, pretrained=False)
            teacher = _teacher(config, stage, None)
            model = _model(config, student, teacher)
            sample = data[0]
            batch = {"inputs": [sample["inputs"]], "data_samples": [sample["data_samples"]]}
            prepared = model.data_preprocessor(batch, True)
            try:
                model.distiller.loss(segmentor.batch_of(prepared["inputs"], prepared["data_samples"]))
            except (RuntimeError, AssertionError) as error:
                raise InputError(
                    f"representation.{stage.name}: the networks do not take its images ({error})"
                ) from None


# ---------------------------------------------------------------- networks


def timm_model(name: str, field: str, *, pretrained: bool, arguments: Mapping[str, Any]) -> nn.Module:
    """A transformer of timm without a head. Raises InputError for an unknown name or argument."""
    import timm

    try:
        return timm.create_model(name, pretrained=pretrained, num_classes=0, **arguments)
    except (RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"{field} = '{name}': timm cannot make it ({error})") from None


def student_vit(
    config: GKDRun, stage: RepresentationStage | None = None, *, pretrained: bool | None = None
) -> nn.Module:
    """The transformer of the student's TIMMBackbone, whole, with the stage's geometry."""
    backbone = dict(config.model["student"]["backbone"])
    if backbone.get("type") != "TIMMBackbone":
        raise InputError(f"model.student.backbone.type = '{backbone.get('type')}': GKD needs TIMMBackbone")
    arguments = {key: value for key, value in backbone.items() if key not in WRAPPER and key != "out_indices"}
    return timm_model(
        backbone["model_name"],
        "model.student.backbone.model_name",
        pretrained=backbone.get("pretrained", True) if pretrained is None else pretrained,
        arguments={**arguments, **(stage.student if stage is not None else {})},
    )


def _teacher(config: GKDRun, stage: RepresentationStage, artefacts: Mapping[str, Path] | None) -> networks.Teacher:
    """The frozen teacher behind the student's normalisation; without artefacts its weights are not loaded."""
    student = _preprocessor(config)
    if config.method_args.foundation is None:
        if artefacts is None:
            section = teacher_models(config)["teacher"]
            model = networks.teacher_model(section, "model.teachers.teacher")
            network = networks.build(
                networks.without_initialisation(stock_model(config, model)), "model.teachers.teacher"
            )
        else:
            network = networks.open_saved(artefacts[artefact("teacher")])
        return networks.Teacher(network, student)
    given = config.method_args.foundation
    network = timm_model(
        given.name,
        "foundation.name",
        pretrained=given.pretrained and given.checkpoint is None and artefacts is not None,
        arguments={**given.arguments, **stage.teacher},
    )
    if given.checkpoint and artefacts is not None:
        load_timm(network, Path(given.checkpoint), "foundation.checkpoint")
    known = network.pretrained_cfg
    own = {key: [255 * value for value in known[key]] for key in ("mean", "std")}
    swapped = bool(student.get("bgr_to_rgb") or student.get("rgb_to_bgr"))
    return networks.Teacher(network, student, preprocessor={**own, "bgr_to_rgb": swapped})


def load_timm(vit: nn.Module, path: Path, field: str) -> None:
    """Loads a state dict, resampling patch embedding and positions to the network's geometry as timm does."""
    if not path.is_file():
        raise InputError(f"{field} = '{path}': no such file")
    state = load_file(path) if path.suffix == ".safetensors" else read_checkpoint(path, field)["state_dict"]
    convert = getattr(sys.modules[type(vit).__module__], "checkpoint_filter_fn", None)
    state = convert(state, vit) if convert is not None else state
    try:
        vit.load_state_dict({name: value for name, value in state.items() if not name.startswith("head.")})
    except RuntimeError as error:
        raise InputError(f"{field} = '{path}': does not fit {type(vit).__name__} ({error})") from None


def _preprocessor(config: GKDRun) -> dict[str, Any]:
    return dict(stock_model(config, config.model["student"])["data_preprocessor"] or {})


def _model(config: GKDRun, student: nn.Module, teacher: nn.Module) -> RepresentationModel:
    preprocessor = {key: value for key, value in _preprocessor(config).items() if key not in ("size", "test_cfg")}
    preprocessor["size_divisor"] = 1  # a stage's images have one size of their own
    return RepresentationModel(student, teacher, {"type": "GKD", **config.method_args.losses()}, preprocessor)


# ---------------------------------------------------------------- stages


def representation_stage(config: GKDRun, stage: RepresentationStage, before: RepresentationStage | None) -> Stage:
    """Trains the student's transformer on images; leaves timm's state dict, and the same for a TIMMBackbone."""

    def build(context: RunContext) -> RunnerSetup:
        student = student_vit(config, stage, pretrained=None if before is None else False)
        if before is not None:
            load_timm(student, context.artefacts[before.name] / WEIGHTS, "representation")
        model = _model(config, student, _teacher(config, stage, context.artefacts))
        changes = {key: getattr(stage, key) for key in ("train_cfg", "optim_wrapper", "param_scheduler")}
        sections = runner_sections(config, **changes, train_dataloader=stage.train_dataloader, custom_hooks=[])
        sections.update(val_dataloader=None, val_cfg=None, val_evaluator=None, load_from=None, model=model)
        return RunnerSetup(sections, lambda trained, meta, folder: save_backbone(trained.student, folder))

    return MMEngineStage(stage.name, build, artefact=stage.name)


def save_backbone(vit: nn.Module, folder: Path) -> None:
    """model.safetensors, which timm.create_model(..., checkpoint_path=) loads, and backbone.pth for TIMMBackbone."""
    state = {name: value.detach().cpu().contiguous().clone() for name, value in vit.state_dict().items()}
    save_file(state, folder / WEIGHTS)
    torch.save({"state_dict": {f"timm_model.model.{name}": value for name, value in state.items()}}, folder / BACKBONE)


def task_stage(config: GKDRun) -> Stage:
    """Trains the segmentor from the last representation, its backbone frozen and in eval mode."""
    last = config.method_args.representation[-1]

    def build(context: RunContext) -> RunnerSetup:
        student = copy.deepcopy(config.model["student"])
        vit = student_vit(config, pretrained=False)
        load_timm(vit, context.artefacts[last.name] / WEIGHTS, "representation")  # in the geometry of the task
        folder = context.folder / "checkpoints" / "student"
        folder.mkdir(parents=True, exist_ok=True)
        save_backbone(vit, folder)
        initial = {"type": "Pretrained", "checkpoint": str(folder / BACKBONE)}
        student["backbone"].update(pretrained=False, init_cfg=initial)
        model = {**config.model, "student": student, "teachers": {}, "distiller": {"type": "TappedDistiller"}}
        freeze = {"type": "SwitchHook", "switches": [{"at": 0, "freeze": ["backbone"]}]}
        hooks = [*config.custom_hooks, *([freeze] if config.method_args.freeze else [])]
        sections = runner_sections(config, model={"type": "DistilledSegmentor", **model}, custom_hooks=hooks)
        return RunnerSetup(sections, saver(config, config.model["student"]))

    return MMEngineStage("student", build)
