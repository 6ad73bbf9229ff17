"""The config of a run of diffusion distillation."""

from __future__ import annotations

from typing import Any, Generic, Literal, TypeVar

from pydantic import Field, model_validator

from kd_diffusion import evaluation as ev
from kd_diffusion.data import DataConfig
from kd_diffusion.engine.distillation import ScoreArgs
from kd_diffusion.engine.lora import LoRAConfig
from kd_diffusion.worlds import WorldConfig
from kdcore.config import Config, MethodRunConfig

A = TypeVar("A", bound=ScoreArgs)


class TeacherConfig(Config):
    """A diffusers pipeline by hub name or folder, or a world that is built and trained in the run."""

    pretrained: str | None = Field(None, description="hub name or folder of a diffusers pipeline")
    variant: str | None = Field(None, description="variant of the weight files, such as fp16")
    dtype: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="type of the frozen weights")
    null_class: int | None = Field(None, ge=0, description="label that stands for no class (UNet2DModel)")
    size: tuple[int, int, int] | None = Field(
        None, description="frames, height and width of a video teacher's samples; None: its pipeline's defaults"
    )
    world: WorldConfig | None = Field(None, description="an embedded world, instead of pretrained")

    @model_validator(mode="after")
    def _one_source(self) -> TeacherConfig:
        if (self.pretrained is None) == (self.world is None):
            raise ValueError("needs a source: give either pretrained or world")
        return self


class StudentConfig(Config):
    pretrained: str | None = Field(None, description="pipeline to start from (a one-step model); None: the teacher")
    lora: LoRAConfig | None = Field(None, description="train adapters alone; None: all weights")


class DiffusionRun(MethodRunConfig[A], Generic[A]):
    """The config of a run."""

    teacher: TeacherConfig
    student: StudentConfig = Field(default_factory=lambda: StudentConfig.model_validate({}))
    data: DataConfig = Field(default_factory=DataConfig)
    evaluation: ev.EvaluationConfig = Field(default_factory=lambda: ev.EvaluationConfig.model_validate({}))


Run = DiffusionRun[Any]
