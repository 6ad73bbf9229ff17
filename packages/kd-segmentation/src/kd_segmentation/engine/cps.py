"""Cross pseudo supervision (arXiv 2106.01226): two networks of one kind label unlabelled images for each other.

    L = CE(z_1(x), y) + CE(z_2(x), y) + w [CE(z_1(u_mix), yhat_2) + CE(z_2(u_mix), yhat_1)]
    u_mix = (1 - m) u_0 + m u_1,   yhat_k = argmax_c [(1 - m) z_k(u_0) + m z_k(u_1)]

Both learn; the first is kept. MGD's teachers are trained by it, and it is the baseline of a student without teachers.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

from torch import nn

from kd_segmentation.engine.batch import SegBatch
from kd_segmentation.engine.cutmix import draw_masks, full_logits, mixed, pseudo_labels, two_streams
from kd_segmentation.engine.losses import cross_entropy
from kdcore.distiller import Distiller, LossTerms
from kdcore.errors import InputError


class CPS(Distiller):
    """student: the network that is kept. other: its peer, a copy by default, which mmengine initialises on its own.

    start: steps on the labels alone first (ours; the paper starts from pre-trained weights, without which two fresh
    networks soon agree on one class for everything).
    """

    def __init__(
        self,
        student: nn.Module,
        teachers: Mapping[str, nn.Module] | None = None,
        *,
        other: nn.Module | None = None,
        weight: float = 1.0,
        start: int = 0,
    ):
        super().__init__()
        self.student = student
        self.other = copy.deepcopy(student) if other is None else other
        self.weight, self.start = weight, start

    def loss(self, batch: SegBatch, player: str = "student") -> LossTerms:
        if batch.labels is None:
            raise InputError("CPS: the labelled stream has no labels")
        terms = LossTerms()
        for name, network in (("first", self.student), ("second", self.other)):
            logits = full_logits(network, batch.images, (batch.labels.shape[-2], batch.labels.shape[-1]))
            terms[f"{name}_ce"] = (1.0, cross_entropy(logits, batch.labels))
        if self.progress.step >= self.start:
            terms.update(self._pseudo(batch))
        return terms

    def _pseudo(self, batch: SegBatch) -> LossTerms:
        u0, u1 = two_streams(batch)
        mask = draw_masks(u0)
        mix, size = mixed(u0, u1, mask), (u0.shape[-2], u0.shape[-1])
        # The networks are in training mode: statistics of u0 and u1 are those of their own pass.
        labels = [pseudo_labels(network, u0, u1, mask, together=False) for network in (self.other, self.student)]
        terms = LossTerms()
        for name, network, theirs in zip(("first", "second"), (self.student, self.other), labels):
            terms[f"{name}_cps"] = (self.weight, cross_entropy(full_logits(network, mix, size), theirs))
        return terms
