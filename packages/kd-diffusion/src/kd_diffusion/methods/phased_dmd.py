"""Phased DMD: Few-step Distribution Matching Distillation via Score Matching within Subintervals (arXiv 2510.27684, 2025).

The noise levels 1 = t_0 > t_1 > .. > t_K = 0 of a flow (a_t = 1 - t, s_t = t) are cut into phases. Each phase trains
its own expert of a few Euler steps, from noisy to clean, and matches distributions where the phase ends: at x_s with
s = t_k, of which no clean sample exists. Earlier experts are frozen, fake score and expert start from the teacher.

    x_s = Euler through G_1 .. G_{k-1}, then G_k up to a random step j, from whose level tau straight to s:
    x_s = x_tau + (s - tau) u_G(x_tau, tau)                                  the gradient goes through step j alone
    x_t = r x_s + b e,  t in (s, 1],  r = a_t / a_s,  b^2 = t^2 - r^2 s^2
    g = w (u_T(x_t) - u_F(x_t)),  w = a_t r / (a_t t + t^2),  injected at x_s                     u_T guided by kappa
    L_F = mean min(1, 10 b^2) |u_F(x_t) - v|^2,  v = c e - x_s / a_s,  c = (t + a_t s^2 / a_s^2) / b

v needs x_s alone and has the mean of e_0 - x_0 given x_t; e - x_s, which one would write down first, has not. `form:
x0` is the generator's loss of the public trainer (ModelTC/LightX2V): the difference of the two predictions of x,
normalised as in DMD, injected at the expert's own x_0 = x_tau - tau u_G. Both descend the same direction.

With one phase this is DMD with a random stop, on all steps of one network.
"""  # noqa: E501

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from kd_diffusion import runs
from kd_diffusion.data import Data, load_data
from kd_diffusion.engine import timesteps
from kd_diffusion.engine.denoiser import Denoiser
from kd_diffusion.engine.distillation import Networks, Sample, ScoreArgs, ScoreDistiller, batch_size
from kd_diffusion.engine.draws import Turn
from kd_diffusion.engine.lora import add_lora
from kd_diffusion.engine.process import Flow, Process, renoise, renoising, subinterval_target, target
from kd_diffusion.engine.rollout import euler_move, start_noise
from kd_diffusion.engine.score import flow_weight, inject, weighted_error
from kd_diffusion.engine.timesteps import TimesConfig, sample_times
from kd_diffusion.integrations.pipelines import Opened, open_pipeline, trainable
from kd_diffusion.networks import check_same_space
from kd_diffusion.runs import DiffusionRun, Run, Sampling
from kdcore.config import EMAConfig
from kdcore.distiller import LossTerms, freeze
from kdcore.errors import InputError
from kdcore.method import Method
from kdcore.stages import Artefacts, RunContext, Stage
from kdcore.training import TrainStage

SAMPLING = Sampling(renoise="euler")


def _trainer_times() -> TimesConfig:
    return TimesConfig.model_validate({"kind": "continuous", "low": 20, "high": 980})


class PhasedDMDConfig(ScoreArgs):
    """`train` is the budget of one phase."""

    steps: int = Field(4, ge=1, description="Euler steps of all phases together")
    phases: int = Field(2, ge=1, description="K; 1 is DMD with a random stop")
    experts_per_phase: int = Field(1, ge=1, description="networks that share the steps of a phase, trained together")
    shift: float | None = Field(None, gt=0, description="shift m of the table of levels; None: the teacher's scheduler")
    guidance_scale: float = Field(4.0, description="kappa of the teacher; 4 for Wan 2.2, 5 for Wan 2.1")
    fake_updates: int = Field(5, ge=1, description="updates of the fake score for one of the generator")
    times: TimesConfig = Field(default_factory=_trainer_times, description="times of the generator's loss")
    fake_times: TimesConfig = Field(default_factory=_trainer_times, description="times of the fake score's loss")
    margin: int = Field(20, ge=1, description="table steps that every time is above the end of the phase, t_k")
    interval: bool = Field(False, description="times end at t_{k-1} instead of 1 (an ablation of the paper)")
    form: Literal["flow", "x0"] = Field("flow", description="generator's loss: the paper's, or the public trainer's")
    fake_target: Literal["unbiased", "biased"] = Field("unbiased", description="biased: e - x_s (an ablation)")
    clamp: float | None = Field(10.0, gt=0, description="weight min(1, clamp b^2) of the fake score; null: 1")

    @model_validator(mode="after")
    def _fits(self) -> PhasedDMDConfig:
        if self.steps % (self.phases * self.experts_per_phase):
            parts = f"{self.phases} phases of {self.experts_per_phase} experts"
            raise ValueError(f"has steps = {self.steps} for {parts}; allowed: a multiple of their product")
        if self.gan is not None:
            raise ValueError("has a gan, and the method has no adversarial term; allowed: gan: null")
        if self.start_index is not None:
            raise ValueError("has a start_index, and the first phase starts at pure noise; allowed: start_index: null")
        return self


# ---------------------------------------------------------------- levels


@dataclass(frozen=True)
class Phase:
    """Phase `number` of 1 .. K: the table indices of its steps and of its end; -1 stands for t = 0."""

    number: int
    steps: list[int]
    end: int


def phases_of(process: Process, args: PhasedDMDConfig) -> list[Phase]:
    """The phases, with the same number of steps each."""
    whole = [*timesteps.levels(process, args.steps), -1]
    size = args.steps // args.phases
    starts = range(0, args.steps, size)
    return [Phase(n, whole[first : first + size], whole[first + size]) for n, first in enumerate(starts, 1)]


def time_of(process: Process, index: float) -> float:
    """The time at an index of the table."""
    return float(process.at(torch.tensor(index, dtype=torch.float64)))


def boundaries_of(process: Process, args: PhasedDMDConfig) -> list[float]:
    """Where one expert hands over to the next, a little above the first level of the next: an expert owns the levels
    from its boundary on, and the step at a boundary of two phases is the later one's."""
    whole = timesteps.levels(process, args.steps)
    size = args.steps // (args.phases * args.experts_per_phase)
    found = []
    for place in range(size, args.steps, size):
        before, first = time_of(process, whole[place - 1]), time_of(process, whole[place])
        found.append(first + min(0.5 / process.size, (before - first) / 2))
    return found


# ---------------------------------------------------------------- the method


@dataclass
class PhaseSample(Sample):
    """x is x_s at the phase's end; x0 what the step's expert predicts for the clean sample."""

    x0: Tensor

    def detached(self) -> PhaseSample:
        return PhaseSample(self.x.detach(), self.condition, self.step, self.x0.detach())


class PhasedDMD(ScoreDistiller):
    """Phase `number`: `networks.generator` is its expert, `before` the frozen mixture of the earlier ones.

    Deploys the mixture of all experts so far. Raises InputError for a teacher that is no rectified flow.
    """

    reuse_samples = False
    renoise = "euler"
    args: PhasedDMDConfig

    def __init__(
        self,
        networks: Networks,
        args: PhasedDMDConfig,
        number: int = 1,
        before: Denoiser | None = None,
        *,
        seed: int = 0,
        ema: EMAConfig | None = None,
    ):
        super().__init__(networks, args, seed=seed, ema=ema)
        check_flow(self.process)
        phases = phases_of(self.process, args)
        self.phase = phases[number - 1]
        self.indices = [index for phase in phases[:number] for index in phase.steps]
        self.before = None if before is None else freeze(before)
        self.boundaries = boundaries_of(self.process, args)

    def deployed(self) -> nn.Module:
        from kd_diffusion.integrations.experts import experts_of, joined

        earlier = [] if self.before is None else experts_of(self.before.network)[0]
        experts = [*earlier, *experts_of(self.student)[0]]
        return joined(experts, self.boundaries[: len(experts) - 1])

    def sample(self, batch: dict[str, Any], player: str, *, grad: bool) -> PhaseSample:
        """x at the phase's end. The generator's turn leaves the path at a random step of the phase, one for all; the
        fake score sees whole paths."""
        draw, condition = self.sample_draw(player), self.sample_condition(batch, player)
        count, first = batch_size(batch), len(self.indices) - len(self.phase.steps)
        stop = self.stop_step(draw) if player == "generator" else len(self.indices) - 1
        times = [self._time(index, count) for index in self.indices[: stop + 1]]
        x_t = start_noise(self.process, draw.normal((count, *self.space.shape)), times[0], self.start)
        for step, (t, to) in enumerate(zip(times, [*times[1:], self._time(self.phase.end, count)], strict=True)):
            expert = self.before if step < first else self.generator
            assert expert is not None
            with torch.set_grad_enabled(grad and step == stop):
                x0 = expert(x_t, t, condition)
                x_t = euler_move(self.process, x_t, x0, t, to)
        return PhaseSample(x_t, condition, stop, x0)

    def stop_step(self, draw: Turn) -> int:
        steps = len(self.phase.steps)
        return len(self.indices) - steps + (draw.one_integer(steps) if steps > 1 else 0)

    def generator_terms(self, sample: Sample, batch: dict[str, Any], draw: Turn) -> LossTerms:
        """(P3): distribution matching at the re-noised x_s."""
        assert isinstance(sample, PhaseSample)
        s, t = self._time(self.phase.end, len(sample.x)), self.times(self.args.times, draw, len(sample.x))
        x_t = renoise(self.process, sample.x.detach(), draw.normal(sample.x.shape), s, t)
        anchor = sample.x if self.args.form == "flow" else sample.x0
        g = self.direction(anchor.detach(), x_t, t, sample.condition)
        self.meter.add(self.process, t, g)
        return LossTerms(matching=(1.0, inject(anchor, g)))

    def weight(self, x: Tensor, mu_real: Tensor, t: Tensor) -> Tensor:
        """W on mu_F - mu_T = t (u_T - u_F)."""
        if self.args.form == "flow":
            return flow_weight(self.process, self._time(self.phase.end, len(t)), t, x)
        distance = (x - mu_real).abs().flatten(1).mean(1).clamp_min(1e-4)
        return 1 / distance.reshape(-1, *[1] * (x.ndim - 1))

    def fake_terms(self, sample: Sample, batch: dict[str, Any], draw: Turn) -> LossTerms:
        """Score matching on (s, 1] from x_s alone."""
        x_s, args = sample.x, self.args
        s, t = self._time(self.phase.end, len(x_s)), self.times(args.fake_times, draw, len(x_s))
        e, kind = draw.normal(x_s.shape), self.fake.prediction_type
        if args.fake_target == "unbiased":
            goal = subinterval_target(self.process, kind, x_s, e, s, t)
        else:
            goal = target(self.process, kind, x_s, e, t)
        output = self.fake.output(renoise(self.process, x_s, e, s, t), t, sample.condition)
        weight = None if args.clamp is None else clamped_weight(self.process, s, t, args.clamp)
        return LossTerms(denoising=(1.0, weighted_error(output, goal, weight)))

    def times(self, config: TimesConfig, draw: Turn, count: int) -> Tensor:
        """t in (t_k, 1], `margin` table steps above t_k at least; in (t_k, t_{k-1}] where `interval` says so."""
        if self.args.interval:
            config = config.model_copy(update={"high": min(config.high, self.phase.steps[0])})
        return sample_times(config, self.process, draw, count, above=self.phase.end + self.args.margin - 1)

    def _time(self, index: int, count: int) -> Tensor:
        return self.process.at(torch.full((count,), index, device=self.device))


def clamped_weight(process: Process, s: Tensor, t: Tensor, clamp: float = 10.0) -> Tensor:
    """b^2 min(1 / b^2, clamp) = min(1, clamp b^2), (B,): the target grows like 1 / b as t comes down to s."""
    return (clamp * renoising(process, s, t)[1].square()).clamp_max(1.0)


def check_flow(process: Process) -> None:
    if not isinstance(process, Flow):
        raise InputError(f"teacher: its noise process is {type(process).__name__}; allowed: a rectified flow")


# ---------------------------------------------------------------- networks and stages


def phase_networks(config: Run, opened: Opened, data: Data, number: int) -> Networks:
    """Expert and fake score of a phase, both from the teacher. Of a teacher of several experts the fake score copies
    those that own levels above the phase's end, the expert the one in the middle of its levels."""
    from kd_diffusion.integrations.experts import above, at_level, joined

    args: PhasedDMDConfig = config.method_args
    if args.shift is not None:
        opened.denoiser.process = Flow(args.shift)
    check_flow(opened.process)
    source = opened
    if config.student.pretrained is not None:
        source = open_pipeline(config.student.pretrained, field="student.pretrained", size=config.teacher.size)
        check_same_space(source, opened, "student.pretrained")
    size = args.experts_per_phase
    edges = [1.0, *boundaries_of(opened.process, args), 0.0]
    own = range(size * (number - 1), size * number)
    experts = [trainable(at_level(source.network, (edges[n] + edges[n + 1]) / 2)) for n in own]
    if config.student.lora is not None:
        for expert in experts:
            add_lora(expert, config.student.lora, field="student.lora")
    end = phases_of(opened.process, args)[number - 1].end
    fake = trainable(above(opened.network, time_of(opened.process, end)))
    return Networks(
        teacher=opened.denoiser,
        fake=opened.denoiser_for(fake),
        generator=opened.denoiser_for(joined(experts, edges[own.start + 1 : own.stop])),
        conditioner=opened.conditioner,
        space=opened.space,
    )


def phase_stage(config: Run, data: Data, number: int) -> TrainStage:
    """Trains the expert of a phase after those that the stage before left, and saves the mixture of all so far."""
    args: PhasedDMDConfig = config.method_args
    previous = f"phase_{number - 1}"
    folders: Artefacts = {}

    def networks(config: Run, opened: Opened, artefacts: Artefacts, data: Data) -> Networks:
        folders.update(artefacts)
        return phase_networks(config, opened, data, number)

    def build(config: Run, found: Networks) -> PhasedDMD:
        before = None
        if number > 1:
            earlier = open_pipeline(folders[previous], field=previous, size=config.teacher.size)
            before = Denoiser(earlier.network, found.teacher.process, found.teacher.prediction_type)
        return PhasedDMD(found, args, number, before, seed=config.seed, ema=config.train.ema)

    name = f"phase_{number}"
    artefact = "student" if number == args.phases else name
    stage = runs.student_stage(config, data, build, name=name, artefact=artefact, sampling=SAMPLING, networks=networks)
    save = stage.save

    def save_with_adapters(network: nn.Module, folder: Path) -> None:
        save(network, folder)
        if number > 1 and (folders[previous] / "lora").is_dir():
            only = number == 2 and args.experts_per_phase == 1  # whose folder has no number yet
            target = folder / "lora" / ("expert_1" if only else "")
            shutil.copytree(folders[previous] / "lora", target, dirs_exist_ok=True)

    stage.save = save_with_adapters
    return stage


def stages(config: Run, context: RunContext) -> list[Stage]:
    data = load_data(config.data, config.seed)
    opened = runs.check(config, data)
    if opened is not None:
        check_flow(opened.process)
    phases = range(1, config.method_args.phases + 1)
    return [*runs.prepare(config, data), *(phase_stage(config, data, number) for number in phases)]


def evaluate(config: Run, artefacts: Artefacts) -> Mapping[str, Any]:
    return runs.evaluate(config, artefacts, sampling=SAMPLING)


def predict(config: Run, artefacts: Artefacts, count: int) -> list[dict[str, Any]]:
    return runs.predict(config, artefacts, count, sampling=SAMPLING)


METHOD: Method[Any] = Method("phased_dmd", __doc__ or "", DiffusionRun[PhasedDMDConfig], stages, evaluate, predict)
