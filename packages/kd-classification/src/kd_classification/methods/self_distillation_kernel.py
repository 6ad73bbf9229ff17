"""Even your Teacher Needs Guidance: Ground-Truth Targets Dampen Regularization Imposed by Self-Distillation
(arXiv 2102.13088, 2021).

A model is distilled into fresh copies of itself, round after round. Round t fits a mixture of the true targets and of
the last round's outputs, under a squared loss and a penalty:

    min_f  alpha_t/2 sum_i ||f(x_i) - y_i||^2 + (1 - alpha_t)/2 sum_i ||f(x_i) - f_{t-1}(x_i)||^2 + lambda/2 ||f||^2

For kernel ridge regression all rounds are known in closed form (`kd_classification.engine.kernel_rounds`): with
K = V diag(d) V^T and A = d / (d + lambda),

    f_t(X) = V diag(B_t) V^T Y,   B_1 = A,   B_t = A (alpha_t + (1 - alpha_t) B_{t-1})

Without true targets (alpha = 0) the rounds shrink to 0; with them they stop at the ridge fit of penalty lambda / alpha.
The best alpha of a round is a projection on validation data, with u the fit on the true targets alone and g the fit on
the last round's outputs alone, since f_alpha = alpha u + (1 - alpha) g:

    alpha* = <y - g, u - g> / ||u - g||^2                                       (exact for every linear smoother)

`kd_classification.integrations.KernelSelfDistiller` is this as a scikit-learn estimator. This file trains networks in
rounds, on probabilities:

    L = alpha mean (p - onehot(y))^2 + (1 - alpha) mean (p - p_{t-1})^2 + rho sum_k ||theta_k||,   p = softmax(z)

The means are over the batch and the classes, the norms over parameter tensors and not squared. `alpha: auto` estimates
alpha* of every round t >= 2 from two networks: round 1 is u, and g is one more fit, on the teacher's outputs alone.
alpha weights the true labels, and round 1 has no teacher. The teacher is the last round, frozen, in eval mode.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from kd_classification import metrics as m
from kd_classification import runs
from kd_classification.data import Batch, Data, DataConfig, Images, load_data
from kd_classification.engine.classifier import ClassifierDistiller
from kd_classification.engine.kernel_rounds import AlphaEstimate, optimal_alpha
from kd_classification.models import ModelConfig, create_model, load_model, save_model
from kd_classification.runs import TeacherConfig
from kdcore.config import MethodConfig, MethodRunConfig
from kdcore.distiller import LossTerms
from kdcore.errors import InputError
from kdcore.method import Method
from kdcore.stages import Artefacts, Procedure, RunContext, Stage, replace_folder, write_atomically
from kdcore.training import TrainSetup, TrainStage


class SelfDistillationConfig(MethodConfig):
    rounds: int = Field(5, ge=1, description="R, networks trained one after the other; the first has no teacher")
    alpha: Literal["auto"] | float | list[float] = Field(
        "auto", description="weight of the true labels: estimated in every round, one number, or one of each round >= 2"
    )
    clip: bool = Field(True, description="limit the estimated alpha to [0, 1]; the raw value is logged in any case")
    penalty: float = Field(1e-4, ge=0, description="rho, weight of the sum of the parameter tensors' norms")
    ship: Literal["last", "best"] = Field("last", description="the student: the last round, or the best validated one")


class SelfDistillationRun(MethodRunConfig[SelfDistillationConfig]):
    """The network of every round, the data, the budget of every fit. There is no other teacher."""

    student: ModelConfig
    data: DataConfig = Field(default_factory=DataConfig)
    method_args: SelfDistillationConfig = Field(default_factory=lambda: SelfDistillationConfig.model_validate({}))


# ---------------------------------------------------------------- losses


def probability_error(logits: Tensor, target: Tensor) -> Tensor:
    """mean (softmax(z) - p)^2 over batch and classes; logits (B, C), target labels (B,) or probabilities (B, C).

    >>> round(probability_error(torch.zeros(1, 2), torch.tensor([0])).item(), 6)
    0.25
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if target.ndim == 1 and not target.is_floating_point():
        target = F.one_hot(target, logits.shape[1])
    if target.shape != logits.shape:
        shapes = f"{tuple(logits.shape)} and {tuple(target.shape)}"
        raise InputError(f"logits and target: shapes {shapes}; allowed: (B, C), and labels (B,) or (B, C)")
    return F.mse_loss(logits.softmax(dim=1), target.to(logits.dtype))


def norm_penalty(parameters: Iterable[Tensor]) -> Tensor:
    """sum_k ||theta_k||_2 over parameter tensors, not squared; its gradient is theta_k / ||theta_k||, and 0 at 0."""
    return torch.stack([torch.linalg.vector_norm(parameter) for parameter in parameters]).sum()


# ---------------------------------------------------------------- the distiller


class SelfDistillation(ClassifierDistiller):
    """One round: `teacher` is the last round's network, None in round 1. `alpha` and `penalty` as in the config.

    alpha "auto" is `estimate_alpha` of `fits`, round 1's network and one trained on the teacher alone, on `held_out`
    images, limited to [0, 1] with `clip`; the attribute `estimate` has the raw value, too.
    """

    def __init__(
        self,
        teacher: nn.Module | None,
        student: nn.Module,
        *,
        alpha: float | Literal["auto"] = 1.0,
        penalty: float = 1e-4,
        fits: tuple[nn.Module, nn.Module] | None = None,
        held_out: Images | None = None,
        clip: bool = True,
    ):
        super().__init__(teacher, student)
        self.estimate: AlphaEstimate | None = None
        if alpha == "auto":
            if fits is None or held_out is None:
                raise InputError(
                    "alpha = 'auto': needs fits, the two networks to estimate it from, and held_out images"
                )
            self.estimate = estimate_alpha(*fits, held_out, clip=clip)
            alpha = self.estimate.alpha
        if teacher is None and alpha != 1:
            raise InputError(f"alpha = {alpha}: a round without a teacher has alpha = 1")
        self.alpha, self.penalty = float(alpha), penalty

    def loss(self, batch: Batch, player: str = "student") -> LossTerms:
        logits = self.student(batch.images)
        terms = LossTerms(labels=(self.alpha, probability_error(logits, batch.labels)))
        if self.alpha != 1:
            teacher = self.teacher_logits(batch).softmax(dim=1)
            terms["teacher"] = (1 - self.alpha, probability_error(logits, teacher))
        if self.penalty > 0:
            trained = (parameter for parameter in self.student.parameters() if parameter.requires_grad)
            terms["norms"] = (self.penalty, norm_penalty(trained))
        return terms


def estimate_alpha(supervised: nn.Module, distilled: nn.Module, images: Images, *, clip: bool = True) -> AlphaEstimate:
    """alpha* on validation images from the probabilities of round 1 (u) and of the fit on the teacher alone (g)."""
    (u, labels), (g, _) = (m.predict(network, images) for network in (supervised, distilled))
    return optimal_alpha(F.one_hot(labels, u.shape[1]), u.softmax(dim=1), g.softmax(dim=1), clip=clip)


# ---------------------------------------------------------------- stages


class Rounds:
    """The stages of a run. Artefacts: `round-1` .. `round-R`, with an automatic alpha `distilled-t` and `alpha-t`."""

    def __init__(self, config: SelfDistillationRun, data: Data):
        self.config, self.data, self.args = config, data, config.method_args

    def stages(self) -> list[Stage]:
        stages: list[Stage] = [self.first()]
        for t in range(2, self.args.rounds + 1):
            if self.args.alpha == "auto":
                stages += [self.fit(t, f"distilled-{t}", alpha=0.0), Procedure(f"alpha-{t}", self.estimate(t))]
            stages.append(self.fit(t, f"round-{t}"))
        return [*stages, Procedure("student", self.ship)]

    def first(self) -> Stage:
        """Round 1, shared by every arm with the same network, data, budget and penalty."""
        train, penalty = self.config.train, self.args.penalty

        def setup(network: nn.Module) -> TrainSetup:
            return self.setup(SelfDistillation(None, network, penalty=penalty))

        model = TeacherConfig(**self.config.student.model_dump(), train=train)
        identity = {"self_distillation_kernel": penalty}
        return runs.teacher_stage(
            self.config, self.data, name="round-1", model=model, fingerprint=identity, setup=setup
        )

    def fit(self, t: int, name: str, *, alpha: float | None = None) -> TrainStage:
        def build(context: RunContext) -> TrainSetup:
            teacher = load_model(context.artefacts[f"round-{t - 1}"])
            student = create_model(self.config.student, self.data, field="student")
            weight = alpha if alpha is not None else self.alpha(context.artefacts, t)
            return self.setup(SelfDistillation(teacher, student, alpha=weight, penalty=self.args.penalty))

        return TrainStage(name, self.config.train, build, self.save, artefact=name)

    def setup(self, distiller: SelfDistillation) -> TrainSetup:
        return runs.supervised_setup(distiller, self.data, self.config.train, self.config.seed)

    def save(self, network: nn.Module, folder: Path) -> None:
        save_model(network, folder, self.data)

    def alpha(self, artefacts: Artefacts, t: int) -> float:
        """The weight of the labels in round t >= 2."""
        given = self.args.alpha
        if given == "auto":
            return json.loads(artefacts[f"alpha-{t}"].read_text())["alpha"]
        return float(given[t - 2] if isinstance(given, list) else given)

    def estimate(self, t: int):
        def run(context: RunContext) -> Artefacts:
            assert self.data.validation is not None
            networks = (load_model(context.artefacts[name]) for name in ("round-1", f"distilled-{t}"))
            found = estimate_alpha(*networks, self.data.validation, clip=self.args.clip)
            path = context.folder / f"alpha-{t}.json"
            if context.is_main:
                write_atomically(path, json.dumps({"alpha": found.alpha, "raw": found.raw}))
            context.accelerator.wait_for_everyone()
            context.say(f"round {t}: alpha = {found.alpha:.3f} (raw {found.raw:.3f})")
            return {f"alpha-{t}": path}

        return run

    def ship(self, context: RunContext) -> Artefacts:
        """The artefact `student`: the last round, or the one with the smallest squared error on validation images."""
        names = [f"round-{t}" for t in range(1, self.args.rounds + 1)]
        chosen = names[-1]
        if self.args.ship == "best":
            assert self.data.validation is not None
            networks = {name: load_model(context.artefacts[name]) for name in names}
            errors = {
                name: float(probability_error(*m.predict(n, self.data.validation))) for name, n in networks.items()
            }
            chosen = min(errors, key=lambda name: errors[name])
            context.log(kind="ship", errors=errors, chosen=chosen)
        target, network = context.folder / "student", load_model(context.artefacts[chosen])
        if context.is_main:
            replace_folder(target, lambda folder: self.save(network, folder))
        context.accelerator.wait_for_everyone()
        return {"student": target, "teacher": context.artefacts[names[0]]}


def stages(config: SelfDistillationRun, context: RunContext) -> list[Stage]:
    data = load_data(config.data, config.seed)
    check(config, data)
    return Rounds(config, data).stages()


def check(config: SelfDistillationRun, data: Data) -> None:
    """What can be wrong with the config, before anything trains."""
    args = config.method_args
    given = args.alpha if isinstance(args.alpha, list) else [] if args.alpha == "auto" else [args.alpha]
    if any(not 0 <= alpha <= 1 for alpha in given):
        raise InputError(f"method_args.alpha = {args.alpha}: allowed: 'auto', or numbers in [0, 1]")
    if isinstance(args.alpha, list) and len(given) != args.rounds - 1:
        raise InputError(
            f"method_args.alpha = {args.alpha}: {len(given)} values; allowed: {args.rounds - 1}, rounds - 1"
        )
    if data.validation is None and ((args.alpha == "auto" and args.rounds > 1) or args.ship == "best"):
        raise InputError("data.validation: must be above 0, alpha: auto and ship: best are decided on held-out images")
    runs.check_monitor(config.train, data, "train", m.VALIDATION)
    with torch.random.fork_rng(devices=[]):
        runs.try_forward(create_model(config.student, data, field="student"), data, "student")


def evaluate(config: SelfDistillationRun, artefacts: Artefacts) -> dict[str, Any]:
    """The shared metrics; the squared error; accuracy, squared error and alpha of each round."""
    data = load_data(config.data, config.seed)
    rounds = Rounds(config, data)
    result: dict[str, Any] = {}
    logits = {}
    for name, artefact in (("student", "student"), *((f"round_{t}", f"round-{t}") for t in _numbers(config))):
        logits[name], labels = m.predict(load_model(artefacts[artefact]), data.test)
        found = m.classification_metrics(logits[name], labels)
        error = float(probability_error(logits[name], labels))
        if name == "student":
            result.update(m.prefixed("student", {**found, "squared_error": error}))
        else:
            result.update(m.prefixed(name, {"accuracy": found["accuracy"], "squared_error": error}))
    for t in _numbers(config)[1:]:
        result[f"round_{t}/alpha"] = rounds.alpha(artefacts, t)
        if config.method_args.alpha == "auto":
            result[f"round_{t}/alpha_raw"] = json.loads(artefacts[f"alpha-{t}"].read_text())["raw"]
    result["agreement"] = m.agreement(logits["student"], logits["round_1"])
    return {
        **result,
        "confusion_matrix": m.confusion_matrix(logits["student"], labels),
        "class_names": data.class_names,
    }


def _numbers(config: SelfDistillationRun) -> list[int]:
    return list(range(1, config.method_args.rounds + 1))


def predict(config: SelfDistillationRun, artefacts: Artefacts, count: int) -> list[dict[str, Any]]:
    """Test images with truth and the student's answer, half of them errors if there are any."""
    student = {"student": artefacts["student"]}
    return runs.predict(config, student, count, data=load_data(config.data, config.seed))  # type: ignore[arg-type]


METHOD = Method("self_distillation_kernel", __doc__ or "", SelfDistillationRun, stages, evaluate, predict)
