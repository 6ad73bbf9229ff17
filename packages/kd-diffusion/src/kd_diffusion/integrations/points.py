"""Networks of the plane with the call of diffusers' UNet2DModel: the exact mixture, and an MLP that can be trained.

Both predict F of EDM's preconditioning (Karras et al., arXiv 2206.00364): the input is c_in x_t, the time 250 ln s, and
x0 = c_skip x_t + c_out F. So a stock ConsistencyModelPipeline samples from them. A pipeline folder names the module of
a component's class, and diffusers resolves it only where the module has been imported: `import
kd_diffusion.integrations.points` before `DiffusionPipeline.from_pretrained`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from kd_diffusion.worlds.mixture import GaussianMixture
from kdcore.errors import InputError


@dataclass
class PointOutput(BaseOutput):
    """`sample`: F of the preconditioning, (B, D, 1, 1)."""

    sample: Tensor


class MixtureNetwork(ModelMixin, ConfigMixin):
    """The exact denoiser of a Gaussian mixture, float64 inside; the output has the input's dtype.

    means (K, D) and weights (K,) as nested lists, std of each mode; sigma_data as in the scheduler.
    """

    @register_to_config
    def __init__(
        self,
        means: list[list[float]],
        weights: list[float],
        std: float,
        sigma_data: float = 0.5,
        in_channels: int = 2,
        out_channels: int = 2,
        sample_size: int = 1,
        num_class_embeds: int | None = None,
    ):
        super().__init__()
        # The numbers are the config's; the parameter gives the module a device, a dtype and a file.
        self.centres = nn.Parameter(torch.tensor(means, dtype=torch.float32), requires_grad=False)
        self._mixture: GaussianMixture | None = None

    @property
    def mixture(self) -> GaussianMixture:
        """The mixture, on the module's device."""
        device = self.centres.device
        if self._mixture is None or self._mixture.means.device != device:
            means = torch.tensor(self.config.means, dtype=torch.float64, device=device)
            weights = torch.tensor(self.config.weights, dtype=torch.float64, device=device)
            self._mixture = GaussianMixture(means, weights, self.config.std)
        return self._mixture

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> PointOutput | tuple[Tensor]:
        s = (_times(timestep, sample).double() / 250).exp()[:, None]
        variance = s**2 + self.config.sigma_data**2
        x_t = sample.flatten(1).double() * variance.sqrt()  # c_in = 1 / sqrt(variance)
        # (mu - c_skip x_t) / c_out, written so that nothing cancels at small s
        score = self.mixture.score(x_t, s[:, 0])
        output = (s * variance.sqrt() / self.config.sigma_data) * (score + x_t / variance)
        return _output(output.view_as(sample).to(sample.dtype), return_dict)


class PointMLP(ModelMixin, ConfigMixin):
    """Residual MLP on points (B, D, 1, 1) with a sinusoidal time embedding. `mid_block` gives (B, width, 1, 1)."""

    @register_to_config
    def __init__(
        self,
        in_channels: int = 2,
        out_channels: int = 2,
        width: int = 128,
        depth: int = 4,
        sample_size: int = 1,
        num_class_embeds: int | None = None,
    ):
        super().__init__()
        from diffusers.models.embeddings import TimestepEmbedding, Timesteps

        self.time_proj = Timesteps(64, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(64, width)
        self.class_embedding = nn.Embedding(num_class_embeds, width) if num_class_embeds else None
        self.conv_in = nn.Linear(in_channels, width)
        half = depth // 2
        self.down_blocks = nn.ModuleList(PointBlock(width) for _ in range(half))
        self.mid_block = PointBlock(width)
        self.up_blocks = nn.ModuleList(PointBlock(width) for _ in range(depth - half))
        self.conv_out = nn.Sequential(nn.LayerNorm(width), nn.SiLU(), nn.Linear(width, out_channels))

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> PointOutput | tuple[Tensor]:
        time = self.time_embedding(self.time_proj(_times(timestep, sample)).to(sample.dtype))
        if self.class_embedding is not None:
            if class_labels is None:
                raise InputError("class_labels: required, the network has num_class_embeds")
            time = time + self.class_embedding(class_labels)
        hidden = self.conv_in(sample.flatten(1))[:, :, None, None]
        for block in (*self.down_blocks, self.mid_block, *self.up_blocks):
            hidden = block(hidden, time)
        return _output(self.conv_out(hidden.flatten(1))[:, :, None, None], return_dict)


class PointBlock(nn.Module):
    """x + W2 SiLU(scale(t) * LN(x) W1 + shift(t)), on (B, width, 1, 1)."""

    def __init__(self, width: int):
        super().__init__()
        self.norm, self.first, self.second = nn.LayerNorm(width), nn.Linear(width, width), nn.Linear(width, width)
        self.time = nn.Linear(width, 2 * width)

    def forward(self, hidden: Tensor, time: Tensor) -> Tensor:
        scale, shift = self.time(nn.functional.silu(time)).chunk(2, 1)
        x = hidden.flatten(1)
        x = x + self.second(nn.functional.silu(self.first(self.norm(x)) * (1 + scale) + shift))
        return x[:, :, None, None]


def _times(timestep: Tensor | float, sample: Tensor) -> Tensor:
    """The time as (B,), whatever a pipeline or a loop gives."""
    return torch.as_tensor(timestep, device=sample.device).reshape(-1).expand(len(sample))


def _output(sample: Tensor, return_dict: bool) -> PointOutput | tuple[Tensor]:
    return PointOutput(sample=sample) if return_dict else (sample,)
