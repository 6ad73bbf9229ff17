"""Efficient Dataset Distillation through Alignment with Smooth and High-Quality Expert Trajectories
(arXiv 2310.10541, 2023).

Trajectory matching (MTT, arXiv 2203.11932) learns a few images per class, and a learning rate eta, such that training
on them moves a network as training on the real data moves experts: from an expert's weights theta*_s at epoch s, N
steps on the images should end at theta*_{s+M}. Stronger experts are harder to follow; AST makes them smooth,

    L_expert = gamma_e CE + lambda mean_pixels ( || d sum_k z_k / dx ||_2 over channels - 1 )^2                      (1)
               gamma_e = .5, .55 ... .95 in the first 10 epochs, then 1 ("clipping loss"); the penalty sees x as it is

and the alignment sturdier: representative first images (k-means on an expert's logits), and from a perturbed start

    w        = w* + a (d / ||d||_F) * w*,  d ~ N(0, I), for every convolution weight of theta*_s                    (2)
    l_n      = omega_s CE(theta_{n-1}; aug(batch of images)),  h = floor(S_max / 2)                                 (3)
               omega_s = log_5(s - h + 8) for s >= h, 1 / log_5(h - s + 8) before: the balance over start epochs
    v_n      = mu v_{n-1} + grad l_n,   theta_n = theta_{n-1} - eta v_n,   n = 1 .. N                               (4)
    m_i      = || theta_{n_i} - theta*_{s+i} ||^2 / || theta_0 - theta*_{s+i} ||^2,  n_i = i floor(N / M), n_M = N  (5)
    L        = m_M + sum_{i<M} b_i m_i,   b_i = 1 (aggregate) or i / M (adaptive)                                   (6)

(6) is minimised over the images and eta through all N steps (4); the experts never change. Images live in the space
that networks see. s is drawn from 0 .. S_max - 1. With gamma = 1, lambda = 0, a = 0, omega = 1, mu = 0, m_M alone,
random first images and experts without momentum it is MTT. The numbers of the equations are this file's; the values
are those of the authors' code, shenjiyuan123/AST-Alignment-with-Smooth-Expert, which the paper's setting is taken from.
So is the norm in (1), over the channels of each pixel; `penalty_norm: image` takes it over the image, as gradient
penalties usually do (arXiv 1704.00028). Which of the two the paper means is not confirmed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call

from kd_classification import dataset_distillation as dd
from kd_classification.data import Batch
from kd_classification.engine.diff_augment import DiffAugment
from kd_classification.engine.experts import ExpertTraining, Trajectory, as_parameters, open_pool, step_lengths
from kd_classification.engine.synthetic import LearnableImages, SyntheticSet
from kdcore.config import MethodConfig, TrainConfig
from kdcore.data import mix, seeded
from kdcore.distiller import LossTerms, Player, freeze
from kdcore.errors import InputError, RunFailed
from kdcore.method import Method
from kdcore.optim import make_optimizer
from kdcore.stages import Artefacts, RunContext, Stage
from kdcore.training import TrainSetup

Intermediate = Literal["aggregate", "adaptive", "none"]
PenaltyNorm = Literal["pixel", "image"]


class SmoothTrajectoriesConfig(MethodConfig):
    """The defaults are CIFAR-100 with 1 image per class."""

    clipping: float = Field(0.5, gt=0, le=1, description="gamma of epoch 0, the damped loss of the experts; 1: none")
    clipping_epochs: int = Field(10, ge=1, description="epochs over which gamma rises to 1")
    gradient_penalty: float = Field(2.0, ge=0, description="lambda, weight of the experts' gradient penalty")
    penalty_norm: PenaltyNorm = Field(
        "pixel", description="what is to have gradients of length 1: each pixel over its channels, or the whole image"
    )
    restart_momentum: bool = Field(True, description="experts: momentum starts anew at each milestone of the rate")
    steps: int = Field(20, ge=1, description="N, inner steps on the synthetic images")
    expert_epochs: int = Field(3, ge=1, description="M, epochs of the expert that these steps are to cover")
    max_start_epoch: int = Field(20, ge=1, description="S_max, one more than the latest epoch to start from")
    batch_size: int | None = Field(None, ge=1, description="synthetic images in an inner step; null: all")
    momentum: float = Field(0.9, ge=0, lt=1, description="mu, momentum of the inner steps")
    perturbation: float = Field(1.0, ge=0, description="a, size of the perturbation of the start")
    balance: bool = Field(True, description="weight the inner loss by the start epoch (omega)")
    intermediate: Intermediate = Field("aggregate", description="weights b_i of the matches on the way; none: none")
    rate: float = Field(0.01, gt=0, description="first value of the learned rate eta")
    rate_lr: float = Field(1e-5, ge=0, description="learning rate of eta")
    graph_steps: int | None = Field(
        None, ge=1, description="inner steps, from the last, whose gradients are differentiated; null: all (exact)"
    )


# ---------------------------------------------------------------- experts


def clipping_coefficient(epoch: int, start: float = 0.5, epochs: int = 10) -> float:
    """gamma_e of (1): from `start` in epoch 0 in equal steps to 1 in epoch `epochs`."""
    return min(1.0, start + (1 - start) * epoch / epochs)


def gradient_penalty(logits: Tensor, inputs: Tensor, norm: PenaltyNorm = "pixel") -> Tensor:
    """Mean over images and pixels of ( ||g||_2 over channels - 1 )^2, g the gradient of the summed logits, (1).

    logits (B, K) with the graph to inputs (B, C, H, W) -> scalar with the graph to the weights. `image`: mean over
    images, the norm over all of an image's values.
    """
    g = torch.autograd.grad(logits.sum(), inputs, create_graph=True)[0]
    return ((g if norm == "pixel" else g.flatten(1)).norm(dim=1) - 1).square().mean()


class SmoothExpert(ExpertTraining):
    """Trains an expert by (1). `train` is its budget: the optimiser, and the milestones at which momentum restarts."""

    def __init__(self, network: nn.Module, *, args: SmoothTrajectoriesConfig, train: TrainConfig, **arguments: Any):
        super().__init__(network, **arguments, keep="every")
        self.args, self.train_config = args, train

    def loss(self, batch: Batch, player: str = "expert") -> LossTerms:
        inputs = self.preprocessing.inputs(batch.images)
        gamma = clipping_coefficient(self.progress.epoch, self.args.clipping, self.args.clipping_epochs)
        terms = LossTerms(ce=(gamma, self.cross_entropy(inputs, batch.labels)))
        if self.args.gradient_penalty > 0:
            seen = inputs.detach().requires_grad_()
            penalty = gradient_penalty(self.student(seen), seen, self.args.penalty_norm)
            terms["penalty"] = (self.args.gradient_penalty, penalty)
        return terms

    def players(self) -> list[Player]:
        return [Player("expert", self.student, optimizer=self._optimizer)]

    def _optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        player = Player("expert", self.student, self.train_config.optimizer, param_groups=groups)
        optimizer = make_optimizer(player, self.train_config)

        def before(optimizer: Any, *_: Any) -> None:
            per_epoch = self.progress.steps // self.progress.epochs
            if self.progress.step in {round(m * per_epoch) for m in self.train_config.schedule.milestones}:
                optimizer.state.clear()

        if self.args.restart_momentum:
            optimizer.register_step_pre_hook(before)
        return optimizer


# ---------------------------------------------------------------- alignment


def balance_weight(start: int, max_start: int) -> float:
    """omega_s of (3). It jumps at h: just before it is 1 / log_5(9), from it on log_5(8) and more."""
    distance = start - max_start // 2
    return math.log(distance + 8, 5) if distance >= 0 else 1 / math.log(8 - distance, 5)


def match_steps(steps: int, epochs: int) -> list[int]:
    """n_1 .. n_{M-1} of (5): after how many inner steps the expert's intermediate epochs are matched."""
    return [steps // epochs * i for i in range(1, epochs)]


def perturb(weight: Tensor, direction: Tensor, size: float = 1.0) -> Tensor:
    """(2), of one convolution weight; `direction` has its shape.

    >>> perturb(torch.tensor([[1.0, 1.0], [2.0, 0.5]]), torch.tensor([[1.0, -2.0], [2.0, 4.0]])).tolist()
    [[1.2000000476837158, 0.6000000238418579], [2.799999952316284, 0.8999999761581421]]
    """
    return weight + size * direction / direction.norm() * weight


def perturbed(flat: Tensor, network: nn.Module, size: float = 1.0) -> Tensor:
    """The weights (P,) with (2) on every 4-D tensor; linear weights, biases and norms stay."""
    if size == 0:
        return flat
    parts = as_parameters(flat, network).values()
    moved = (perturb(w, torch.randn_like(w), size) if w.ndim == 4 else w for w in parts)
    return torch.cat([w.reshape(-1) for w in moved])


def match_loss(student: Tensor, target: Tensor, start: Tensor) -> Tensor:
    """(5): squared distance of the student's weights from the target's, over the start's; all (P,)."""
    return F.mse_loss(student, target, reduction="sum") / F.mse_loss(start, target, reduction="sum")


def unroll(
    gradient: Callable[[Tensor, int], Tensor], theta: Tensor, rate: Tensor, momentum: float, steps: int
) -> Iterator[Tensor]:
    """theta_1 .. theta_N of (4) from theta_0, with `gradient(theta_{n-1}, n - 1)` as the gradient of l_n."""
    velocity = torch.zeros_like(theta)
    for n in range(steps):
        velocity = momentum * velocity + gradient(theta, n)
        theta = theta - rate * velocity
        yield theta


class Window(NamedTuple):
    """An expert's weights at epochs s, s + 1 .. s + M, (M + 1, P), and s."""

    parameters: Tensor
    start: int


class Windows:
    """Windows of random experts at random starts, a function of the seed, the epoch and the position in it."""

    def __init__(self, pool: Sequence[Trajectory], max_start: int, epochs: int, seed: int, count: int = 100):
        self.pool, self.max_start, self.epochs, self.seed, self.count = pool, max_start, epochs, seed, count
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Window]:
        for k in range(self.count):
            generator = torch.Generator().manual_seed(mix(self.seed, self.epoch, k))
            expert = self.pool[int(torch.randint(len(self.pool), (), generator=generator))]
            start = int(torch.randint(self.max_start, (), generator=generator))
            yield Window(expert.rows(start, start + self.epochs + 1), start)


class SmoothTrajectories(dd.ImageDistiller):
    """Learns `images` (network inputs) and `rate` (eta). One player, `images`, whose second group is the rate.

    network: the experts' architecture; its own weights do not matter. `image_lr` is the images' rate, to which that of
    eta is relative. Further arguments as in `SmoothTrajectoriesConfig`.
    """

    def __init__(
        self,
        images: LearnableImages,
        network: nn.Module,
        augment: DiffAugment,
        *,
        image_lr: float = 1000.0,
        **arguments: Any,
    ):
        super().__init__()
        self.args = SmoothTrajectoriesConfig.model_validate(arguments)
        if self.args.steps < self.args.expert_epochs:
            raise InputError(
                f"method_args.steps = {self.args.steps}: must be at least expert_epochs = {self.args.expert_epochs}"
            )
        self.student, self.augment, self.image_lr = images, augment, image_lr
        self.network = freeze(network).train()
        self.rate = nn.Parameter(torch.tensor(self.args.rate))

    def players(self) -> list[Player]:
        scale = self.args.rate_lr / self.image_lr
        groups = [{"params": [self.student.images]}, {"params": [self.rate], "lr_scale": scale}]
        return [Player("images", self, param_groups=groups)]

    def loss(self, batch: Window, player: str = "images") -> LossTerms:
        """(6). `batch.parameters` (M + 1, P) is not changed."""
        args, experts = self.args, batch.parameters
        start = perturbed(experts[0], self.network, args.perturbation)
        at = match_steps(args.steps, args.expert_epochs) if args.intermediate != "none" else []
        middle: list[Tensor] = []
        theta = start
        for n, theta in enumerate(self.inner_steps(start, batch.start), start=1):
            while len(middle) < len(at) and at[len(middle)] == n:
                i = len(middle) + 1
                b = 1.0 if args.intermediate == "aggregate" else i / args.expert_epochs
                middle.append(b * match_loss(theta, experts[i], start))
        terms = LossTerms(final=(1.0, match_loss(theta, experts[-1], start)))
        if middle:
            terms["middle"] = (1.0, torch.stack(middle).sum())
        return terms

    def inner_steps(self, start: Tensor, epoch: int) -> Iterator[Tensor]:
        """theta_1 .. theta_N of (4), each (P,) with the graph to the images and to eta."""
        args, images, labels = self.args, self.student.images, self.student.labels
        weight = balance_weight(epoch, args.max_start_epoch) if args.balance else 1.0
        exact_from = 0 if args.graph_steps is None else args.steps - args.graph_steps
        size = args.batch_size or len(images)
        order: list[Tensor] = []

        def gradient(theta: Tensor, n: int) -> Tensor:
            nonlocal order
            order = order or list(torch.randperm(len(images), device=images.device).split(size))
            index = order.pop()
            logits = functional_call(self.network, as_parameters(theta, self.network), (self.augment(images[index]),))
            loss = weight * F.cross_entropy(logits, labels[index])
            return torch.autograd.grad(loss, theta, create_graph=n >= exact_from, retain_graph=True)[0]

        return unroll(gradient, start.detach().requires_grad_(), self.rate, args.momentum, args.steps)


# ---------------------------------------------------------------- stages and evaluation


def check(config: dd.Run) -> None:
    args, epochs = config.method_args, config.experts.train.epochs
    if args.max_start_epoch - 1 + args.expert_epochs > epochs:
        raise InputError(
            f"method_args.max_start_epoch = {args.max_start_epoch}: with expert_epochs = {args.expert_epochs} "
            f"it reaches epoch {args.max_start_epoch - 1 + args.expert_epochs}, experts.train.epochs is {epochs}"
        )
    if args.steps < args.expert_epochs:
        raise InputError(f"method_args.steps = {args.steps}: must be at least expert_epochs = {args.expert_epochs}")
    if config.synthetic.factor != 1:
        raise InputError(f"synthetic.factor = {config.synthetic.factor}: must be 1, the method has no multi-formation")
    if config.train.optimizer.name != "sgd" and config.synthetic.learn:
        raise InputError(f"train.optimizer.name = '{config.train.optimizer.name}': must be sgd, of images and rate")


def make_expert(problem: dd.Problem, network: nn.Module) -> ExpertTraining:
    config = problem.config
    return SmoothExpert(network, args=config.method_args, train=config.experts.train, **dd.expert_arguments(problem))


def make_distiller(problem: dd.Problem, images: LearnableImages, **changes: Any) -> SmoothTrajectories:
    config = problem.config
    arguments = {**config.method_args.model_dump(), **changes}
    augment, lr = DiffAugment.of(config.augment), config.train.optimizer.lr
    return SmoothTrajectories(images, problem.network(), augment, image_lr=lr, **arguments)


def build(problem: dd.Problem, images: LearnableImages, experts: Path, context: RunContext) -> TrainSetup:
    args = problem.config.method_args
    distiller = make_distiller(problem, images)
    pool = open_pool(experts, distiller.network)
    return TrainSetup(distiller, Windows(pool, args.max_start_epoch, args.expert_epochs, problem.config.seed))


def stages(config: dd.Run, context: RunContext) -> list[Stage]:
    problem = dd.Problem.of(config)
    dd.check(problem, context, learns_rate=True)
    check(config)
    of_experts = {"clipping", "clipping_epochs", "gradient_penalty", "penalty_norm", "restart_momentum"}
    identity = {"smooth": config.method_args.model_dump(include=of_experts)}
    return [
        dd.expert_stage(problem, make_expert, identity),
        dd.synthetic_stage(problem, build, learn_inputs=True),
    ]


def smoothness(pool: Sequence[Trajectory]) -> dict[str, float]:
    """Of the experts: mean distance of neighbouring epochs' weights, and its deviation over the epochs / the mean."""
    lengths = torch.tensor([list(step_lengths(expert)) for expert in pool], dtype=torch.float64)
    variation = lengths.std(1) / lengths.mean(1) if lengths.shape[1] > 1 else torch.zeros(1)
    return {"step_length": float(lengths.mean()), "step_variation": float(variation.mean())}


def remaining_distance(
    problem: dd.Problem, saved: SyntheticSet, pool: Sequence[Trajectory], windows: int = 20
) -> float:
    """Mean m_M of the saved images and rate from unperturbed starts: what of an expert's way they leave open."""
    images = LearnableImages(problem.preprocessing().inputs(saved.images), saved.labels)
    with seeded(mix(problem.config.seed, 53)):
        distiller = make_distiller(problem, images, perturbation=0.0, intermediate="none", rate=saved.rate)
        args = distiller.args
        draws = Windows(pool, args.max_start_epoch, args.expert_epochs, mix(problem.config.seed, 59), windows)
        return sum(distiller.loss(window)["final"][1].item() for window in draws) / windows


def evaluate(config: dd.Run, artefacts: Artefacts) -> dict[str, Any]:
    """The shared metrics; of the experts, how smooth they are; of a learned set, the distance that it leaves open."""
    problem, saved = dd.Problem.of(config), SyntheticSet.load(artefacts["synthetic"])
    if saved.rate is not None and saved.rate <= 0:
        raise RunFailed(f"the learned rate became {saved.rate:.3g}: lower method_args.rate_lr or train.optimizer.lr")
    result = dd.evaluate(config, artefacts, problem=problem)
    with torch.random.fork_rng(devices=[]):
        pool = open_pool(artefacts["experts"], problem.network())
    result |= {f"teacher/{name}": value for name, value in smoothness(pool).items()}
    if saved.rate is not None:
        result["remaining_distance"] = remaining_distance(problem, saved, pool)
    return result


METHOD = Method(
    "smooth_trajectories",
    __doc__ or "",
    dd.DistillationRun[SmoothTrajectoriesConfig],
    stages,
    evaluate,
    dd.predict,
)
