"""Dataset Distillation with Neural Characteristic Function: A Minmax Perspective (arXiv 2502.20653, 2025).

A few images per class are learned so that, class by class, their features have the same distribution as the real
images' features. Two distributions are equal where their characteristic functions are, so these are compared, at
frequencies that a small sampling network psi proposes: psi makes the discrepancy large, the images make it small.

    phi_r(t) = 1/n sum_i exp(j <t, f_i>)      f_i: real features of length 1, t in R^d; phi_s of the synthetic ones  (1)
    amp(t)   = ( |phi_r| - |phi_s| )^2                                                                              (2)
    pha(t)   = 2 |phi_r| |phi_s| (1 - cos(arg phi_r - arg phi_s)) = 2 ( |phi_r| |phi_s| - Re phi_r phi_s^* )        (3)
    NCFD     = mean_t sqrt( alpha amp(t) + (1 - alpha) pha(t) )                                              (paper: 8)
    t        = a * e,  a = psi(noise) in (-1, 1)^d,  e ~ N(0, I): a scale mixture of T/16 normals                   (4)
    f        = network at  l theta_initial + (1 - l) theta_trained,  l ~ U(0, 1), a new draw in every iteration     (5)
    L_c      = 300 NCFD of class c;   afterwards  CE( trained network(aug(S_c)), c ), the calibration               (6)

An iteration takes one step of the images' optimiser for every class, then one for every class's calibration; psi steps
up the gradient of the same L_c from the same forward pass. Real and synthetic images share one differentiable
augmentation. A stored image holds rho x rho images (multi-formation, rho = 2), decoded before anything else. In the
config an epoch of `train` is an iteration. The numbers of the equations are this file's; constants that the paper does
not give (300, the optimiser of psi, the plateau schedule) are those of the authors' code, gszfwsb/NCFM. There psi never
moves, because its descent and ascent add up in one gradient: that is `sampling: tiled` with `sampler_lr: 0`.

`matching: mean` replaces (6) by the squared distance of the mean features, distribution matching (DM, Zhao and Bilen,
arXiv 2110.04181), with `networks: random` on random networks, as DM has it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from kd_classification import dataset_distillation as dd
from kd_classification.engine.diff_augment import DiffAugment
from kd_classification.engine.experts import load_parameters, open_pool
from kd_classification.engine.real_images import ClassBatch, ClassSteps
from kd_classification.engine.synthetic import LearnableImages, Preprocessing, SyntheticSet, decode
from kdcore.config import MethodConfig, OptimizerConfig, ScheduleConfig, TrainConfig
from kdcore.data import mix, seeded
from kdcore.distiller import LossTerms, Player, freeze
from kdcore.errors import InputError
from kdcore.method import Method
from kdcore.optim import make_optimizer
from kdcore.stages import Artefacts, RunContext, Stage
from kdcore.training import TrainSetup

Sampling = Literal["scale_mixture", "tiled", "gaussian"]
FLOOR = 1e-12  # under the root of the discrepancy: keeps its gradient finite where the two functions agree


class NCFMConfig(MethodConfig):
    alpha: float = Field(0.5, ge=0, le=1, description="weight of the amplitude difference; the phase gets 1 - alpha")
    frequencies: int = Field(1024, ge=1, description="T, frequency vectors in each class step")
    sampling: Sampling = Field(
        "scale_mixture",
        description="frequencies: psi's scales times normals (paper), psi's output itself (tiled, release), or normals",
    )
    components: int | None = Field(None, ge=2, description="J, rows that psi gives at a time; null: T / 16")
    sampler_lr: float = Field(
        1e-3, ge=0, description="learning rate of psi (SGD, momentum sampler_momentum); 0: psi stays as it starts"
    )
    sampler_momentum: float = Field(0.5, ge=0, lt=1, description="momentum of psi")
    loss_scale: float = Field(300.0, gt=0, description="factor on the discrepancy")
    real_batch: int = Field(1024, ge=2, description="real images of the class in each step, at most")
    calibration_passes: int = Field(1, ge=0, description="passes over the classes with the calibration loss")
    calibration_weight: float = Field(1.0, ge=0, description="weight of the calibration loss")
    matching: Literal["ncfd", "mean"] = Field("ncfd", description="what is matched; mean: squared distance of means")
    networks: Literal["interpolated", "trained", "random"] = Field(
        "interpolated", description="feature networks: between an expert's start and end, its end, or fresh ones"
    )
    plateau_patience: int | None = Field(
        500, ge=0, description="iterations without a better mean loss before the images' rate is halved; null: never"
    )


# ---------------------------------------------------------------- losses


def characteristic(features: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Real and imaginary part (T,) of the empirical characteristic function (1) of features (n, d) at t (T, d)."""
    angles = frequencies @ features.T
    return angles.cos().mean(1), angles.sin().mean(1)


def ncfd(real: Tensor, synthetic: Tensor, frequencies: Tensor, alpha: float = 0.5) -> Tensor:
    """Neural characteristic function discrepancy (paper: eq. 8), a scalar in float32 or better.

    real (n, d) and synthetic (k, d) features, in any number and order; frequencies (T, d). With alpha = 1/2 it is
    sqrt(1/2) mean_t |phi_r(t) - phi_s(t)|. Symmetric in the two sets and in t -> -t. The phase term is at least 1e-12.

    Raises InputError for other shapes or an alpha outside [0, 1].

    >>> ncfd(torch.zeros(1, 1), torch.full((1, 1), torch.pi / 2), torch.ones(1, 1)).item()  # amp 0, pha 2
    1.0
    """
    if (
        not (real.ndim == synthetic.ndim == frequencies.ndim == 2)
        or len({x.shape[1] for x in (real, synthetic, frequencies)}) != 1
    ):
        shapes = ", ".join(str(tuple(x.shape)) for x in (real, synthetic, frequencies))
        raise InputError(f"real, synthetic, frequencies: shapes {shapes}; allowed: (n, d), (k, d), (T, d)")
    if not 0 <= alpha <= 1:
        raise InputError(f"alpha = {alpha}: must be between 0 and 1")
    dtype = torch.promote_types(synthetic.dtype, torch.float32)
    with torch.autocast(synthetic.device.type, enabled=False):
        t = frequencies.to(dtype)
        (re_r, im_r), (re_s, im_s) = characteristic(real.to(dtype), t), characteristic(synthetic.to(dtype), t)
        norm_r, norm_s = _modulus(re_r, im_r), _modulus(re_s, im_s)
        amplitude = (norm_r - norm_s).square()
        phase = (2 * (norm_r * norm_s - re_r * re_s - im_r * im_s)).clamp_min(FLOOR)
        inside = alpha * amplitude + (1 - alpha) * phase
        return (inside if alpha < 1 else inside + FLOOR).sqrt().mean()


def _modulus(real: Tensor, imaginary: Tensor) -> Tensor:
    """|z|, with gradient 0 instead of NaN at z = 0."""
    return (real.square() + imaginary.square()).clamp_min(torch.finfo(real.dtype).tiny).sqrt()


def mean_distance(real: Tensor, synthetic: Tensor) -> Tensor:
    """DM's loss: squared distance of the mean features of (n, d) and (k, d), a scalar."""
    return (real.mean(0) - synthetic.mean(0)).square().sum()


class FrequencySampler(nn.Module):
    """psi: noise (J, d) -> frequencies (T, d), by three layers of width d with batch normalisation over the J rows.

    `scale_mixture` multiplies the J rows a, repeated, by normals of their own (paper, section 4.2.2); `tiled` repeats
    a itself, as the release does, so that only J frequencies differ.
    """

    def __init__(self, width: int, frequencies: int, components: int | None = None, sampling: Sampling = "tiled"):
        super().__init__()
        self.width, self.frequencies, self.sampling = width, frequencies, sampling
        self.components = max(2, frequencies // 16) if components is None else components
        layers: list[nn.Module] = []
        for activation in (nn.LeakyReLU(0.2), nn.LeakyReLU(0.2), nn.Tanh()):
            norm = nn.BatchNorm1d(width, track_running_stats=False)  # the rows at hand, in every mode
            layers += [nn.Linear(width, width), norm, activation]
        self.layers = nn.Sequential(*layers)

    def noise(self, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """What `forward` takes: the input (J, d) and, for the mixture, the normals (T, d)."""
        normals = torch.randn(self.frequencies, self.width, device=device) if self.sampling == "scale_mixture" else None
        return torch.randn(self.components, self.width, device=device), normals

    def forward(self, noise: Tensor, normals: Tensor | None = None) -> Tensor:
        a = self.layers(noise)
        rows = a.repeat(-(-self.frequencies // len(a)), 1)[: self.frequencies]
        return rows if normals is None else rows * normals


# ---------------------------------------------------------------- the method


class NCFM(dd.ImageDistiller):
    """Learns `images` (pixels). Players: `images`, and `frequencies` (psi) unless sampling is `gaussian`.

    network: the architecture of the features, frozen; its weights are set anew by `epoch_start`, from `initial` and
    `trained` (P, parameters), or from `fresh()` with networks: random. Further arguments as in `NCFMConfig`;
    `optimizer` is the images'. In a loop of your own call `epoch_start` before and `epoch_end` after each iteration,
    and set `progress.epoch`.
    """

    def __init__(
        self,
        images: LearnableImages,
        network: nn.Module,
        initial: Tensor,
        trained: Tensor,
        preprocessing: Preprocessing,
        augment: DiffAugment,
        *,
        factor: int = 1,
        optimizer: OptimizerConfig | None = None,
        fresh: Callable[[], nn.Module] | None = None,
        seed: int = 0,
        **arguments: Any,
    ):
        super().__init__()
        self.args = NCFMConfig.model_validate(arguments)
        self.student, self.preprocessing, self.augment = images, preprocessing, augment
        self.network, self.classifier = freeze(network), freeze(copy.deepcopy(network))
        self.register_buffer("initial", initial, persistent=False)
        self.register_buffer("trained", trained, persistent=False)
        self.factor, self.optimizer, self.fresh, self.seed = factor, optimizer, fresh, seed
        self.sampler: FrequencySampler | None = None
        if self.args.matching == "ncfd" and self.args.sampling != "gaussian":
            width = self.features(images.images[:1].detach()).shape[1]
            self.sampler = FrequencySampler(width, self.args.frequencies, self.args.components, self.args.sampling)
        self.register_buffer("plateau", torch.tensor([torch.inf, 0.0, 1.0], dtype=torch.float64))  # best, bad, factor
        self.register_buffer("loss_sum", torch.zeros(()))
        self.last = {"match": torch.zeros(()), "calibrate": torch.zeros(())}
        self.matching, self.rate_factor = False, 1.0
        self.held: tuple[Tensor, Tensor, Any] | None = None

    # ------------------------------------------------------------ who trains

    def players(self) -> list[Player]:
        images = Player("images", self.student, optimizer=self._images_optimizer if self.optimizer else None)
        if self.sampler is None:
            return [images]
        return [images, Player("frequencies", self.sampler, self._sampler_optimizer, ScheduleConfig())]

    def _images_optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """`train.optimizer`, its rate times the plateau's factor in every step."""
        assert self.optimizer is not None
        player = Player("images", self.student, self.optimizer, param_groups=groups)
        optimizer = make_optimizer(player, TrainConfig(steps=1))
        rates: list[float] = []

        def before(optimizer: Any, *_: Any) -> None:
            rates[:] = [group["lr"] for group in optimizer.param_groups]
            for group in optimizer.param_groups:
                group["lr"] *= self.rate_factor

        def after(optimizer: Any, *_: Any) -> None:
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate

        optimizer.register_step_pre_hook(before)
        optimizer.register_step_post_hook(after)
        return optimizer

    def _sampler_optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD(groups, lr=self.args.sampler_lr, momentum=self.args.sampler_momentum)

        def before(optimizer: Any, *_: Any) -> None:
            if not self.matching:  # a calibration step leaves psi and its momentum alone
                optimizer.zero_grad()

        optimizer.register_step_pre_hook(before)
        return optimizer

    # ------------------------------------------------------------ an iteration

    def epoch_start(self) -> None:
        """Draws the networks of the iteration (5), a function of the seed and the epoch."""
        key = mix(self.seed, self.progress.epoch)
        generator = torch.Generator().manual_seed(key)
        k = int(torch.randint(len(self.trained), (), generator=generator))
        share = float(torch.rand((), generator=generator))
        if self.args.networks == "random":
            if self.fresh is None:
                raise InputError("fresh: a function that makes a network is needed for networks: random")
            with seeded(key):
                self.network.load_state_dict(self.fresh().state_dict())
        else:
            share = share if self.args.networks == "interpolated" else 0.0
            load_parameters(self.network, torch.lerp(self.trained[k], self.initial[k], share))
        if self.args.calibration_passes:
            load_parameters(self.classifier, self.trained[k])
        self.rate_factor = float(self.plateau[2])

    @torch.no_grad()
    def epoch_end(self) -> None:
        """Brings the pixels back to [0, 1], and halves the rate where the mean loss has long not become smaller."""
        self.student.images.clamp_(0, 1)
        if self.args.plateau_patience is not None:
            value = float(self.loss_sum) / (int(self.student.labels[-1]) + 1)
            best, bad, factor = self.plateau.tolist()
            best, bad = (value, 0.0) if value < best * (1 - 1e-4) else (best, bad + 1)
            if bad > self.args.plateau_patience:
                bad, factor = 0.0, factor / 2
            self.plateau.copy_(torch.tensor([best, bad, factor]))
        self.loss_sum.zero_()

    def features(self, pixels: Tensor) -> Tensor:
        """Pre-logits features (B, d) of pixels, without augmentation."""
        return self._features(self.preprocessing.inputs(pixels))

    def _features(self, inputs: Tensor) -> Tensor:
        return self.network.forward_head(self.network.forward_features(inputs), pre_logits=True)

    def loss(self, batch: ClassBatch, player: str = "images") -> LossTerms:
        """The images' loss on one class, or psi's on the features that the images' loss has just seen.

        Both terms of the images have a value in every step; the one whose turn it is not keeps its last, as a constant.
        """
        if player == "frequencies":
            return LossTerms(ascent=(1.0, self._ascent()))
        self.matching = len(batch.real) > 0
        name = "match" if self.matching else "calibrate"
        value = self.match(batch) if self.matching else self.calibrate(batch.label)
        terms = {**self.last, name: value}
        self.last[name] = value.detach()
        weights = {"match": 1.0, "calibrate": self.args.calibration_weight}
        self.loss_sum += weights[name] * value.detach()
        names = ["match", "calibrate"] if self.args.calibration_passes else ["match"]
        return LossTerms({key: (weights[key], terms[key].to(value)) for key in names})

    def match(self, batch: ClassBatch) -> Tensor:
        """(6), or DM's loss, of the class."""
        synthetic = decode(self.student.of_class(batch.label), self.factor)
        inputs = (self.preprocessing.inputs(pixels) for pixels in (batch.real, synthetic))
        real, synthetic = self.augment.alike(*inputs)
        with torch.no_grad():
            real = self._features(real)
        synthetic = self._features(synthetic)
        if self.args.matching == "mean":
            return mean_distance(real, synthetic)
        real, synthetic = F.normalize(real, dim=1), F.normalize(synthetic, dim=1)
        if self.sampler is None:
            t = torch.randn(self.args.frequencies, real.shape[1], device=real.device)
        else:
            noise = self.sampler.noise(real.device)
            self.held = real, synthetic.detach(), noise
            t = self.sampler(*noise).detach()
        return self.args.loss_scale * ncfd(real, synthetic, t, self.args.alpha)

    def _ascent(self) -> Tensor:
        """-L_c at the features and the noise of the images' own turn: psi's step and theirs are simultaneous."""
        assert self.sampler is not None
        if not self.matching:
            return sum(parameter.sum() * 0 for parameter in self.sampler.parameters())  # type: ignore[return-value]
        if self.held is None:
            raise InputError("player 'frequencies': its loss follows that of player 'images' on the same batch")
        (real, synthetic, noise), self.held = self.held, None
        return -self.args.loss_scale * ncfd(real, synthetic, self.sampler(*noise), self.args.alpha)

    def calibrate(self, label: int) -> Tensor:
        """Cross-entropy of the trained network on the augmented images of the class."""
        inputs = self.augment(self.preprocessing.inputs(decode(self.student.of_class(label), self.factor)))
        labels = torch.full((len(inputs),), label, device=inputs.device)
        return F.cross_entropy(self.classifier(inputs), labels)


# ---------------------------------------------------------------- stages and evaluation


def build(problem: dd.Problem, images: LearnableImages, experts: Path, context: RunContext) -> TrainSetup:
    config, args = problem.config, problem.config.method_args
    network = problem.network()
    pool = open_pool(experts, network)
    distiller = NCFM(
        images,
        network,
        torch.stack([expert[0] for expert in pool]),
        torch.stack([expert[-1] for expert in pool]),
        problem.preprocessing(),
        DiffAugment.of(config.augment, siamese=True),
        factor=config.synthetic.factor,
        optimizer=config.train.optimizer,
        fresh=problem.network,
        seed=config.seed,
        **args.model_dump(),
    )
    real = problem.train.to(context.accelerator.device)
    return TrainSetup(distiller, ClassSteps(real, args.real_batch, args.calibration_passes, config.seed))


def stages(config: dd.Run, context: RunContext) -> list[Stage]:
    problem = dd.Problem.of(config)
    dd.check(problem, context)
    experts = dd.expert_stage(problem, lambda p, network: dd.plain_expert(p, network, "ends"), {"keep": "ends"})
    return [experts, dd.synthetic_stage(problem, build)]


def evaluate(config: dd.Run, artefacts: Artefacts) -> dict[str, Any]:
    """The shared metrics, and `spread`: 1 where a class's images are as varied as the real ones."""
    problem = dd.Problem.of(config)
    result = dd.evaluate(config, artefacts, problem=problem)
    ratio = dd.feature_spread(problem, SyntheticSet.load(artefacts["synthetic"]))
    return result if ratio is None else {**result, "spread": ratio}


METHOD = Method("ncfm", __doc__ or "", dd.DistillationRun[NCFMConfig], stages, evaluate, dd.predict)
