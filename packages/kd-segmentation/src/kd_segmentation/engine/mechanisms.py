"""How the methods work, measured beside the IoU: what a student took over from its teachers, on the test data.

Complements (a wide and a deep teacher, as MGD has them), for every arm with these teachers:

    image_gap     sum over classes of |spatial mean of the student's logits - the deep teacher's|, mean over images
    region_gap    mean squared difference of the self-similarities of decoder features, student and wide teacher
    follows_wide, follows_deep    of the pixels where the teachers disagree, the share with that teacher's label
    teachers/disagreement         the share of pixels where they do

Tokens (student and teacher are transformers of one grid of patches, as GKD has them):

    cka_unseen    linear CKA of the final tokens of student and teacher, mean over the further domains
    shift_cosine  cosine of the student's final tokens of an image and of the same image in a further domain, mean;
                  where a domain has images of the same names as the test data

Both look at networks that predict an image as a whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_segmentation.engine.losses import self_similarity
from kd_segmentation.engine.tokens import last_block, vit_of
from kdcore.errors import InputError
from kdcore.losses import cka_linear
from kdcore.taps import FeatureTap

DECODER = "decode_head.sep_bottleneck"
REGIONS = 7
IMAGES = 64  # whose tokens are compared, of each data set


def whole(network: nn.Module) -> bool:
    """Whether a segmentor predicts an image in one pass."""
    return (getattr(network, "test_cfg", None) or {}).get("mode", "whole") == "whole"


# ---------------------------------------------------------------- complementary teachers


class Complements:
    """Sums over batches of what is said above of a wide and a deep teacher."""

    ROLES = ("student", "teacher_wide", "teacher_deep")

    def __init__(self, networks: Mapping[str, nn.Module]):
        self.taps: dict[str, FeatureTap] = {}
        if all(_has(networks[role], DECODER) and whole(networks[role]) for role in ("student", "teacher_wide")):
            self.taps = {role: FeatureTap(networks[role], {"A": DECODER}) for role in ("student", "teacher_wide")}
        self.sums = dict.fromkeys(("image", "region", "wide", "deep", "apart", "pixels"), 0.0)
        self.images = 0

    @classmethod
    def of(cls, networks: Mapping[str, nn.Module]) -> Complements | None:
        return cls(networks) if all(role in networks for role in cls.ROLES) else None

    def watching(self) -> ExitStack:
        return _entered(self.taps.values())

    def add(self, samples: Mapping[str, Sequence[Any]]) -> None:
        """Samples with `seg_logits` and `pred_sem_seg` by role, of one batch."""
        for own, wide, deep in zip(*(samples[role] for role in self.ROLES)):
            means = [item.seg_logits.data.mean((1, 2)) for item in (own, deep)]
            self.sums["image"] += float((means[0] - means[1]).abs().sum())
            labels = [item.pred_sem_seg.data for item in (own, wide, deep)]
            apart = labels[1] != labels[2]
            self.sums["apart"] += float(apart.sum())
            self.sums["pixels"] += apart.numel()
            self.sums["wide"] += float((apart & (labels[0] == labels[1])).sum())
            self.sums["deep"] += float((apart & (labels[0] == labels[2])).sum())
        count = len(samples["student"])
        if self.taps:
            maps = [self.taps[role]["A"] for role in ("student", "teacher_wide")]
            side = min(REGIONS, *(size for item in maps for size in item.shape[-2:]))
            self.sums["region"] += count * float(F.mse_loss(*(self_similarity(item, side) for item in maps)))
        self.images += count

    def result(self) -> dict[str, float]:
        sums, images = self.sums, max(self.images, 1)
        found = {"image_gap": sums["image"] / images}
        if self.taps:
            found["region_gap"] = sums["region"] / images
        apart = max(sums["apart"], 1.0)
        return {
            **found,
            "follows_wide": sums["wide"] / apart,
            "follows_deep": sums["deep"] / apart,
            "teachers/disagreement": sums["apart"] / max(sums["pixels"], 1),
        }


# ---------------------------------------------------------------- tokens of transformers


class TokenSimilarity:
    """Final tokens of student and teacher on the test data, added first, and on further domains, one after another."""

    ROLES = ("student", "teacher")

    def __init__(self, vits: Mapping[str, nn.Module]):
        self.vits = dict(vits)
        last = {role: f"blocks.{len(vit.blocks) - 1}" for role, vit in vits.items()}
        self.taps = {role: FeatureTap(vit, {"tokens": last[role]}) for role, vit in vits.items()}
        self.clean: dict[str, Tensor] | None = None
        self.found: dict[str, list[Tensor]] = {}
        self.names: list[str] = []
        self.cka: list[float] = []
        self.cosines: list[float] = []

    @classmethod
    def of(cls, networks: Mapping[str, nn.Module]) -> TokenSimilarity | None:
        """None where they are no transformers of one grid that predict images as a whole."""
        if not all(role in networks and whole(networks[role]) for role in cls.ROLES):
            return None
        try:
            vits = {role: vit_of(networks[role]) for role in cls.ROLES}
        except InputError:
            return None
        sizes = {role: getattr(vit.patch_embed, "patch_size", None) for role, vit in vits.items()}
        return cls(vits) if sizes["student"] == sizes["teacher"] else None

    def watching(self) -> ExitStack:
        self.found, self.names = {role: [] for role in self.ROLES}, []
        return _entered(self.taps.values())

    def add(self, samples: Mapping[str, Sequence[Any]]) -> None:
        if len(self.names) >= IMAGES:
            return
        for role in self.ROLES:
            vit = self.vits[role]
            self.found[role].append(last_block(vit, self.taps[role]["tokens"]).patches.cpu())
        self.names += [Path(sample.img_path).stem for sample in samples["student"]]

    def end_of_set(self) -> None:
        """After each data set."""
        tokens = {role: torch.cat([item.flatten(0, 1) for item in found]) for role, found in self.found.items()}
        own = dict(zip(self.names, (image for batch in self.found["student"] for image in batch)))
        if self.clean is None:
            self.clean = own
            return
        self.cka.append(float(cka_linear(tokens["student"], tokens["teacher"])))
        pairs = [(self.clean[name], image) for name, image in own.items() if name in self.clean]
        pairs = [(clean, image) for clean, image in pairs if clean.shape == image.shape]
        if pairs:
            clean, shifted = (torch.cat(side) for side in zip(*pairs))
            self.cosines.append(float(F.cosine_similarity(clean, shifted, dim=-1).mean()))

    def result(self) -> dict[str, float]:
        named = {"cka_unseen": self.cka, "shift_cosine": self.cosines}
        return {name: sum(values) / len(values) for name, values in named.items() if values}


def _has(network: nn.Module, name: str) -> bool:
    return any(known == name for known, _ in network.named_modules())


def _entered(taps: Any) -> ExitStack:
    stack = ExitStack()
    for tap in taps:
        stack.enter_context(tap)
    return stack
