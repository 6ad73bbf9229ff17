"""A DomainMixture inside transformers' Trainer: at the start of each interval, measure, set the shares, draw.

One epoch of the Trainer is one interval. The work is done when an epoch begins, not when the one before it ends: a
checkpoint written at the boundary has the old interval's state, and a run resumed from it measures the same weights
again and draws the same samples.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from transformers import TrainerCallback

from kd_llm.engine.mixture import DomainMixture


class MixtureCallback(TrainerCallback):
    """Calls `start(model, interval, step)` before each interval that `mixture` has not drawn yet, then draws.

    start: sets the mixture's shares and says whether to go on; `step` is the number of optimiser steps done. It must
        leave the generators alone and do the same on every process. After False the Trainer takes one step more.
    steps: optimiser steps of an interval.
    """

    def __init__(self, mixture: DomainMixture, steps: int, start: Callable[[nn.Module, int, int], bool]):
        self.mixture, self.steps, self.start = mixture, steps, start

    def on_epoch_begin(self, args, state, control, model=None, **kwargs):
        interval = state.global_step // self.steps
        if self.mixture.interval < interval:
            if not self.start(model, interval, state.global_step):
                control.should_training_stop = True
            self.mixture.draw()
