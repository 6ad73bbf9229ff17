"""A class-conditional latent transformer as a rectified flow, in a stock DiTPipeline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from kd_diffusion.data import Data
from kd_diffusion.worlds.digits import build_digits_dit


def build_digits_flow(data: Data, vae: nn.Module, network: Mapping[str, Any] | None = None) -> Any:
    """DiTPipeline on the latents of `vae` with random weights; the null class is `num_embeds_ada_norm`.

    Its scheduler is FlowMapEulerDiscreteScheduler: Euler's steps from the levels 1, (N - 1) / N, .., 1 / N, and the one
    flow scheduler with the calls that DiTPipeline makes. `network` may give `patch_size`, here 1.
    """
    from diffusers import FlowMapEulerDiscreteScheduler

    pipe = build_digits_dit(data, vae, {"patch_size": 1, **(network or {})})
    pipe.register_modules(scheduler=FlowMapEulerDiscreteScheduler(shift=1.0))
    return pipe
