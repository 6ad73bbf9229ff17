"""GKD: query-based soft distillation in float64, tokens of timm's transformers; a run through mmengine."""

from __future__ import annotations

import copy
import math
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from kd_segmentation.engine.batch import SegBatch
from kd_segmentation.engine.tokens import draw_patch_masks, tokens_of, vit_of
from kd_segmentation.methods.gkd import (
    GKD,
    QSD,
    GKDConfig,
    attention,
    attention_entropy,
    soft_retrieval,
    token_loss,
)
from kdcore.distiller import freeze
from kdcore.errors import InputError

D = torch.float64


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=D)


# ---------------------------------------------------------------- QSD


def test_soft_retrieval_by_hand():
    q = torch.tensor([[[1.0, 0], [0, 2]]], dtype=D)
    t = torch.tensor([[[1.0, 1], [0, -1]]], dtype=D)
    v = torch.tensor([[[2.0, 0], [0, 4]]], dtype=D)
    a = attention(q, t)
    expected = [[0.7310585786, 0.2689414214], [0.9820137900, 0.0179862100]]
    torch.testing.assert_close(a[0], torch.tensor(expected, dtype=D), atol=1e-9, rtol=0)
    found = soft_retrieval(q, t, v)
    expected = [[1.4621171573, 1.0757656854], [1.9640275801, 0.0719448398]]
    torch.testing.assert_close(found[0], torch.tensor(expected, dtype=D), atol=1e-9, rtol=0)
    torch.testing.assert_close(found, a @ v)
    assert token_loss(found, t).item() == pytest.approx(1.3064406953, abs=1e-9)


def test_one_token_has_no_query():
    head = QSD(3, 4).to(D)
    s, t = random(2, 1, 3), random(2, 1, 4, seed=1)
    found = head(s, t)
    torch.testing.assert_close(found, head.v(head.norm_v(s)))
    token_loss(found, t).backward()
    assert head.q.weight.grad.abs().max() < 1e-15
    assert head.q.bias.grad.abs().max() < 1e-15
    assert head.v.weight.grad.abs().sum() > 0


@given(st.integers(0, 1000))
def test_permuting_patches_of_both_permutes_the_output(seed):
    head = QSD(3, 4).to(D)
    p, t = random(1, 5, 3, seed=seed), random(1, 5, 4, seed=seed + 1)
    order = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(head(p[:, order], t[:, order]), head(p, t)[:, order])


def test_permuting_the_teacher_alone_changes_the_loss():
    head = QSD(3, 4).to(D)
    p, t = random(1, 5, 3), random(1, 5, 4, seed=1)
    assert token_loss(head(p, t.flip(1)), t.flip(1)).item() != pytest.approx(token_loss(head(p, t), t).item())


def test_extremes_of_the_attention():
    q, t, v = random(1, 4, 3), random(1, 4, 3, seed=1), random(1, 4, 2, seed=2)
    constant = torch.ones(1, 4, 2, dtype=D) * torch.tensor([2.0, -1.0], dtype=D)
    torch.testing.assert_close(soft_retrieval(q, t, constant), constant)
    torch.testing.assert_close(soft_retrieval(q * 0, t, v), v.mean(1, keepdim=True).expand_as(v))
    best = (q @ t.transpose(1, 2)).argmax(-1)[0]
    torch.testing.assert_close(soft_retrieval(q, 1e6 * t, v), v[:, best])
    torch.testing.assert_close(attention(q, t).sum(-1), torch.ones(1, 4, dtype=D))


def test_entropy_of_the_attention():
    head, p = QSD(3, 4).to(D), random(2, 5, 3)
    torch.testing.assert_close(attention_entropy(head, p, torch.zeros(2, 5, 4, dtype=D)).item(), math.log(5))
    assert attention_entropy(head, p, 1e6 * random(2, 5, 4, seed=1)).item() == pytest.approx(0, abs=1e-9)
    a = attention(head.q(head.norm_q(p[:1])), random(1, 5, 4, seed=1))
    expected = -(a * a.log()).sum(-1).mean()
    found = attention_entropy(head, p[:1], random(1, 5, 4, seed=1))
    torch.testing.assert_close(found, expected)
    assert not found.requires_grad
    assert attention_entropy(QSD(3, 4, query=False).to(D), p, random(2, 5, 4)).item() == 0


def test_heads_do_not_see_scale_and_shift_of_a_token():
    head = QSD(6, 4).to(D)
    p, t = random(1, 5, 6), random(1, 5, 4, seed=1)
    scaled = p * (1 + torch.rand(1, 5, 1, dtype=D)) + torch.rand(1, 5, 1, dtype=D)
    torch.testing.assert_close(head(scaled, t), head(p, t), atol=1e-4, rtol=1e-4)


def test_gradient_goes_to_the_student_and_not_to_the_keys():
    q, v = random(1, 3, 2).requires_grad_(), random(1, 3, 2, seed=1).requires_grad_()
    t = random(1, 3, 2, seed=2)
    assert torch.autograd.gradcheck(lambda a, b: soft_retrieval(a, t, b), (q, v))
    keys = t.clone().requires_grad_()
    token_loss(soft_retrieval(q, keys, v), keys).backward()
    assert keys.grad is None


def test_half_precision_attends_in_float32():
    q, t, v = (x.bfloat16() for x in (random(1, 4, 3), 8 * random(1, 4, 3, seed=1), random(1, 4, 2, seed=2)))
    expected = soft_retrieval(q.float(), t.float(), v.float())
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(soft_retrieval(q, t, v), expected)


# ---------------------------------------------------------------- tokens and distiller


@cache
def make(dim: int, depth: int, name: str = "vit_tiny_patch16_224", **more):
    import timm

    torch.manual_seed(dim)
    arguments = {"img_size": 16, "patch_size": 4, "embed_dim": dim, "depth": depth, "num_heads": 2, **more}
    return timm.create_model(name, num_classes=0, **arguments).to(D)


def gkd(**arguments) -> GKD:
    torch.manual_seed(0)
    student, teacher = copy.deepcopy(make(8, 2)), freeze(copy.deepcopy(make(12, 2)))
    return GKD(student, {"teacher": teacher}, **arguments).to(D)


IMAGES = random(4, 3, 16, 16, seed=9)


def test_terms_are_the_equation():
    distiller = gkd().eval()
    torch.manual_seed(3)
    terms = distiller.loss(SegBatch(IMAGES))
    torch.manual_seed(3)
    mask = draw_patch_masks(4, 16, probability=0.5, ratio=0.5)
    student, teacher, heads = distiller.student, distiller.teacher, distiller.heads
    s, t = student.forward_features(IMAGES), teacher.forward_features(IMAGES)
    token = heads["token"](s[:, :1], t[:, :1])
    patches = heads["feature"](s[:, 1:], t[:, 1:])
    l_token, l_patches = F.mse_loss(token, t[:, :1]).item(), F.mse_loss(patches, t[:, 1:]).item()
    assert terms["token"][1].item() == pytest.approx(l_token)
    assert terms["feature"][1].item() == pytest.approx((l_token + 16 * l_patches) / 17)
    hidden = tokens_of(student, IMAGES, mask, distiller.mask_token).patches
    expected = F.mse_loss(heads["patch"](hidden, t[:, 1:]), t[:, 1:]).item()
    assert terms["patch"][1].item() == pytest.approx(expected)
    assert {name: weight for name, (weight, _) in terms.items()} == {
        **dict.fromkeys(("token", "feature", "patch"), 1),
        "attention_entropy": 0,
    }


def test_images_without_a_mask_go_through_the_student_once():
    distiller, seen = gkd().eval(), []
    student, t = distiller.student, distiller.teacher.forward_features(IMAGES)[:, 1:]
    handle = student.patch_embed.register_forward_pre_hook(lambda module, arguments: seen.append(len(arguments[0])))
    torch.manual_seed(3)
    distiller.loss(SegBatch(IMAGES))["patch"][1].backward()
    assert seen == [4, 2]
    handle.remove()
    found = [parameter.grad for parameter in student.parameters()]
    distiller.zero_grad(set_to_none=True)
    torch.manual_seed(3)
    mask = draw_patch_masks(4, 16, probability=0.5, ratio=0.5)
    twice = tokens_of(student, IMAGES, mask, distiller.mask_token).patches  # a second pass of all
    F.mse_loss(distiller.heads["patch"](twice, t), t).backward()
    for ours, parameter in zip(found, student.parameters()):
        torch.testing.assert_close(ours, parameter.grad)


def test_masked_places_do_not_depend_on_their_pixels():
    vit, token = make(8, 2).eval(), torch.zeros(8, dtype=D)
    mask = torch.zeros(1, 16, dtype=torch.bool)
    mask[0, 5] = True  # rows 4 to 7, columns 4 to 7
    changed = IMAGES[:1].clone()
    changed[:, :, 4:8, 4:8] += 3
    torch.testing.assert_close(
        tokens_of(vit, changed, mask, token).patches, tokens_of(vit, IMAGES[:1], mask, token).patches
    )
    assert not torch.allclose(tokens_of(vit, changed).patches, tokens_of(vit, IMAGES[:1]).patches)
    plain = tokens_of(vit, IMAGES, torch.zeros(4, 16, dtype=torch.bool), token)
    torch.testing.assert_close(plain.patches, tokens_of(vit, IMAGES).patches)


@given(st.integers(1, 9), st.floats(0, 1), st.floats(0, 1))
def test_masks_cover_the_first_images(count, probability, ratio):
    mask = draw_patch_masks(count, 12, probability=probability, ratio=ratio)
    masked = int(probability * count)
    assert mask.sum(1).tolist() == [int(ratio * 12)] * masked + [0] * (count - masked)


def test_gradients_of_each_term():
    distiller = gkd().train()
    before = copy.deepcopy(distiller.teacher.state_dict())
    for name in ("token", "feature", "patch"):
        distiller.zero_grad()
        distiller.loss(SegBatch(IMAGES))[name][1].backward()
        assert distiller.student.patch_embed.proj.weight.grad.abs().sum() > 0, name
        has_token = distiller.mask_token.grad is not None and distiller.mask_token.grad.abs().sum() > 0
        assert has_token == (name == "patch")
    assert all(p.grad is None for p in distiller.teacher.parameters())
    assert all(torch.equal(before[name], value) for name, value in distiller.teacher.state_dict().items())
    unmasked = gkd(mask_probability=0.0)
    unmasked.loss(SegBatch(IMAGES)).total().backward()
    assert unmasked.mask_token.grad is None
    assert unmasked.heads["patch"].v.weight.grad.abs().sum() > 0


def test_without_query_each_token_is_projected():
    distiller = gkd(query=False)
    assert not any(".q." in name for name, _ in distiller.named_parameters())
    distiller.loss(SegBatch(IMAGES)).total().backward()


def test_registers_and_distillation_tokens_are_no_patches():
    registers = make(8, 2, reg_tokens=4, name="vit_tiny_patch16_224").eval()
    found = tokens_of(registers, IMAGES)
    assert (found.cls.shape, found.patches.shape) == ((4, 8), (4, 16, 8))
    distilled = make(12, 2, name="deit_tiny_distilled_patch16_224").eval()
    assert tokens_of(distilled, IMAGES).patches.shape == (4, 16, 12)
    eva = make(24, 2, name="eva02_tiny_patch14_224").eval()
    out = tokens_of(eva, IMAGES)
    assert out.patches.shape == (4, 16, 24)
    torch.testing.assert_close(out.patches.mean(-1), torch.zeros(4, 16, dtype=D), atol=1e-6, rtol=0)  # normalised


def test_bad_networks():
    with pytest.raises(InputError, match="student has 16 patches, teacher 4"):
        GKD(copy.deepcopy(make(8, 2)), {"teacher": make(12, 2, patch_size=8)}).to(D).loss(SegBatch(IMAGES))
    with pytest.raises(InputError, match="a Linear is no vision transformer of timm"):
        GKD(torch.nn.Linear(2, 2), {"teacher": make(12, 2)})
    with pytest.raises(InputError, match="GKD needs 'teacher', got wide"):
        GKD(make(8, 2), {"wide": make(12, 2)})
    with pytest.raises(InputError, match="has no class token"):
        vit_of(make(8, 2, class_token=False, global_pool="avg"))
    with pytest.raises(InputError, match="'mask_ratio' = 2"):
        gkd(mask_ratio=2)


def test_defaults_are_the_papers():
    args = GKDConfig()
    assert (args.token, args.feature, args.patch, args.mask_probability, args.mask_ratio) == (1, 1, 1, 0.5, 0.5)
    assert (args.query, args.freeze, args.joint) == (True, True, False)


# ---------------------------------------------------------------- with mmseg

TINY = (
    "train_cfg.max_iters=3",
    "train_cfg.val_interval=10",
    "teacher_training.train_cfg.max_iters=2",
    "teacher_training.train_dataloader.batch_size=2",
    "train_dataloader.batch_size=2",
    "test_dataloader.dataset.indices=4",
    "domains={blur: {split: val_blur}}",
)


def config_of(*overrides):
    from kdcore.method import load_config

    method, config = load_config("gkd/small", [*TINY, *overrides])
    for stage in config.method_args.representation:
        stage.train_cfg["max_iters"] = 3
        stage.train_dataloader["batch_size"] = 4
    return method, config


@pytest.mark.slow
def test_representation_then_a_head_on_the_frozen_backbone(tmp_path):
    import timm

    from kd_segmentation.integrations.networks import open_saved
    from kdcore import run

    method, config = config_of()
    metrics = run.train(method, config, tmp_path / "run", quiet=True, cpu=True)
    assert {"student/mIoU", "student/mIoU_blur", "student/mIoU_unseen", "teacher/mIoU_unseen"} <= set(metrics)
    log = (tmp_path / "run" / "metrics.jsonl").read_text()
    for text in ('"stage": "task_agnostic"', '"stage": "domain_agnostic"', '"patch"', '"attention_entropy"'):
        assert text in log
    assert '"stage": "student"' in log
    assert '"decode.ce"' in log
    assert 0 < metrics["cka_unseen"] <= 1
    assert -1 <= metrics["shift_cosine"] < 1
    # The task left the backbone as the representation made it, bit by bit.
    student = open_saved(tmp_path / "run" / "student")
    arguments = {"img_size": 64, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3, "num_classes": 0}
    path = tmp_path / "run" / "domain_agnostic" / "model.safetensors"
    vit = timm.create_model("vit_tiny_patch16_224", checkpoint_path=str(path), **arguments)
    kept = student.backbone.timm_model.model.state_dict()
    assert kept.keys() <= vit.state_dict().keys()
    assert all(torch.equal(value, vit.state_dict()[name]) for name, value in kept.items())
    fresh = timm.create_model("vit_tiny_patch16_224", **arguments)
    assert not torch.equal(fresh.blocks[0].mlp.fc1.weight, vit.blocks[0].mlp.fc1.weight)
    config_text = (tmp_path / "run" / "student" / "config.py").read_text()
    assert "kd_segmentation" not in config_text
    for arm in ("method_args.freeze=false", "method_args.joint=true"):
        method, config = config_of(arm)
        assert "student/mIoU" in run.train(method, config, tmp_path / arm[-5:], quiet=True, cpu=True)


@pytest.mark.slow
def test_bad_input_of_gkd(tmp_path):
    from kdcore import run

    for override, message in (
        ("method_args.representation=[]", r"method_args\.representation: needs at least one stage"),
        ("model.student.backbone.model_name=vit_tiny_patch16_225", "the network cannot be built|timm cannot make it"),
        ("model.teachers.teacher.model.backbone.patch_size=16", "student has 64 patches, teacher 16"),
        ("model.teachers={}", "foundation: is required"),
        ("method_args.foundation={name: vit_nowhere}", "foundation.name = 'vit_nowhere': timm cannot make it"),
    ):
        from kdcore.method import load_config

        method, config = load_config("gkd/small", [*TINY, override])
        with pytest.raises(InputError, match=message):
            run.train(method, config, tmp_path / "bad", quiet=True, cpu=True)


@pytest.mark.slow
def test_a_foundation_of_timm_with_another_geometry_and_normalisation(tmp_path):
    from safetensors.torch import save_file

    from kdcore import run

    tiny = {"embed_dim": 24, "depth": 2, "num_heads": 2}
    import timm

    torch.manual_seed(0)
    teacher = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=2, num_classes=0, **tiny)
    save_file(teacher.state_dict(), tmp_path / "teacher.safetensors")
    method, config = config_of()
    args = config.method_args
    values = args.model_dump()
    values["foundation"] = {
        "name": "vit_tiny_patch16_224",
        "checkpoint": str(tmp_path / "teacher.safetensors"),
        "arguments": {"img_size": 64, "patch_size": 8, **tiny},
    }
    values["representation"][1]["name"] = "second"
    config = config.model_copy(
        update={"method_args": GKDConfig.model_validate(values), "model": {**config.model, "teachers": {}}}
    )
    metrics = run.train(method, config, tmp_path / "run", quiet=True, cpu=True)
    assert "student/mIoU" in metrics
    assert not any(name.startswith("teacher") for name in metrics)
    assert (tmp_path / "run" / "second" / "model.safetensors").is_file()


@pytest.mark.slow
def test_the_papers_head_trains_and_predicts_without_compiled_operators():
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    from kd_segmentation.integrations import networks
    from kd_segmentation.runs import stock_model
    from kdcore.method import load_config

    _, config = load_config("gkd/paper")
    model = networks.without_initialisation(stock_model(config, config.model["student"]))
    model["backbone"]["img_size"] = 64
    model["data_preprocessor"]["size"] = (64, 64)
    model["decode_head"]["train_cfg"]["num_points"] = 64
    network = networks.build(model, "model.student")
    sample = SegDataSample(metainfo={"img_shape": (64, 64), "ori_shape": (64, 64), "pad_shape": (64, 64)})
    sample.gt_sem_seg = PixelData(data=torch.randint(0, 19, (1, 64, 64)))
    losses = network.loss(torch.randn(1, 3, 64, 64), [sample])
    sum(value for name, value in losses.items() if "loss" in name).backward()
    assert network.backbone.timm_model.model.patch_embed.proj.weight.grad.abs().sum() > 0
    with torch.no_grad():
        assert network.eval().predict(torch.randn(1, 3, 64, 64), [sample])[0].pred_sem_seg.data.shape == (1, 64, 64)
