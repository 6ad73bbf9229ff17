"""The stages that build and train an embedded world, once for all runs that name the same one.

    digits_unet  class-conditional U-Net on pixels, EDM                  ConsistencyModelPipeline
    digits_dit   class-conditional transformer on latents, VP            DiTPipeline
    digits_flow  the same as a rectified flow                            DiTPipeline
    digits_text  U-Net on latents, conditioned on prompts, VP            StableDiffusionPipeline
    mixture      the exact denoiser of a mixture of Gaussians, EDM       ConsistencyModelPipeline of our MixtureNetwork

The artefact is `teacher`, a pipeline folder; of latent worlds also `vae`, of the mixture also `start`: a pipeline whose
network is an MLP trained on samples, for the networks that a method trains.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from kd_diffusion import __version__
from kd_diffusion.data import Data, DataConfig, Samples, load_data, loader
from kd_diffusion.engine.denoiser import Denoiser
from kd_diffusion.engine.denoising import DenoisingDistiller
from kd_diffusion.engine.process import process_of
from kd_diffusion.worlds import digits, flow, text, vae
from kdcore.config import Config, TrainConfig
from kdcore.errors import InputError
from kdcore.stages import Artefacts, CachedStage, Procedure, RunContext, Stage
from kdcore.training import TrainSetup, TrainStage

World = Literal["digits_unet", "digits_dit", "digits_flow", "digits_text", "mixture"]


def _budget(steps: int, batch_size: int, lr: float, ema: float | None = 0.995) -> dict[str, Any]:
    return {
        "steps": steps,
        "batch_size": batch_size,
        "optimizer": {"name": "adam", "lr": lr},
        "schedule": {"name": "cosine", "warmup_epochs": 1, "min_ratio": 0.02},
        "clip": 1.0,
        "ema": None if ema is None else {"decay": ema},
    }


VAE_BUDGET = _budget(300, 32, 4e-3, None)
BUDGETS = {
    "digits_unet": _budget(1000, 32, 3e-3),
    "digits_dit": _budget(1200, 64, 2e-3),
    "digits_flow": _budget(1200, 64, 2e-3),
    "digits_text": _budget(700, 64, 3e-3),
    "mixture": _budget(2000, 256, 2e-3),
}


class WorldConfig(Config):
    """A world by name. What `train` and `vae_train` leave out has the world's own defaults."""

    name: World = Field(description="which world")
    data: DataConfig | None = Field(None, description="what the teacher learns from; None: the run's data")
    network: dict[str, Any] = Field(default_factory=dict, description="arguments of the network's diffusers class")
    vae: dict[str, Any] = Field(default_factory=dict, description="arguments of AutoencoderKL")
    text_encoder: dict[str, Any] = Field(default_factory=dict, description="arguments of transformers' CLIPTextConfig")
    prompt_length: int = Field(12, ge=4, description="tokens of a prompt, with start and end")
    drop: float = Field(0.1, ge=0, lt=1, description="probability that a sample's condition is left out in training")
    train: TrainConfig = Field(description="training of the teacher's network; of the mixture's start network")
    vae_train: TrainConfig = Field(description="training of the autoencoder")

    @model_validator(mode="before")
    @classmethod
    def _budgets(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or values.get("name") not in BUDGETS:
            return values
        defaults = {"train": BUDGETS[values["name"]], "vae_train": VAE_BUDGET}
        return {**values, **{name: _filled(values.get(name), default) for name, default in defaults.items()}}


def _filled(given: Any, default: Any) -> Any:
    """`given` with the defaults of the keys that it lacks, section by section."""
    if given is None:
        return default
    if not isinstance(given, Mapping) or not isinstance(default, Mapping):
        return given
    return {**default, **{name: _filled_key(value, default.get(name)) for name, value in given.items()}}


def _filled_key(value: Any, default: Any) -> Any:
    return value if value is None else _filled(value, default)


def world_stages(config: WorldConfig, data: Data | None = None, seed: int = 0) -> list[Stage]:
    """The stages that end in the artefact `teacher`. `data` is the run's; InputError where the world cannot use it."""
    if config.data is not None:
        data = load_data(config.data, seed)
    if data is None:
        raise InputError("world.data: give it, there is no data of a run")
    check(config, data)
    stages = _STAGES[config.name](config, data, seed)
    return [CachedStage(stage, _identity(config, data, seed, stage.name)) for stage in stages]


def check(config: WorldConfig, data: Data) -> None:
    """Raises InputError where the world cannot be trained on this data."""
    name, source = config.name, data.config.name
    if (name == "mixture") != (data.mixture is not None):
        raise InputError(f"world.name = '{name}': cannot be trained on data.name = '{source}'")
    if not data.train.has_images:
        raise InputError(f"world.name = '{name}': needs images, data.name = '{source}' has none")
    if name == "digits_text" and data.train.prompts is None:
        raise InputError(f"world.name = '{name}': needs prompts, data.name = '{source}' has none")
    for field, train in (("train", config.train), ("vae_train", config.vae_train)):
        if train.batch_size > len(data.train):
            raise InputError(f"world.{field}.batch_size = {train.batch_size}: the data has {len(data.train)} samples")


def _identity(config: WorldConfig, data: Data, seed: int, stage: str) -> dict[str, Any]:
    """What a stage's result depends on; an autoencoder does not depend on the network that comes after it."""
    own = {"vae", "vae_train"} if stage == "vae" else set(WorldConfig.model_fields) - {"data"}
    return {
        "version": __version__,
        "torch": torch.__version__,
        "world": config.model_dump(mode="json", include=own),
        "data": data.config.model_dump(mode="json"),
        "seed": seed,
    }


# ---------------------------------------------------------------- the stages of each world


def _unet_stages(config: WorldConfig, data: Data, seed: int) -> list[Stage]:
    null = {"class_labels": torch.tensor(data.num_classes)}

    def build(context: RunContext) -> tuple[Any, DenoisingDistiller, Samples]:
        pipe = digits.build_digits_unet(data, config.network)
        distiller = DenoisingDistiller(denoiser(pipe.unet, pipe), null=null, drop=config.drop, seed=seed)
        return pipe, distiller, Samples(data.train)

    return [_teacher_stage("teacher", config.train, build, seed)]


def _dit_stages(
    config: WorldConfig, data: Data, seed: int, pipeline: Callable[..., Any] = digits.build_digits_dit
) -> list[Stage]:
    def build(context: RunContext) -> tuple[Any, DenoisingDistiller, Samples]:
        autoencoder = _open_vae(context)
        pipe = pipeline(data, autoencoder, config.network)
        null = {"class_labels": torch.tensor(pipe.transformer.config.num_embeds_ada_norm)}
        distiller = DenoisingDistiller(denoiser(pipe.transformer, pipe), null=null, drop=config.drop, seed=seed)
        return pipe, distiller, Samples(data.train, x=vae.encode(autoencoder, data.train.pixels))

    return [_vae_stage(config, data, seed), _teacher_stage("teacher", config.train, build, seed)]


def _text_stages(config: WorldConfig, data: Data, seed: int) -> list[Stage]:
    def build(context: RunContext) -> tuple[Any, DenoisingDistiller, Samples]:
        autoencoder = _open_vae(context)
        pipe = text.build_digits_text(
            data, autoencoder, config.network, config.text_encoder, length=config.prompt_length
        )
        assert data.train.prompts is not None
        distiller = DenoisingDistiller(
            denoiser(pipe.unet, pipe),
            condition=partial(text.prompt_condition, pipe.text_encoder),
            null={"input_ids": text.tokens(pipe.tokenizer, [""])[0]},
            drop=config.drop,
            text_encoder=pipe.text_encoder,
            seed=seed,
        )
        tokens = {"input_ids": text.tokens(pipe.tokenizer, data.train.prompts)}
        latents = vae.encode(autoencoder, data.train.pixels)
        return pipe, distiller, Samples(data.train, x=latents, tokens=tokens)

    return [_vae_stage(config, data, seed), _teacher_stage("teacher", config.train, build, seed)]


def _mixture_stages(config: WorldConfig, data: Data, seed: int) -> list[Stage]:
    mixture = data.mixture
    assert mixture is not None

    def write(context: RunContext) -> Artefacts:
        from kd_diffusion.integrations.points import MixtureNetwork

        network = MixtureNetwork(**mixture.config_arguments())
        if context.is_main:
            digits.consistency_pipeline(network).save_pretrained(context.folder / "teacher")
        context.accelerator.wait_for_everyone()
        return {"teacher": context.folder / "teacher"}

    def build(context: RunContext) -> tuple[Any, DenoisingDistiller, Samples]:
        from kd_diffusion.integrations.points import PointMLP

        pipe = digits.consistency_pipeline(vae.created(PointMLP, config.network, "world.network"))
        distiller = DenoisingDistiller(denoiser(pipe.unet, pipe), condition=lambda batch: {}, seed=seed)
        return pipe, distiller, Samples(data.train, x=data.train.pixels)

    return [Procedure("teacher", write), _teacher_stage("start", config.train, build, seed)]


_STAGES: dict[str, Callable[[WorldConfig, Data, int], list[Stage]]] = {
    "digits_unet": _unet_stages,
    "digits_dit": _dit_stages,
    "digits_flow": partial(_dit_stages, pipeline=flow.build_digits_flow),
    "digits_text": _text_stages,
    "mixture": _mixture_stages,
}


# ---------------------------------------------------------------- parts


def denoiser(network: nn.Module, pipe: Any) -> Denoiser:
    """The network behind the noise process of the pipeline's scheduler."""
    return Denoiser(network, *process_of(pipe.scheduler))


def _teacher_stage(
    name: str,
    train: TrainConfig,
    build: Callable[[RunContext], tuple[Any, DenoisingDistiller, Samples]],
    seed: int,
) -> TrainStage:
    """Trains the distiller that `build` gives with its pipeline, and saves the pipeline."""
    kept: dict[str, Any] = {}

    def setup(context: RunContext) -> TrainSetup:
        pipe, distiller, samples = build(context)
        kept["pipe"] = pipe
        return TrainSetup(distiller, loader(samples, train.batch_size, seed, num_workers=train.num_workers))

    def save(network: nn.Module, folder: Path) -> None:
        kept["pipe"].save_pretrained(folder, safe_serialization=True)  # it holds the modules that were trained

    return TrainStage(name, train, setup, save, artefact=name)


def _vae_stage(config: WorldConfig, data: Data, seed: int) -> TrainStage:
    train = config.vae_train

    def setup(context: RunContext) -> TrainSetup:
        distiller = vae.VAEDistiller(vae.build_vae(data, config.vae))
        samples = Samples(data.train)
        return TrainSetup(distiller, loader(samples, train.batch_size, seed, num_workers=train.num_workers))

    def save(network: nn.Module, folder: Path) -> None:
        device = next(network.parameters()).device
        vae.fit_scale(network, data.train.pixels.to(device))
        network.save_pretrained(folder, safe_serialization=True)

    return TrainStage("vae", train, setup, save, artefact="vae")


def _open_vae(context: RunContext) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_pretrained(context.artefacts["vae"], use_safetensors=True).requires_grad_(False).eval()
