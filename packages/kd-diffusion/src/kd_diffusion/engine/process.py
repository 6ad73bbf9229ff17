"""Noise processes x_t = a_t x + s_t e, e ~ N(0, I), and the conversions between what networks predict.

    VP         a = sqrt(abar_t), s = sqrt(1 - abar_t)      t is the index of a table
    EDM        a = 1, s = t                                t is the noise level (arXiv 2206.00364)
    Flow       a = 1 - t, s = t                            rectified flow (arXiv 2209.03003)
    TrigFlow   a = cos t, s = sin t                        (arXiv 2410.11081), data scaled to unit deviation

Every network becomes a predictor mu(x_t, t) of x. The conversions run in float64 and come back in the dtype of x_t:
1 / a and 1 / s reach 1e3 near the ends of a schedule, where bfloat16 would leave nothing.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from kdcore.errors import InputError

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", "flow_prediction", "edm", "trigflow")
TABLE = 1000  # indices of the table of times that every process has: `at(index)`
_SMALL = 1e-6


class Process:
    """A noise process. Times are tensors (B,); coefficients come back as float64 of the same shape."""

    size = TABLE

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(a_t, s_t)."""
        raise NotImplementedError

    def at(self, index: Tensor) -> Tensor:
        """The time at an index of the table, 0 the least noisy and `size - 1` pure noise."""
        raise NotImplementedError

    def network_time(self, t: Tensor) -> Tensor:
        """What the network's time input gets."""
        return t

    def input_scale(self, t: Tensor) -> Tensor:
        """c_in: the factor on x_t before it enters the network."""
        return torch.ones_like(t, dtype=torch.float64)

    def index_of(self, t: Tensor) -> Tensor:
        """The inverse of `at`, as a float64 number; for statistics by noise level."""
        raise NotImplementedError

    def derivatives(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(a', s') with respect to t, for processes whose networks predict a flow."""
        raise InputError(f"{type(self).__name__}: no flow prediction on this noise process")


class VP(Process):
    """The table of a DDPM; `alphas_cumprod` (T,) is abar."""

    def __init__(self, alphas_cumprod: Tensor):
        self.alphas_cumprod = alphas_cumprod.detach().double()
        self.size = len(alphas_cumprod)

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        if self.alphas_cumprod.device != t.device:
            self.alphas_cumprod = self.alphas_cumprod.to(t.device)
        abar = self.alphas_cumprod[t.long()]
        return abar.sqrt(), (1 - abar).sqrt()

    def at(self, index: Tensor) -> Tensor:
        return index.long()

    def index_of(self, t: Tensor) -> Tensor:
        return t.double()


class EDM(Process):
    """Noise level as time, the Karras table, and the preconditioning of arXiv 2206.00364 (table 1).

    `boundary` is 0 for EDM's own c_skip and c_out; a consistency model's (arXiv 2303.01469, eq. 25), which diffusers'
    CMStochasticIterativeScheduler applies, has its smallest sigma there. The network's time is `time_factor` ln sigma:
    EDM's 1/4, in the thousandths of that scheduler; as it is (0.25) for schedulers that are named after EDM.
    """

    def __init__(
        self,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        rho: float = 7.0,
        sigma_data: float = 0.5,
        boundary: float = 0.0,
        time_factor: float = 250.0,
    ):
        self.sigma_min, self.sigma_max, self.rho = sigma_min, sigma_max, rho
        self.sigma_data, self.boundary, self.time_factor = sigma_data, boundary, time_factor

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        s = t.double()
        return torch.ones_like(s), s

    def at(self, index: Tensor) -> Tensor:
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return (low + index.double() / (self.size - 1) * (high - low)) ** self.rho

    def index_of(self, t: Tensor) -> Tensor:
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return (t.double() ** (1 / self.rho) - low) / (high - low) * (self.size - 1)

    def network_time(self, t: Tensor) -> Tensor:
        return self.time_factor * t.double().clamp_min(1e-44).log()

    def input_scale(self, t: Tensor) -> Tensor:
        return (t.double().square() + self.sigma_data**2).rsqrt()

    def preconditioning(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(c_skip, c_out): mu = c_skip x_t + c_out F."""
        s, shifted = t.double(), t.double() - self.boundary
        data = self.sigma_data
        return data**2 / (shifted.square() + data**2), shifted * data * (s.square() + data**2).rsqrt()


class Flow(Process):
    """Rectified flow; networks predict u = e - x. `shift` m moves the table: t -> m t / (1 + (m - 1) t)."""

    def __init__(self, shift: float = 1.0):
        self.shift = shift

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        s = t.double()
        return 1 - s, s

    def derivatives(self, t: Tensor) -> tuple[Tensor, Tensor]:
        one = torch.ones_like(t, dtype=torch.float64)
        return -one, one

    def at(self, index: Tensor) -> Tensor:
        return self.shifted((index.double() + 1) / self.size)

    def shifted(self, t: Tensor) -> Tensor:
        """m t / (1 + (m - 1) t)."""
        return self.shift * t / (1 + (self.shift - 1) * t)

    def index_of(self, t: Tensor) -> Tensor:
        t = t.double()
        return t / (self.shift - (self.shift - 1) * t) * self.size - 1

    def network_time(self, t: Tensor) -> Tensor:
        return 1000 * t.double()


class TrigFlow(Process):
    """x_t = cos(t) x + sin(t) e on data divided by its deviation; networks predict dx_t/dt."""

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        t = t.double()
        return t.cos(), t.sin()

    def derivatives(self, t: Tensor) -> tuple[Tensor, Tensor]:
        t = t.double()
        return -t.sin(), t.cos()

    def at(self, index: Tensor) -> Tensor:
        return (index.double() + 1) / self.size * (math.pi / 2)

    def index_of(self, t: Tensor) -> Tensor:
        return t.double() / (math.pi / 2) * self.size - 1


# ---------------------------------------------------------------- noising


def expand(values: Tensor, like: Tensor) -> Tensor:
    """(B,) -> (B, 1, .., 1) with the rank of `like`."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


def coefficients(process: Process, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """(a_t, s_t) in float64, shaped to multiply `like`."""
    a, s = process.levels(t)
    return expand(a, like), expand(s, like)


def add_noise(process: Process, x: Tensor, e: Tensor, t: Tensor) -> Tensor:
    """x_t = a_t x + s_t e; x, e (B, ...), t (B,)."""
    a, s = coefficients(process, t, x)
    return a.to(x.dtype) * x + s.to(x.dtype) * e


def renoising(process: Process, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """(r, b) with x_t = r x_s + b e for s < t: r = a_t / a_s, b^2 = s_t^2 - r^2 s_s^2, float64 (B,)."""
    (a_s, s_s), (a_t, s_t) = process.levels(s), process.levels(t)
    r = a_t / a_s.clamp_min(_SMALL)
    return r, (s_t.square() - (r * s_s).square()).clamp_min(_SMALL**2).sqrt()


def renoise(process: Process, x_s: Tensor, e: Tensor, s: Tensor, t: Tensor) -> Tensor:
    """x_t = r x_s + b e: from one noise level to a higher one without knowing x."""
    r, b = renoising(process, s, t)
    return expand(r, x_s).to(x_s.dtype) * x_s + expand(b, x_s).to(x_s.dtype) * e


# ---------------------------------------------------------------- conversions


def to_x0(process: Process, prediction_type: str, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """The prediction of x from a network's output, in the dtype of x_t.

    epsilon (x_t - s e)/a; v_prediction a x_t - s v; flow_prediction (s' x_t - s u)/(a s' - a' s); edm
    c_skip x_t + c_out F; sample is x itself. Raises InputError for another name or a process that has no such form.
    """
    a, s = coefficients(process, t, x_t)
    y, x = output.double(), x_t.double()
    if prediction_type == "epsilon":
        x0 = (x - s * y) / a.clamp_min(_SMALL)
    elif prediction_type == "sample":
        x0 = y
    elif prediction_type in ("v_prediction", "trigflow"):
        x0 = a * x - s * y
    elif prediction_type == "flow_prediction":
        da, ds = (expand(value, x_t) for value in process.derivatives(t))
        x0 = (ds * x - s * y) / (a * ds - da * s)
    elif prediction_type == "edm":
        skip, out = (expand(value, x_t) for value in _edm(process).preconditioning(t))
        x0 = skip * x + out * y
    else:
        raise InputError(f"prediction_type = '{prediction_type}': allowed: {', '.join(PREDICTION_TYPES)}")
    return x0.to(x_t.dtype)


def from_x0(process: Process, prediction_type: str, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """What a network of this type outputs where it predicts x0 at x_t: the inverse of `to_x0`."""
    a, s = coefficients(process, t, x_t)
    x0, x = x0.double(), x_t.double()
    if prediction_type == "sample":
        y = x0
    elif prediction_type == "edm":
        skip, out = (expand(value, x_t) for value in _edm(process).preconditioning(t))
        y = (x0 - skip * x) / out.clamp_min(_SMALL)
    else:
        e = (x - a * x0) / s.clamp_min(_SMALL)
        y = _combine(process, prediction_type, x0, e, t, x_t)
    return y.to(x_t.dtype)


def target(process: Process, prediction_type: str, x: Tensor, e: Tensor, t: Tensor) -> Tensor:
    """The regression target of a network of this type for x_t = a_t x + s_t e."""
    if prediction_type == "edm":
        return from_x0(process, "edm", x, add_noise(process, x, e, t), t)
    return _combine(process, prediction_type, x.double(), e.double(), t, x).to(x.dtype)


def subinterval_target(process: Process, prediction_type: str, x_s: Tensor, e: Tensor, s: Tensor, t: Tensor) -> Tensor:
    """The unbiased target at x_t = r x_s + b e when only x_s is known (arXiv 2510.27684, eq. of its score matching).

    E[e_0 | x_t] = (s_t / b) E[e | x_t], so a noise predictor learns (s_t / b) e, a predictor of x
    (x_t - (s_t^2 / b) e) / a_t, and a flow network of rectified flow c e - x_s / a_s with
    c = (s_t + a_t s_s^2 / a_s^2) / b. At s_s = 0 they are the usual targets.
    """
    b = expand(renoising(process, s, t)[1], x_s)
    x_t = renoise(process, x_s.double(), e.double(), s, t)
    (a_s, s_s), (a_t, s_t) = coefficients(process, s, x_s), coefficients(process, t, x_s)
    a_s = a_s.clamp_min(_SMALL)
    noise = s_t / b * e.double()
    x0 = x_s.double() / a_s - a_t * (s_s / a_s).square() / b * e.double()  # (x_t - s_t noise) / a_t, also at a_t = 0
    if prediction_type == "edm":
        return from_x0(process, "edm", x0, x_t, t).to(x_s.dtype)
    return _combine(process, prediction_type, x0, noise, t, x_s).to(x_s.dtype)


def _combine(process: Process, prediction_type: str, x: Tensor, e: Tensor, t: Tensor, like: Tensor) -> Tensor:
    """The network output that belongs to the pair (x, e)."""
    if prediction_type == "epsilon":
        return e
    if prediction_type == "sample":
        return x
    if prediction_type in ("v_prediction", "trigflow"):
        a, s = coefficients(process, t, like)
        return a * e - s * x
    if prediction_type == "flow_prediction":
        da, ds = (expand(value, like) for value in process.derivatives(t))
        return da * x + ds * e
    raise InputError(f"prediction_type = '{prediction_type}': allowed: {', '.join(PREDICTION_TYPES)}")


def to_epsilon(process: Process, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """e = (x_t - a x0) / s."""
    return from_x0(process, "epsilon", x0, x_t, t)


def to_score(process: Process, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """grad log p(x_t) = (a x0 - x_t) / s^2, by Tweedie."""
    a, s = coefficients(process, t, x_t)
    return ((a * x0.double() - x_t.double()) / s.square().clamp_min(_SMALL**2)).to(x_t.dtype)


def _edm(process: Process) -> EDM:
    if not isinstance(process, EDM):
        raise InputError(f"prediction_type = 'edm': needs the EDM noise process, got {type(process).__name__}")
    return process


# ---------------------------------------------------------------- diffusers


def process_of(scheduler: Any) -> tuple[Process, str]:
    """The noise process and the prediction type that a diffusers scheduler's config stands for.

    Raises InputError for a scheduler without alphas_cumprod that is not one of the known continuous ones.
    """
    name, config = type(scheduler).__name__, scheduler.config
    if name.startswith(("FlowMatch", "FlowMap")):
        return Flow(float(config.get("shift") or 1.0)), "flow_prediction"
    if config.get("use_flow_sigmas"):
        return Flow(float(config.get("flow_shift") or 1.0)), "flow_prediction"
    if name == "SCMScheduler":
        return TrigFlow(), "trigflow"
    if name.startswith(("EDM", "CMStochastic")):
        low, consistency = float(config.sigma_min), name.startswith("CMStochastic")
        if config.get("prediction_type", "epsilon") != "epsilon":
            raise InputError(f"scheduler {name}: prediction_type = '{config.prediction_type}', allowed: epsilon")
        rest = {"boundary": low, "time_factor": 250.0} if consistency else {"time_factor": 0.25}
        rho = float(config.get("rho", 7.0))
        return EDM(low or 0.002, float(config.sigma_max), rho, config.sigma_data, **rest), "edm"
    if getattr(scheduler, "alphas_cumprod", None) is None:
        raise InputError(f"scheduler {name}: no known noise process; it has no alphas_cumprod")
    kind = config.get("prediction_type", "epsilon")
    if kind not in PREDICTION_TYPES:
        raise InputError(f"scheduler {name}: prediction_type = '{kind}', allowed: {', '.join(PREDICTION_TYPES)}")
    return VP(scheduler.alphas_cumprod), kind
