"""TappedDistiller: the student's own task loss, plus any registered losses between tapped modules of two networks.

    losses = {
        "kl": {"type": "PixelKL", "temperature": 4.0},                        # logits against logits
        "neck": {"type": "FeatureMSE", "weight": 0.5, "student": "backbone.layer4", "teacher": "backbone.layer4",
                 "connector": "conv1x1"},                                     # student's channels -> teacher's
    }

A module is named as in `named_modules()` of its network, and its output is what is compared; "backbone.layer4:input" is
what that module was given, "logits" is the output of the decode head. A tapped teacher map is resized to the student's
size.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from pydantic import ConfigDict, Field
from torch import Tensor, nn

from kd_segmentation.engine.batch import SegBatch, upsampled
from kd_segmentation.engine.losses import LOSSES
from kdcore.config import Config, parse
from kdcore.distiller import Distiller, LossTerms
from kdcore.errors import InputError, did_you_mean
from kdcore.taps import FeatureTap

LOGITS = "logits"


class TapLossConfig(Config):
    """One loss between a module of the student and one of a teacher; further keys are the loss's own arguments."""

    model_config = ConfigDict(extra="allow")

    type: str = Field(description="PixelKL, ChannelKL, FeatureMSE, AttentionTransfer, or a module in mmseg's registry")
    weight: float = Field(1.0, ge=0, description="weight of the loss")
    student: str = Field(LOGITS, description="module of the student, its name with :input, or logits")
    teacher: str = Field(LOGITS, description="module of the teacher, its name with :input, or logits")
    source: str | None = Field(None, description="which teacher, where there are several; None: the first")
    connector: str | None = Field(None, description="conv1x1: learned map of the student's channels to the teacher's")

    @property
    def arguments(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


def parse_losses(losses: Mapping[str, Any]) -> dict[str, TapLossConfig]:
    """Name -> TapLossConfig of plain mappings. Raises InputError that names the loss and its field."""
    return {
        name: item if isinstance(item, TapLossConfig) else parse(TapLossConfig, item, source=f"losses.{name}")
        for name, item in losses.items()
    }


def build_loss(config: TapLossConfig, name: str) -> nn.Module:
    """The loss module, ours or one registered with mmseg."""
    kind = LOSSES.get(config.type)
    if kind is None and "mmseg" in sys.modules:  # a loss of its own or of the user's is registered by then
        from mmseg.registry import MODELS

        kind = MODELS.get(config.type)
    if kind is None:
        raise InputError(f"losses.{name}.type = '{config.type}': no such loss{did_you_mean(config.type, LOSSES)}")
    try:
        return kind(**config.arguments)
    except TypeError as error:
        raise InputError(f"losses.{name}: {error}") from None


class TapLosses(nn.Module):
    """Losses between tapped modules. Use: `with losses.watching(): run the networks; terms = losses.terms()`.

    student: the network with gradient. teachers: name -> network. `probe` (1, 3, H, W) is sent through the networks
    once where a connector has to know its channels.
    Raises InputError: a module that a network does not have, an unknown loss, teacher or connector.
    """

    def __init__(
        self, student: nn.Module, teachers: Mapping[str, nn.Module], losses: Mapping[str, Any], *, probe: int = 64
    ):
        super().__init__()
        self.configs = parse_losses(losses)
        self.losses = nn.ModuleDict({name: build_loss(config, name) for name, config in self.configs.items()})
        self.sources = {name: self._source(name, config, teachers) for name, config in self.configs.items()}
        self._taps = self._open(student, teachers)
        self.connectors = nn.ModuleDict()
        for name, config in self.configs.items():
            if config.connector is not None:
                self.connectors[name] = self._connector(name, config, student, teachers, probe)

    @property
    def used(self) -> set[str]:
        """Names of the teachers whose output is needed."""
        return set(self.sources.values())

    @staticmethod
    def _source(name: str, config: TapLossConfig, teachers: Mapping[str, nn.Module]) -> str:
        if not len(teachers):
            raise InputError(f"losses.{name}: there is no teacher; give model.teachers")
        source = config.source or next(iter(teachers.keys()))
        if source not in teachers:
            raise InputError(
                f"losses.{name}.source = '{source}': no such teacher{did_you_mean(source, list(teachers))}"
            )
        return source

    def _open(self, student: nn.Module, teachers: Mapping[str, nn.Module]) -> dict[str, FeatureTap]:
        """One tap a network: "student" and each teacher that is used; aliases are names of losses."""
        names: dict[str, dict[str, str]] = {}
        for name, config in self.configs.items():
            names.setdefault("student", {})[name] = module_name(student, config.student, f"losses.{name}.student")
            source = self.sources[name]
            teacher = inner(teachers[source])
            names.setdefault(f"teacher {source}", {})[name] = module_name(
                teacher, config.teacher, f"losses.{name}.teacher"
            )
        networks = {"student": student, **{f"teacher {key}": inner(teachers[key]) for key in teachers}}
        return {key: FeatureTap(networks[key], taps, index=0) for key, taps in names.items()}

    def _connector(
        self, name: str, config: TapLossConfig, student: nn.Module, teachers: Mapping[str, nn.Module], probe: int
    ) -> nn.Module:
        if config.connector != "conv1x1":
            raise InputError(f"losses.{name}.connector = '{config.connector}': allowed: conv1x1")
        modes = student.training
        with torch.no_grad(), self.watching():
            blank = torch.zeros(1, 3, probe, probe)
            student.eval()(blank)
            teachers[self.sources[name]](blank)
            channels = [value.shape[1] for value in self._pair(name)]
            student.train(modes)
        return nn.Conv2d(*channels, kernel_size=1)

    def watching(self) -> ExitStack:
        """Context in which the networks' modules are recorded."""
        stack = ExitStack()
        for tap in self._taps.values():
            stack.enter_context(tap)
        return stack

    def _pair(self, name: str) -> tuple[Tensor, Tensor]:
        return self._taps["student"][name], self._taps[f"teacher {self.sources[name]}"][name].detach()

    def terms(self) -> LossTerms:
        """The weighted losses of what was recorded last."""
        found = LossTerms()
        for name, config in self.configs.items():
            student, teacher = self._pair(name)
            if name in self.connectors:
                student = self.connectors[name](student)
            if teacher.ndim == student.ndim == 4:
                teacher = upsampled(teacher, student)
            found[name] = (config.weight, self.losses[name](student, teacher))
        for tap in self._taps.values():
            tap.clear()
        return found


def inner(network: nn.Module) -> nn.Module:
    """The segmentor behind a frozen teacher's normalisation."""
    return getattr(network, "network", network)


def module_name(network: nn.Module, name: str, field: str) -> str:
    """The name of a module to tap; "logits" is the last layer of mmseg's decode heads."""
    if name != LOGITS:
        try:
            FeatureTap(network, {field: name})
        except InputError as error:
            raise InputError(str(error).replace(f"tap '{field}'", field)) from None
        return name
    known = dict(network.named_modules())
    if "decode_head.conv_seg" in known:
        return "decode_head.conv_seg"
    if "decode_head" not in known and not hasattr(network, "decode_head"):
        return ""  # a plain module: its output
    raise InputError(f"{field} = 'logits': the decode head of this network has no conv_seg; name the module to compare")


class TappedDistiller(Distiller):
    """Task loss of the student (mmseg's own, with its auxiliary heads) plus registered losses on labelled images.

    student: a segmentor of mmseg. teachers: name -> frozen network. losses: name -> TapLossConfig, or a mapping.
    task: weight of the student's own losses. Every loss of the student becomes a term under its name in mmseg.
    """

    def __init__(
        self,
        student: nn.Module,
        teachers: Mapping[str, nn.Module] | None = None,
        *,
        losses: Mapping[str, Any] | None = None,
        task: float = 1.0,
    ):
        super().__init__()
        self.student = student
        self.teachers = teachers if isinstance(teachers, nn.ModuleDict) else nn.ModuleDict(dict(teachers or {}))
        self.task = task
        self.tapped = TapLosses(student, self.teachers, losses or {})

    def loss(self, batch: SegBatch, player: str = "student") -> LossTerms:
        with self.tapped.watching():
            terms = task_terms(self.student.loss(batch.images, batch.samples), self.task)
            with torch.no_grad():
                for name in self.teachers:
                    if name in self.tapped.used:
                        self.teachers[name](batch.images)
            terms.update(self.tapped.terms())
        return terms


def task_terms(losses: Mapping[str, Any], weight: float = 1.0) -> LossTerms:
    """The losses among what a segmentor of mmseg returns; accuracies are left out. Lists are summed."""
    terms = LossTerms()
    for name, value in losses.items():
        if "loss" in name:
            terms[name.replace("loss_", "")] = (
                weight,
                sum(v.mean() for v in value) if isinstance(value, list) else value.mean(),
            )
    return terms
