"""SwiftBrush: One-Step Text-to-Image Diffusion Model with Variational Score Distillation (arXiv 2312.05239, 2023).

A text-to-image teacher becomes a one-step generator from prompts alone, without any image. It is variational score
distillation with a network in the place of a 3-D scene: the generator's sample is noised again, and the difference of
two noise predictions is its gradient. One is the frozen teacher's; the other one's is that of the same weights with
LoRA adapters, trained meanwhile to denoise what the generator makes.

    x = (z - s_T e_G(z, T, y)) / a_T,  z ~ N(0, I);   x_t = a_t x + s_t e
    e^k = e(x_t, t, 0) + kappa (e(x_t, t, y) - e(x_t, t, 0))               for teacher and adapted teacher alike
    L_G = 0.5 mean (x - sg[x - g])^2,   g = s_t^2 (e_T^k - e_L^k) = a_t s_t (mu_L - mu_T)                     (eq. 7)
    L_L = mean a_t^2 (e_L(x_t', t', y') - e')^2,   x' = sg[x]                                                 (eq. 8)

y' is the prompt, or for the whole batch at once, with probability 0.1, the empty one. The adapted teacher starts as
the teacher, so that the first gradient is zero; L_G is no measure of progress. The step from T uses the scheduler's own
last level (abar = 0.00466 for SD 2.1, where the published code has 0.0047), so that the saved pipeline samples as the
training did.
"""

from __future__ import annotations

from kd_diffusion.engine.distillation import Networks
from kd_diffusion.engine.variational import VariationalArgs, VariationalDistiller
from kd_diffusion.runs import Run, adapter_networks, score_method


class SwiftBrushConfig(VariationalArgs):
    """Scale 4.5 for both, LoRA of rank 64 on queries and values, updates 1 : 1: the defaults of the engine."""


class SwiftBrush(VariationalDistiller):
    """The engine's variational distillation is this paper: (eq. 7) for the generator, (eq. 8) for the adapters."""


def build(config: Run, networks: Networks) -> SwiftBrush:
    return SwiftBrush(networks, config.method_args, seed=config.seed, ema=config.train.ema)


METHOD = score_method("swiftbrush", __doc__ or "", SwiftBrushConfig, build, networks=adapter_networks)
