"""Diffusers pipelines in and out: open a teacher, save a student that stock diffusers loads and samples from."""

from __future__ import annotations

import copy
import inspect
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kd_diffusion.engine.denoiser import Denoiser
from kd_diffusion.engine.process import EDM, VP, Flow, Process, process_of
from kd_diffusion.engine.rollout import Renoise
from kd_diffusion.integrations.conditioners import ClassConditioner, NoConditioner, TextConditioner, conditioner_of
from kdcore.errors import InputError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Space(nn.Module):
    """The space that diffusion runs in: latents of a VAE (scaled and shifted as its config says), or pixels."""

    def __init__(self, vae: nn.Module | None, shape: tuple[int, ...]):
        super().__init__()
        self.vae, self.shape = vae, shape

    @torch.no_grad()
    def encode(self, pixels: Tensor, normal: Callable[[Sequence[int]], Tensor] | None = None) -> Tensor:
        """Pixels (B, C, H, W) in [-1, 1] -> a sample of the latents, (B, *shape); `normal` gives its noise."""
        if self.vae is None:
            return pixels
        posterior = self.vae.encode(pixels.to(next(self.vae.parameters()).dtype)).latent_dist
        noise = torch.randn_like(posterior.mean) if normal is None else normal(posterior.mean.shape).to(posterior.mean)
        encoded = posterior.mean + posterior.std * noise
        shift, deviation = self._scaling(encoded)
        return ((encoded - shift) / deviation).to(pixels.dtype)

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        """Diffusion space -> pixels in about [-1, 1]."""
        return x if self.vae is None else self.decode_with_grad(x)

    def decode_with_grad(self, x: Tensor) -> Tensor:
        """`decode` with a graph to x, for losses on pixels."""
        if self.vae is None:
            return x
        shift, deviation = self._scaling(x)
        latents = x * deviation + shift
        return self.vae.decode(latents.to(next(self.vae.parameters()).dtype), return_dict=False)[0].to(x.dtype)

    def _scaling(self, like: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """(shift, deviation) of the latents: numbers, or one a channel where the VAE has those (Wan)."""
        config = self.vae.config
        if config.get("latents_mean") is not None and config.get("latents_std") is not None:
            pair = (torch.tensor(config[name]).to(like) for name in ("latents_mean", "latents_std"))
            shift, deviation = (values.reshape(1, -1, *[1] * (like.ndim - 2)) for values in pair)
            return shift, deviation / (config.get("scaling_factor") or 1.0)
        return config.get("shift_factor") or 0.0, 1 / config.scaling_factor


@dataclass
class Opened:
    """A pipeline, taken apart."""

    pipe: Any
    slot: str  # "unet" or "transformer": where the pipeline keeps its network
    denoiser: Denoiser
    conditioner: NoConditioner | ClassConditioner | TextConditioner
    space: Space

    @property
    def network(self) -> nn.Module:
        return self.denoiser.network

    @property
    def process(self) -> Process:
        return self.denoiser.process

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def to(self, device: torch.device | str) -> Opened:
        """Moves the network, the text side and the autoencoder; returns itself."""
        for part in (self.denoiser, self.conditioner, self.space):
            if isinstance(part, nn.Module):
                part.to(device)
        return self

    def denoiser_for(self, network: nn.Module) -> Denoiser:
        """Another network behind this pipeline's noise process and prediction type."""
        return Denoiser(network, self.denoiser.process, self.denoiser.prediction_type)

    def copied(self) -> Denoiser:
        """A trainable float32 copy of the network."""
        return self.denoiser_for(trainable(self.network))


def open_pipeline(
    name: str | Path,
    *,
    field: str = "teacher",
    dtype: str = "fp32",
    variant: str | None = None,
    null_class: int | None = None,
    size: tuple[int, int, int] | None = None,
) -> Opened:
    """Opens a pipeline by hub name or folder; weights from safetensors alone. `size` as `opened` has it.

    Raises InputError that names `field` where it cannot be loaded or holds no network that is known.
    """
    from diffusers import DiffusionPipeline

    import kd_diffusion.integrations.experts  # a folder may name its class
    import kd_diffusion.integrations.points  # noqa: F401 - the same

    local = Path(name).exists()
    try:
        with no_progress_bars():
            pipe = DiffusionPipeline.from_pretrained(
                str(name), dtype=DTYPES[dtype], variant=variant, use_safetensors=True, local_files_only=local
            )
    except (OSError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{field} = '{name}': no diffusers pipeline could be loaded ({reason})") from None
    return opened(pipe, field=field, null_class=null_class, size=size)


def as_stored(opened: Opened, name: str | Path, variant: str | None = None) -> nn.Module:
    """The network with the weights of the folder or hub name it was opened from, where its own type has rounded them.

    What trains should not start from what bfloat16 has left of a teacher. A mixture of experts is given as it is.
    """
    network: Any = opened.network
    rounded = next(network.parameters()).dtype != torch.float32
    if not rounded or hasattr(network, "experts"):
        return network
    options = {"subfolder": opened.slot, "variant": variant, "local_files_only": Path(name).exists()}
    return type(network).from_pretrained(str(name), use_safetensors=True, **options)


def trainable(network: nn.Module) -> nn.Module:
    """A float32 copy, all of it trainable."""
    return copy.deepcopy(network).float().train().requires_grad_(True)


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Switches diffusers' bars off inside the block: loading a folder is no news in the middle of a run."""
    from diffusers.utils import logging

    active = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if active:
            logging.enable_progress_bar()


def opened(
    pipe: Any,
    *,
    field: str = "teacher",
    null_class: int | None = None,
    size: tuple[int, int, int] | None = None,
) -> Opened:
    """A pipeline in memory, taken apart; `size` is a video's frames, height and width. InputError like `open_pipeline`.

    Two networks that share the noise levels (`transformer_2` and `boundary_ratio`) become one, see `experts`.
    """
    from kd_diffusion.integrations.experts import experts_of, network_of

    slot = next((name for name in ("unet", "transformer") if getattr(pipe, name, None) is not None), None)
    if slot is None:
        raise InputError(f"{field}: {type(pipe).__name__} has neither a unet nor a transformer")
    network = network_of(pipe, slot)
    one = experts_of(network)[0][0]
    process, prediction_type = process_of(pipe.scheduler)
    vae = getattr(pipe, "vae", None)
    if vae is not None and vae.dtype == torch.float16 and vae.config.get("force_upcast"):
        vae.float()  # SDXL's overflows in float16
    image = "sample_size" in one.config or hasattr(pipe, "default_sample_size")
    space = Space(vae, latent_shape(pipe, one) if image else video_shape(pipe, one, size, field))
    return Opened(pipe, slot, Denoiser(network, process, prediction_type), conditioner_of(pipe, one, null_class), space)


def latent_shape(pipe: Any, network: nn.Module) -> tuple[int, int, int]:
    """(C, H, W) of the network's samples, by its config, or the pipeline's where it takes any size (Flux)."""
    size = network.config.get("sample_size") or pipe.default_sample_size
    height, width = (size, size) if isinstance(size, int) else size
    channels = network.config.in_channels
    if type(network).__name__ == "FluxTransformer2DModel":
        channels //= 4  # it reads 2x2 patches
    return channels, height, width


def video_shape(pipe: Any, network: nn.Module, size: tuple[int, int, int] | None, field: str) -> tuple[int, ...]:
    """(C, F, H, W) of a video's latents; the pipeline's default call says the size where `size` does not."""
    if size is None:
        parameters = inspect.signature(type(pipe).__call__).parameters
        size = tuple(parameters[name].default for name in ("num_frames", "height", "width"))
    frames, height, width = size
    temporal, spatial = pipe.vae_scale_factor_temporal, pipe.vae_scale_factor_spatial
    _, rows, columns = network.config.patch_size
    if (frames - 1) % temporal or height % (spatial * rows) or width % (spatial * columns):
        allowed = f"{temporal} n + 1 frames, multiples of {spatial * rows} and {spatial * columns}"
        raise InputError(f"{field}.size = {list(size)}: allowed: {allowed}")
    return network.config.in_channels, (frames - 1) // temporal + 1, height // spatial, width // spatial


# ---------------------------------------------------------------- saving


def save_student(
    opened: Opened, network: nn.Module, folder: Path, scheduler: Any, *, extra: dict[str, Any] | None = None
) -> None:
    """Writes the teacher's pipeline with this network and scheduler; stock diffusers loads the folder.

    `extra` is written to kd.json beside model_index.json: what a reader of the folder should know (levels, method).
    """
    from kd_diffusion.integrations.experts import experts_of, joined, place

    networks, boundaries = experts_of(network)
    for number, expert in enumerate(networks, 1):
        if has_lora(expert):
            save_lora(opened, expert, folder / "lora" / (f"expert_{number}" if boundaries else ""))
    pipe = place(opened.pipe, opened.slot, joined([merged(n) if has_lora(n) else n for n in networks], boundaries))
    pipe.register_modules(scheduler=scheduler)
    with no_progress_bars(), in_one_dtype(pipe):
        pipe.save_pretrained(folder, safe_serialization=True)
    if extra:
        (folder / "kd.json").write_text(json.dumps(extra, indent=2) + "\n", encoding="utf-8")


@contextmanager
def in_one_dtype(pipe: Any) -> Iterator[None]:
    """Inside the block every network of the pipeline is in float32, as the student is: transformers loads what a folder
    holds, diffusers float32, and a bfloat16 text encoder before a float32 U-Net could not sample."""
    modules = [module for module in pipe.components.values() if isinstance(module, nn.Module)]
    found = [(module, next((p.dtype for p in module.parameters()), torch.float32)) for module in modules]
    others = [(module, dtype) for module, dtype in found if dtype != torch.float32]
    try:
        for module, _ in others:
            module.float()
        yield
    finally:
        for module, dtype in others:
            module.to(dtype)


def has_lora(network: nn.Module) -> bool:
    return bool(getattr(network, "peft_config", None))


def save_lora(opened: Opened, network: nn.Module, folder: Path) -> None:
    """The adapters as a file that the pipeline's `load_lora_weights(folder)` loads, with rank and alpha.

    A pipeline without LoRA loading of its own gets the file of `network.load_lora_adapter`; a network that does not
    know adapters (DiT, PixArt, UNet2DModel) peft's own two, adapter_model.safetensors and adapter_config.json.
    """
    from peft.utils import get_peft_model_state_dict

    if not hasattr(network, "save_lora_adapter"):
        from safetensors.torch import save_file

        network.peft_config["default"].save_pretrained(folder)
        weights = {name: value.contiguous() for name, value in get_peft_model_state_dict(network).items()}
        save_file(weights, folder / "adapter_model.safetensors")
        return
    if not hasattr(opened.pipe, "save_lora_weights"):
        network.save_lora_adapter(folder, adapter_name="default")
        return
    from diffusers.training_utils import _collate_lora_metadata

    opened.pipe.save_lora_weights(
        folder,
        **{f"{opened.slot}_lora_layers": get_peft_model_state_dict(network)},
        **_collate_lora_metadata({opened.slot: network}),
    )


def merged(network: nn.Module) -> nn.Module:
    """A copy with the adapters folded into the weights."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    network = copy.deepcopy(network)
    if hasattr(network, "fuse_lora"):
        network.fuse_lora()
        network.unload_lora()
        return network
    for name, layer in [(n, m) for n, m in network.named_modules() if isinstance(m, BaseTunerLayer)]:
        layer.merge()
        network.set_submodule(name, layer.get_base_layer())
    del network.peft_config
    return network


def sampler_config(
    teacher_scheduler: Any,
    prediction_type: str,
    process: Process,
    indices: Sequence[float],
    *,
    start: Literal["unit", "noised"] = "unit",
    renoise: Renoise = "noise",
) -> Any:
    """A stock scheduler with which `pipe(.., num_inference_steps=N)` takes the student's own steps.

    EDM: CMStochasticIterativeScheduler; EDMEulerScheduler, for one step, where the teacher's is named after EDM. Flow:
    FlowMatchEulerDiscreteScheduler that draws new noise in each step (give `sigmas=` the levels); with Euler's or one
    step FlowMapEulerDiscreteScheduler, whose steps start at the levels, or FlowMatchEulerDiscreteScheduler where the
    teacher shifts dynamically and its pipeline gives the levels itself. VP: the table is cut at the first level, so
    that one step starts there; LCMScheduler, or for one step from a noised zero image EulerDiscreteScheduler, whose
    first latent is s_t z.
    """
    import diffusers

    config = dict(teacher_scheduler.config)
    if isinstance(process, EDM):
        first = float(process.at(torch.tensor([indices[0]], dtype=torch.float64)))
        if type(teacher_scheduler).__name__.startswith("EDM"):
            return diffusers.EDMEulerScheduler.from_config(config, sigma_max=first, final_sigmas_type="zero")
        return diffusers.CMStochasticIterativeScheduler(
            num_train_timesteps=process.size,
            sigma_min=process.boundary,
            sigma_max=first,
            sigma_data=process.sigma_data,
            rho=process.rho,
            clip_denoised=False,
        )
    if isinstance(process, Flow) and (renoise == "euler" or len(indices) == 1):
        if config.get("use_dynamic_shifting"):
            return diffusers.FlowMatchEulerDiscreteScheduler.from_config(config)
        return diffusers.FlowMapEulerDiscreteScheduler(shift=process.shift)
    if isinstance(process, Flow):
        return diffusers.FlowMatchEulerDiscreteScheduler.from_config(config, stochastic_sampling=True)
    if not isinstance(process, VP):
        return copy.deepcopy(teacher_scheduler)
    common = {
        **_table(config, process, int(indices[0])),
        "prediction_type": prediction_type,
        "steps_offset": config.get("steps_offset", 0),  # Stable Diffusion's pipelines insist on their own
    }
    if start == "noised" and len(indices) == 1:
        return diffusers.EulerDiscreteScheduler(**common, timestep_spacing="trailing")
    return diffusers.LCMScheduler(
        **common,
        original_inference_steps=len(indices),
        timestep_scaling=1e9,  # LCM's boundary scalings become 0 and 1: the step gives x itself
        clip_sample=False,
        set_alpha_to_one=True,
    )


def _table(config: Mapping[str, Any], process: VP, first: int) -> dict[str, Any]:
    """The arguments that describe the teacher's table up to the index `first`."""
    if first == process.size - 1:
        names = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")
        return {name: config[name] for name in (*names, "rescale_betas_zero_snr") if name in config}
    return {"num_train_timesteps": first + 1, "trained_betas": vp_betas(process)[: first + 1]}


def vp_betas(process: VP) -> list[float]:
    """beta_t = 1 - abar_t / abar_{t-1}."""
    abar = process.alphas_cumprod
    previous = torch.cat((torch.ones(1, dtype=abar.dtype, device=abar.device), abar[:-1]))
    return (1 - abar / previous).tolist()


def copy_pipeline(source: Path, target: Path) -> None:
    """Copies a pipeline folder."""
    shutil.copytree(source, target, dirs_exist_ok=True)
