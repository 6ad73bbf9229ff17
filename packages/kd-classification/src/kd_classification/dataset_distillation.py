"""Data set distillation: the run config, the stages and the evaluation that its methods share.

A run trains experts on the real images (once, cached), learns a synthetic set with them, and is judged by networks
trained from scratch on that set: the architecture of the experts, and others that the set has never seen. The same
config without learning (`synthetic.learn: false`) judges real images of equal number, chosen at random, by herding or
by clustering, or all of them (`init: full`).

The artefact `synthetic` is a `kd_classification.engine.synthetic.SyntheticSet` folder with an ImageFolder in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from kd_classification import __version__, runs
from kd_classification.data import AugmentConfig, Data, DataConfig, load_data
from kd_classification.engine import convnet, fresh, real_images
from kd_classification.engine.diff_augment import DiffAugment, DSAConfig
from kd_classification.engine.experts import (
    ExpertPool,
    ExpertTraining,
    Keep,
    check_stateless,
    load_parameters,
    open_pool,
)
from kd_classification.engine.real_images import Init, RealImages
from kd_classification.engine.synthetic import (
    LearnableImages,
    Preprocessing,
    SyntheticSet,
    Whitening,
    decoded_labels,
)
from kd_classification.models import ModelConfig, create_model
from kdcore.config import Config, MethodConfig, MethodRunConfig, TrainConfig
from kdcore.data import mix, seeded
from kdcore.distiller import Distiller
from kdcore.errors import InputError
from kdcore.stages import Artefacts, CachedStage, Procedure, RunContext, Stage, replace_folder
from kdcore.training import TrainSetup, TrainStage

A = TypeVar("A", bound=MethodConfig)


class SyntheticConfig(Config):
    """The set that is learned, or chosen."""

    per_class: int = Field(10, ge=1, description="images stored per class (IPC)")
    factor: int = Field(1, ge=1, description="multi-formation factor: a stored image is factor x factor tiles")
    init: Init = Field("random", description="first images; full: all real images, only with learn: false")
    learn: bool = Field(True, description="false: the first images are the set, a baseline")

    @model_validator(mode="after")
    def _fits(self) -> SyntheticConfig:
        if self.init == "full" and (self.learn or self.factor > 1):
            raise ValueError("init: full is a baseline: it needs learn: false and factor: 1")
        return self


class ExpertsConfig(Config):
    """Networks trained on the real images."""

    count: int = Field(5, ge=1, description="how many experts, each from its own random start")
    train: TrainConfig = Field(description="training of each expert; needs epochs")
    augment: DSAConfig = Field(default_factory=DSAConfig, description="augmentation of their images, one by one")
    cutmix: float = Field(0.0, ge=0, le=1, description="probability of cutmix in a batch")

    @model_validator(mode="after")
    def _has_epochs(self) -> ExpertsConfig:
        if self.train.epochs is None or self.train.steps is not None:
            raise ValueError("train needs epochs and no steps: weights are kept at the ends of epochs")
        return self


class EvaluationConfig(Config):
    """Networks trained from scratch on the synthetic set."""

    repeats: int = Field(3, ge=1, description="networks of each architecture, each from its own random start")
    networks: dict[str, ModelConfig] = Field(
        default_factory=dict, description="further architectures by the name they get in the metrics"
    )
    train: TrainConfig = Field(description="training of each network; steps make sets of any size cost the same")
    augment: DSAConfig = Field(default_factory=DSAConfig, description="augmentation of the synthetic images")
    cutmix: float = Field(0.0, ge=0, le=1, description="probability of cutmix in a batch")
    learned_rate: bool = Field(False, description="train with the rate learned with the images, where there is one")


class DistillationRun(MethodRunConfig[A], Generic[A]):
    """`train` is the learning of the images; `network` the architecture of experts and student."""

    network: ModelConfig
    data: DataConfig = Field(default_factory=DataConfig)
    zca: float | None = Field(None, gt=0, description="eps of ZCA whitening; None: standardised by mean and std")
    synthetic: SyntheticConfig = Field(default_factory=lambda: SyntheticConfig.model_validate({}))
    augment: DSAConfig = Field(default_factory=DSAConfig, description="augmentation while the images are learned")
    experts: ExpertsConfig
    evaluation: EvaluationConfig


Run = DistillationRun[Any]


# ---------------------------------------------------------------- what a run works on


@dataclass
class Problem:
    """The real images and the architecture of a run."""

    config: Run
    data: Data

    @classmethod
    def of(cls, config: Run) -> Problem:
        return cls(config, load_data(config.data, config.seed))

    @property
    def num_classes(self) -> int:
        return self.data.num_classes

    @cached_property
    def train(self) -> RealImages:
        return RealImages.of(self.data.train_plain, self.num_classes)

    @cached_property
    def test(self) -> RealImages:
        return RealImages.of(self.data.test, self.num_classes)

    @cached_property
    def whitening(self) -> Whitening | None:
        if self.config.zca is None:
            return None
        return Whitening.fit(self.train.images.float() / 255, self.config.zca)

    def preprocessing(self) -> Preprocessing:
        return Preprocessing(self.data.mean, self.data.std, self.whitening)

    def network(self, model: ModelConfig | None = None, field: str = "network") -> nn.Module:
        """A fresh network with random weights from the global generator; `dd_convnet` gets the data's size."""
        model = model or self.config.network
        convnet.register()
        if model.name == convnet.NAME:
            model = model.model_copy(update={"args": {"img_size": self.data.image_size, **model.args}})
        return create_model(model, self.data, field=field)


def check(problem: Problem, context: RunContext, *, learns_rate: bool = False) -> None:
    """Says what is wrong with the config before anything trains. `learns_rate`: the method learns a rate, too."""
    config, data = problem.config, problem.data
    if context.accelerator.num_processes > 1:
        raise InputError(f"{context.accelerator.num_processes} processes: data set distillation runs in one")
    if config.data.augment != AugmentConfig():
        raise InputError("data.augment: give augment, experts.augment and evaluation.augment here, differentiable ones")
    if config.train.accumulation != 1:
        raise InputError(f"train.accumulation = {config.train.accumulation}: must be 1, a step is one loss")
    if config.evaluation.learned_rate and config.synthetic.learn and not learns_rate:
        raise InputError(f"evaluation.learned_rate: {config.method} learns no rate")
    with torch.random.fork_rng(devices=[]):
        network = problem.network()
        runs.try_forward(network, data, "network")
        check_stateless(network)
        for name, model in config.evaluation.networks.items():
            field = f"evaluation.networks.{name}"
            if name == "std" or "/" in name:
                raise InputError(f"{field}: not a name for a network, its metrics would be misread")
            runs.try_forward(problem.network(model, field), data, field)


# ---------------------------------------------------------------- stages

BuildExpert = Callable[[Problem, nn.Module], ExpertTraining]
BuildDistiller = Callable[[Problem, LearnableImages, Path, RunContext], TrainSetup]


def plain_expert(problem: Problem, network: nn.Module, keep: Keep) -> ExpertTraining:
    """Cross-entropy under `experts.augment` and `experts.cutmix`."""
    return ExpertTraining(network, **expert_arguments(problem), keep=keep)


def expert_arguments(problem: Problem) -> dict[str, Any]:
    """What every kind of expert training takes from the config."""
    experts = problem.config.experts
    return {
        "preprocessing": problem.preprocessing(),
        "num_classes": problem.num_classes,
        "augment": DiffAugment.of(experts.augment),
        "cutmix_probability": experts.cutmix,
        "epochs": experts.train.epochs,
    }


def expert_stage(problem: Problem, build: BuildExpert, identity: Mapping[str, Any]) -> Stage:
    """The artefact `experts`, cached. `identity` is what the method's own way of training them depends on."""
    config = problem.config

    def one(seed: int) -> tuple[ExpertTraining, object]:
        return build(problem, problem.network()), problem.train.loader(config.experts.train.batch_size, seed)

    fingerprint = {
        "version": __version__,
        "torch": torch.__version__,
        "network": config.network.model_dump(mode="json"),
        "experts": config.experts.model_dump(mode="json"),
        "data": config.data.model_dump(mode="json"),
        "zca": config.zca,
        "seed": config.seed,
        **identity,
    }
    return CachedStage(ExpertPool(config.experts.count, config.experts.train, one), fingerprint)


def synthetic_stage(problem: Problem, build: BuildDistiller, *, learn_inputs: bool = False) -> Stage:
    """The artefact `synthetic`: the set that `build`'s distiller learns, or with learn: false the first images.

    `build(problem, images, experts, context)` gets the learnable first images: pixels, or with `learn_inputs` what the
    network sees. A distiller with an attribute `rate` (a scalar tensor) saves it with the set.
    """
    config = problem.config

    def write(pixels: Tensor, labels: Tensor, folder: Path, rate: float | None = None) -> None:
        names = problem.data.class_names
        made = SyntheticSet(pixels, labels, names, problem.preprocessing(), factor=config.synthetic.factor, rate=rate)
        made.save(folder, made_by=config.method)

    def choose(context: RunContext) -> Artefacts:
        pixels, labels = first_images(problem, context)
        replace_folder(context.folder / "synthetic", lambda folder: write(pixels, labels, folder))
        return {"synthetic": context.folder / "synthetic"}

    def setup(context: RunContext) -> TrainSetup:
        pixels, labels = first_images(problem, context)
        start = problem.preprocessing().inputs(pixels) if learn_inputs else pixels
        return build(problem, LearnableImages(start, labels), context.artefacts["experts"], context)

    def save(distiller: nn.Module, folder: Path) -> None:
        assert isinstance(distiller, ImageDistiller)
        images = distiller.student.images.detach().cpu()
        pixels = problem.preprocessing().pixels(images) if learn_inputs else images
        rate = getattr(distiller, "rate", None)
        write(pixels, distiller.student.labels, folder, None if rate is None else float(rate.detach()))

    if not config.synthetic.learn:
        return Procedure("synthetic", choose)
    return TrainStage("synthetic", config.train, setup, save, artefact="synthetic")


def first_images(problem: Problem, context: RunContext) -> tuple[Tensor, Tensor]:
    """Pixels and labels that the set starts from, a function of the run's seed."""
    synthetic, vectors = problem.config.synthetic, None
    if synthetic.init in real_images.NEEDS_NETWORK:
        network = problem.network().eval()
        load_parameters(network, open_pool(context.artefacts["experts"], network)[0][-1])
        vectors = real_images.network_vectors(network, problem.preprocessing().inputs, synthetic.init)
    generator = torch.Generator().manual_seed(mix(problem.config.seed, 41))
    return real_images.initial_pixels(
        problem.train,
        synthetic.init,
        synthetic.per_class,
        factor=synthetic.factor,
        generator=generator,
        network=vectors,
    )


class ImageDistiller(Distiller):
    """Base of the methods: `student` holds the learnable images, and what is saved is read from the distiller."""

    student: LearnableImages

    def deployed(self) -> nn.Module:
        return self


# ---------------------------------------------------------------- evaluation


def evaluate(config: Run, artefacts: Artefacts, *, problem: Problem | None = None) -> dict[str, Any]:
    """Accuracy of fresh networks trained on the set, of the run's architecture and the further ones; the experts'."""
    problem = problem or Problem.of(config)
    device = run_device()
    saved = SyntheticSet.load(artefacts["synthetic"])
    test = problem.preprocessing().inputs(problem.test.images.float() / 255).to(device)
    result: dict[str, Any] = {}
    for name, model in {"": None, **config.evaluation.networks}.items():
        found = accuracies(problem, saved, model, test, device)
        suffix = f"_{name}" if name else ""
        result[f"student/accuracy{suffix}"] = sum(found) / len(found)
        if not name and len(found) > 1:
            result["student/accuracy_std"] = float(torch.tensor(found, dtype=torch.float64).std())
    result["teacher/accuracy"] = expert_accuracy(problem, artefacts["experts"], test, device)
    result["images"] = len(saved.images)
    if saved.rate is not None:
        result["learned_rate"] = saved.rate
    return result


def run_device() -> torch.device:
    """The device of the run that is going on (`--cpu` is heeded), else the accelerator where there is one."""
    from accelerate.state import PartialState

    if PartialState._shared_state:
        return PartialState().device
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def accuracies(
    problem: Problem, saved: SyntheticSet, model: ModelConfig | None, test: Tensor, device: torch.device
) -> list[float]:
    evaluation = problem.config.evaluation
    train = evaluation.train
    if evaluation.learned_rate and saved.rate is not None:
        train = train.model_copy(update={"optimizer": train.optimizer.model_copy(update={"lr": saved.rate})})
    inputs, labels = (tensor.to(device) for tensor in saved.tensors())

    def learn(network: nn.Module) -> nn.Module:
        return fresh.train_network(
            network.to(device),
            inputs,
            labels,
            train,
            num_classes=problem.num_classes,
            augment=DiffAugment.of(evaluation.augment),
            cutmix_probability=evaluation.cutmix,
        )

    seeds = [mix(problem.config.seed, 43, repeat) for repeat in range(evaluation.repeats)]
    return fresh.fresh_accuracies(lambda: problem.network(model), learn, test, problem.test.labels, seeds)


def expert_accuracy(problem: Problem, folder: Path, test: Tensor, device: torch.device, most: int = 10) -> float:
    """Mean test accuracy of (the first) experts at the end of their training."""
    with seeded(0):
        network = problem.network().to(device).eval()
    pool = open_pool(folder, network)[:most]
    total = 0.0
    for expert in pool:
        load_parameters(network, expert[-1].to(device))
        total += fresh.accuracy(network, test, problem.test.labels)
    return total / len(pool)


def feature_spread(problem: Problem, saved: SyntheticSet, networks: int = 3) -> float | None:
    """Trace of the features' covariance within a class, synthetic over real, on random networks that nothing has seen.

    Mean over classes and networks of the ratio; features of length 1. None where a class has one image only.
    """
    inputs, labels = saved.tensors()
    if int(torch.bincount(labels).min()) < 2:
        return None
    ratios = []
    for k in range(networks):
        with seeded(mix(problem.config.seed, 47, k)), torch.no_grad():
            network = problem.network().eval()
            for label, indices in enumerate(problem.train.indices):
                real = problem.preprocessing().inputs(problem.train.pixels(indices[:512]))
                traces = []
                for images in (inputs[labels == label][:512], real):
                    features = network.forward_head(network.forward_features(images), pre_logits=True)
                    traces.append(float(functional.normalize(features, dim=1).var(0).sum()))
                ratios.append(traces[0] / traces[1])
    return sum(ratios) / len(ratios)


def predict(config: Run, artefacts: Artefacts, count: int) -> list[dict[str, Any]]:
    """A row of pictures for each class: images of the set beside a real one, for the report."""
    problem, saved = Problem.of(config), SyntheticSet.load(artefacts["synthetic"])
    pictures, labels = saved.pictures(), decoded_labels(saved.labels, saved.factor)
    rows = []
    for label, name in enumerate(problem.data.class_names[:count]):
        own = pictures[labels == label][:8]
        images = {f"synthetic {k + 1}": _picture(picture) for k, picture in enumerate(own)}
        images["real"] = _picture(problem.train.images[problem.train.indices[label][0]])
        rows.append({"caption": name, "images": images})
    return rows


def _picture(image: Tensor) -> Any:
    return image.permute(1, 2, 0).squeeze(-1).numpy()
