"""The networks of a run: the teacher's pipeline, and the copies of its network that train."""

from __future__ import annotations

from kd_diffusion.config import Run
from kd_diffusion.data import Data
from kd_diffusion.engine.distillation import Networks
from kd_diffusion.engine.lora import add_lora
from kd_diffusion.integrations.pipelines import Opened, as_stored, open_pipeline, trainable
from kdcore.errors import InputError
from kdcore.stages import Artefacts


def open_teacher(config: Run, artefacts: Artefacts, data: Data, *, name: str = "teacher") -> Opened:
    """The teacher's pipeline, from its folder in the run or by its name."""
    teacher = config.teacher
    null = teacher.null_class
    if teacher.world is not None:
        if name == "teacher" and teacher.world.name == "digits_unet":
            null = data.num_classes
        return open_pipeline(artefacts[name], field="teacher", dtype=teacher.dtype, null_class=null)
    assert teacher.pretrained is not None
    return open_pipeline(
        teacher.pretrained,
        field="teacher.pretrained",
        dtype=teacher.dtype,
        variant=teacher.variant,
        null_class=null,
        size=teacher.size,
    )


def make_networks(config: Run, opened: Opened, artefacts: Artefacts, data: Data) -> Networks:
    """Teacher, and trainable copies for fake score and generator.

    The copies start from the teacher; from the artefact `start` where the teacher is a formula; the generator from
    `student.pretrained` where that is given.
    """
    if "start" in artefacts:
        fake = open_teacher(config, artefacts, data, name="start").network
    else:
        fake = as_stored(opened, config.teacher.pretrained or artefacts["teacher"], config.teacher.variant)
    generator = fake
    if config.student.pretrained is not None:
        start = open_pipeline(config.student.pretrained, field="student.pretrained")
        check_same_space(start, opened, "student.pretrained")
        generator = start.network
    networks = Networks(
        teacher=opened.denoiser,
        fake=opened.denoiser_for(trainable(fake)),
        generator=opened.denoiser_for(trainable(generator)),
        conditioner=opened.conditioner,
        space=opened.space,
    )
    if config.student.lora is not None:
        add_lora(networks.generator.network, config.student.lora, field="student.lora")
    return networks


def check_same_space(student: Opened, teacher: Opened, field: str) -> None:
    """Raises InputError where a student's network does not fit the teacher's samples or condition."""
    if student.space.shape != teacher.space.shape:
        raise InputError(f"{field}: its samples are {student.space.shape}, the teacher's {teacher.space.shape}")
    if type(student.network) is not type(teacher.network):
        have, want = type(student.network).__name__, type(teacher.network).__name__
        raise InputError(f"{field}: its network is a {have}, the teacher's a {want}")
