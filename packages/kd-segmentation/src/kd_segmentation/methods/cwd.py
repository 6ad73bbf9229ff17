"""Channel-wise Knowledge Distillation for Dense Prediction (arXiv 2011.13256, 2021).

Every channel of a map becomes a distribution over the pixels, and the student's is drawn to the teacher's: what counts
is where a channel is active, not how strongly.

    phi(y_c)_i = exp(y_{c,i} / T) / sum_j exp(y_{c,j} / T)                        (eq. 3)
    L_cwd      = T^2 / C  sum_c sum_i phi(t_c)_i log(phi(t_c)_i / phi(s_c)_i)     (eq. 4)
    L          = L_task + alpha L_cwd                                             on the logits, or on a feature map

The plain baselines of dense distillation are the same stage with another entry in `losses`: PixelKL (softened logits at
every pixel), FeatureMSE, any module in mmseg's registry, between any modules of the two networks; none of them is
training on the labels alone.

teacher: one or more frozen networks. student: keeps its own losses and auxiliary heads. Ships: the student.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field
from torch import nn

from kd_segmentation.engine.tapped import TapLossConfig, TappedDistiller
from kd_segmentation.runs import segmentation_method
from kdcore.config import MethodConfig


def default_losses() -> dict[str, TapLossConfig]:
    """The paper's loss on logits."""
    return {"channel": TapLossConfig.model_validate({"type": "ChannelKL", "weight": 3.0, "temperature": 4.0})}


class CWDConfig(MethodConfig):
    losses: dict[str, TapLossConfig] = Field(
        default_factory=default_losses,
        description="name -> type, weight, student and teacher (modules, or logits), source, connector, arguments",
    )
    task: float = Field(1.0, ge=0, description="weight of the student's own losses")


class CWD(TappedDistiller):
    """Channel-wise distillation of logits, or the losses that are given."""

    def __init__(
        self,
        student: nn.Module,
        teachers: Mapping[str, nn.Module] | None = None,
        *,
        losses: Mapping[str, Any] | None = None,
        task: float = 1.0,
    ):
        super().__init__(student, teachers, losses=default_losses() if losses is None else losses, task=task)


METHOD = segmentation_method("cwd", __doc__, CWDConfig, "CWD")
