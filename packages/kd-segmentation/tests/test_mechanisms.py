"""What is measured beside the IoU, on networks and labels made by hand."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kd_segmentation.engine.losses import self_similarity
from kd_segmentation.engine.mechanisms import Complements, TokenSimilarity
from kdcore.losses import cka_linear


class Net(nn.Module):
    """Three channels in, through `decode_head.sep_bottleneck`, three logits."""

    def __init__(self, width: int):
        super().__init__()
        self.decode_head = nn.Module()
        self.decode_head.sep_bottleneck = nn.Conv2d(3, width, 1)
        self.classifier = nn.Conv2d(width, 3, 1)

    def forward(self, images):
        return self.classifier(self.decode_head.sep_bottleneck(images))


def samples(logits, names=("a", "b")):
    return [
        SimpleNamespace(
            seg_logits=SimpleNamespace(data=z),
            pred_sem_seg=SimpleNamespace(data=z.argmax(0, keepdim=True)),
            img_path=f"folder/{name}.png",
        )
        for z, name in zip(logits, names)
    ]


def test_complements_of_two_teachers():
    torch.manual_seed(0)
    networks = {"student": Net(4), "teacher_wide": Net(6), "teacher_deep": Net(5)}
    assert Complements.of({"student": Net(4), "teacher": Net(6)}) is None
    found = Complements.of(networks)
    batches = [torch.randn(2, 3, 8, 9), torch.randn(1, 3, 8, 9)]
    every = torch.cat(batches)
    with torch.no_grad():
        with found.watching():
            for images in batches:
                found.add({role: samples(net(images)) for role, net in networks.items()})
        student, wide, deep = (net(every) for net in networks.values())
        maps = [networks[role].decode_head.sep_bottleneck(every) for role in ("student", "teacher_wide")]
    values = found.result()
    gap = (student.mean((2, 3)) - deep.mean((2, 3))).abs().sum(1).mean()
    assert values["image_gap"] == pytest.approx(gap.item(), rel=1e-5)
    region = (self_similarity(maps[0]) - self_similarity(maps[1])).square().mean()
    assert values["region_gap"] == pytest.approx(region.item(), rel=1e-4)
    labels = [z.argmax(1) for z in (student, wide, deep)]
    apart = labels[1] != labels[2]
    assert values["teachers/disagreement"] == pytest.approx(apart.float().mean().item())
    assert values["follows_wide"] == pytest.approx((labels[0] == labels[1])[apart].float().mean().item())
    assert values["follows_deep"] == pytest.approx((labels[0] == labels[2])[apart].float().mean().item())
    networks["student"].test_cfg = {"mode": "slide"}  # windows: the decoder is not the image's
    assert "region_gap" not in Complements(networks).result()


def test_tokens_of_shifted_images():
    import timm

    torch.manual_seed(0)
    arguments = {"img_size": 16, "patch_size": 8, "depth": 1, "num_heads": 1, "num_classes": 0}
    networks = {
        role: timm.create_model("vit_tiny_patch16_224", embed_dim=dim, **arguments).eval()
        for role, dim in (("student", 4), ("teacher", 6))
    }
    assert TokenSimilarity.of({**networks, "teacher": Net(4)}) is None
    other = timm.create_model("vit_tiny_patch16_224", embed_dim=6, **{**arguments, "patch_size": 4})
    assert TokenSimilarity.of({**networks, "teacher": other}) is None
    found = TokenSimilarity.of(networks)
    clean, shifted = torch.randn(2, 3, 16, 16), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        for images, names in ((clean, ("a", "b")), (shifted, ("b", "x")), (clean.flip(0), ("b", "a"))):
            with found.watching():
                for net in networks.values():
                    net(images)
                found.add({"student": samples(torch.zeros(2, 3, 2, 2), names)})
                found.end_of_set()
        own, theirs = ([net.forward_features(x)[:, 1:] for x in (clean, shifted)] for net in networks.values())
    values = found.result()
    cka = [cka_linear(a.flatten(0, 1), b.flatten(0, 1)).item() for a, b in zip(own, theirs)]
    assert values["cka_unseen"] == pytest.approx((cka[1] + cka[0]) / 2, rel=1e-5)
    # Of the first domain only "b" is in the test data; the second holds the test data's own images.
    pair = F.cosine_similarity(own[0][1], own[1][0], dim=-1).mean().item()
    assert values["shift_cosine"] == pytest.approx((pair + 1) / 2, rel=1e-5)
