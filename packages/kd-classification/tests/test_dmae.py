"""DMAE: the alignment, what the teacher runs, the shared mask, and a run whose encoder stock timm fine-tunes."""

import json

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from kd_classification.data import Batch
from kd_classification.engine import masked_vit as mv
from kd_classification.engine.mae import DecoderConfig, MaskedAutoencoder
from kd_classification.methods.dmae import DMAE, aligned_pairs, alignment_loss, make_projector
from kd_classification.testing import check_stock_encoder
from kdcore.compare import load_arms
from kdcore.errors import InputError
from kdcore.method import load_config
from kdcore.run import train

DECODER = DecoderConfig(width=16, depth=1, heads=2)


def vit(seed, width=16, depth=4, **args):
    torch.manual_seed(seed)
    size = {"img_size": 16, "patch_size": 4, "embed_dim": width, "depth": depth, "num_heads": 2, **args}
    return timm.create_model("vit_tiny_patch16_224", num_classes=0, in_chans=1, **size).double()


def batch(count=3):
    images = torch.randn(count, 1, 16, 16, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return Batch(images, torch.zeros(count, dtype=torch.long), torch.arange(count))


def toy(teacher=None, student=None, **args):
    torch.manual_seed(3)
    given = {"mask_ratio": 0.5, "decoder": DECODER, **args}
    return DMAE(teacher or vit(1, width=24, depth=8), student or vit(2), **given).double()


def gradients(distiller, seed=0):
    torch.manual_seed(seed)  # the mask
    total = distiller.loss(batch()).total()
    names, parameters = zip(*[(n, p) for n, p in distiller.named_parameters() if p.requires_grad], strict=True)
    return total, dict(zip(names, torch.autograd.grad(total, parameters, allow_unused=True), strict=True))


# ---------------------------------------------------------------- the alignment


def test_alignment_by_hand():
    teacher = torch.tensor([[[3.0, 4, 0, 0]]], dtype=torch.float64)
    student = torch.tensor([[[0.0, 0, 5, 12]]], dtype=torch.float64)
    assert alignment_loss(student, teacher).item() == pytest.approx(44 / 65)
    assert alignment_loss(student, teacher, "l2").item() == pytest.approx(2 / 4)
    assert alignment_loss(student, teacher, normalise=False).item() == pytest.approx((3 + 4 + 5 + 12) / 4)
    with pytest.raises(InputError, match="projected: shape"):
        alignment_loss(student, teacher[..., :2])


def test_lengths_do_not_count():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 2, 5, 4, dtype=torch.float64)
    student.requires_grad_()
    loss = alignment_loss(student, teacher)
    for scaled in (alignment_loss(student, 7 * teacher), alignment_loss(0.3 * student, teacher)):
        torch.testing.assert_close(scaled, loss)
    (gradient,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close((gradient * student).sum(-1), torch.zeros(2, 5, dtype=torch.float64), rtol=0, atol=1e-15)


@pytest.mark.parametrize("distance", ["l1", "l2"])
def test_alignment_gradient_by_finite_differences(distance):
    torch.manual_seed(1)
    student, teacher = torch.randn(2, 1, 3, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: alignment_loss(x, teacher, distance), student.requires_grad_())


def test_equal_features_through_the_identity_are_a_zero_with_zero_gradient():
    features = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    projector = make_projector("linear", 4, 4).double()
    with torch.no_grad():
        projector.weight.copy_(torch.eye(4))
        projector.bias.zero_()
    loss = alignment_loss(projector(features), features.detach())
    assert loss.item() == 0
    for gradient in torch.autograd.grad(loss, [features, *projector.parameters()]):
        assert (gradient == 0).all()


def test_half_precision_is_compared_in_float32():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 2, 5, 64)
    loss = alignment_loss(student.bfloat16(), teacher.bfloat16())
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(alignment_loss(student, teacher).item(), rel=1e-2)


# ---------------------------------------------------------------- the step


def test_both_networks_see_the_patches_of_one_mask():
    """A teacher that is the student, without a projector: nothing to align but for a second draw."""
    student = vit(2)
    teacher = vit(2)
    distiller = toy(teacher, student, projector="none", student_blocks=[2], teacher_blocks=[2])
    assert distiller.loss(batch())["align_2"][1].item() == 0


def test_the_loss_is_the_sum_of_equation_3():
    distiller, x = toy(alpha=0.7, student_blocks=[1, 2], teacher_blocks=[3, 6]), batch()
    torch.manual_seed(0)
    terms = distiller.loss(x)
    torch.manual_seed(0)
    mask = distiller.draw(x.images)
    pixel, seen = distiller.reconstruction(x.images, mask, [1, 2])
    expected = pixel
    for (own, block), projector in zip([(1, 3), (2, 6)], distiller.projectors, strict=True):
        known = mv.encode(distiller.teacher, x.images, mask.keep, features=[block]).features[block]
        s, t = F.normalize(projector(seen.features[own]), dim=-1), F.normalize(known, dim=-1)
        expected = expected + 0.7 * (s - t).abs().mean()
    assert list(terms) == ["pixel", "align_1", "align_2"]
    torch.testing.assert_close(terms.total(), expected)


def test_without_the_alignment_it_is_a_masked_autoencoder():
    distiller = toy(alpha=0.0)
    torch.manual_seed(3)
    plain = MaskedAutoencoder(vit(2), mask_ratio=0.5, decoder=DECODER).double()
    plain.load_state_dict({n: v for n, v in distiller.state_dict().items() if not n.startswith(("teacher", "proj"))})
    (value, own), (expected, others) = gradients(distiller), gradients(plain)
    torch.testing.assert_close(value, expected, rtol=0, atol=0)
    for name, gradient in own.items():
        if name.startswith("projectors"):
            assert gradient is None
        else:
            torch.testing.assert_close(gradient, others[name], rtol=0, atol=0)


def test_what_lies_above_the_teachers_aligned_block_does_not_run():
    distiller = toy(teacher_blocks=[5], student_blocks=[2])
    value, before = gradients(distiller)
    with torch.no_grad():
        for module in (*distiller.teacher.blocks[6:], distiller.teacher.norm):
            for parameter in module.parameters():
                parameter.fill_(float("nan"))
    again, after = gradients(distiller)
    assert torch.equal(value, again)
    assert all(torch.equal(before[name], after[name]) for name in before)
    distiller.loss(batch()).total().backward()
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in distiller.teacher.parameters())
    assert not distiller.train().teacher.training


def test_the_order_of_the_kept_patches_does_not_count():
    distiller, x = toy(), batch()
    keep = mv.draw_mask(3, 16, 0.5).keep
    values = []
    for order in (torch.arange(8), torch.randperm(8)):
        mask = mv.mask_of(keep[:, order], 16)
        _, seen = distiller.reconstruction(x.images, mask, [2])
        known = distiller.teacher_features(x.images, mask)[0]
        values.append(alignment_loss(distiller.projectors[0](seen.features[2]), known))
    torch.testing.assert_close(*values)


def test_the_residual_stream_is_aligned_not_a_norm_of_it():
    distiller, x = toy(), batch()
    mask = distiller.draw(x.images)
    known = distiller.teacher_features(x.images, mask)[0]
    teacher = distiller.teacher
    tokens = mv.keep_patches(mv.embed(teacher, x.images), mask.keep, 1)
    torch.testing.assert_close(known, teacher.blocks[:6](tokens))


def test_a_teacher_behind_another_normalisation_gets_its_own_images():
    from kd_classification.models import Adapted

    plain, x = vit(1, width=24, depth=8), batch()
    adapted = Adapted(plain, [0.5], [0.25], own_mean=[0.4], own_std=[0.2]).double()
    mask = mv.draw_mask(3, 16, 0.5)
    found = toy(adapted).teacher_features(x.images, mask)
    own = (x.images * 0.25 + 0.5 - 0.4) / 0.2
    torch.testing.assert_close(found, toy(plain).teacher_features(own, mask))


def test_wrong_pairs_are_named():
    with pytest.raises(InputError, match="teacher_blocks: block 8; allowed: 0 to 7"):
        toy(student_blocks=[1], teacher_blocks=[8])
    with pytest.raises(InputError, match="projector = 'none': the widths differ, 16 and 24"):
        toy(projector="none")
    with pytest.raises(InputError, match="teacher: 3 prefix tokens, the student has 1"):
        toy(vit(1, reg_tokens=2))
    with pytest.raises(InputError, match="teacher: 8x8 patches, student has 4x4"):
        toy(vit(1, patch_size=2))


def test_timms_training_task_takes_it():
    from kd_classification.integrations import as_timm_task

    task, x = as_timm_task(toy().float()), batch()
    result = task(x.images.float(), x.labels)
    assert set(result) == {"loss", "pixel", "align_2"}
    result["loss"].backward()
    assert task.distiller.projectors[0].weight.grad is not None


# ---------------------------------------------------------------- configs and runs

SHRUNK = [
    "data.per_class=8",
    "data.test_fraction=0.1",
    "train.epochs=2",
    "train.batch_size=20",
    "train.log_every=1",
    "teacher.train.epochs=1",
    "teacher.train.batch_size=40",
    "finetune.train.epochs=1",
    "finetune.per_class=4",
]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KD_CACHE", str(tmp_path / "cache"))


@pytest.mark.slow
def test_run_ships_an_encoder_that_stock_timm_fine_tunes(tmp_path, cache):
    method, config = load_config("dmae/small", SHRUNK)
    metrics = train(method, config, tmp_path / "run", quiet=True, cpu=True)
    for name in ("student/linear_probe", "student/knn", "student/finetune", "teacher/linear_probe"):
        assert 0 <= metrics[name] <= 1
    assert metrics["teacher/relative_cost"] == pytest.approx((5 / 17) * (6 / 8))
    assert -1 <= metrics["student/alignment"] <= 1
    student = tmp_path / "run" / "student"
    assert not any(
        name.startswith(("head", "decoder", "projector")) for name in load_file(student / "model.safetensors")
    )
    check_stock_encoder(student, config.student)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    stages = {line["stage"]: list(line["terms"]) for line in lines if line.get("kind") == "train"}
    assert stages == {"teacher": ["pixel"], "student": ["pixel", "align_2"], "finetuned": ["ce"]}
    assert method.predict(config, {name: tmp_path / "run" / name for name in ("student", "finetuned")}, 4)


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["ce", "kd"])
def test_baselines_run_from_the_same_config(tmp_path, cache, arm):
    found = {a.name: a for a in load_arms("dmae/small", SHRUNK)}[arm]
    metrics = train(found.method, found.config, tmp_path / arm, quiet=True, cpu=True)
    assert 0 <= metrics["student/finetune"] <= 1
    record = json.loads((tmp_path / arm / "stages.json").read_text())
    names = ["teacher", "student", "finetuned"] if arm == "ce" else [
        "teacher", "teacher_finetuned", "student", "finetuned"
    ]  # fmt: skip
    assert list(record) == names


@pytest.mark.slow
def test_a_probe_trained_by_steps(tmp_path, cache):
    probe = "probe={pool: token, neighbours: null, train: {epochs: 2, batch_size: 20}}"
    method, config = load_config("dmae/small", [*SHRUNK, "pretrain=none", "finetune=null", probe])
    metrics = train(method, config, tmp_path / "run", quiet=True, cpu=True)
    assert 0 <= metrics["student/linear_probe"] <= 1
    assert "student/knn" not in metrics
    assert set(load_file(tmp_path / "run" / "probe" / "head.safetensors")) >= {"1.weight", "1.bias", "0.running_mean"}


@pytest.mark.slow
def test_resume_gives_the_weights_of_an_uncut_run(tmp_path, cache, monkeypatch):
    method, config = load_config("dmae/small", [*SHRUNK, "train.checkpoint_every=3", "finetune=null", "probe=null"])
    train(method, config, tmp_path / "whole", quiet=True, cpu=True)
    loss = DMAE.loss

    def cut(self, batch, player="student"):
        if self.progress.step == 5:
            raise KeyboardInterrupt
        return loss(self, batch, player)

    monkeypatch.setattr(DMAE, "loss", cut)
    with pytest.raises(KeyboardInterrupt):
        train(method, config, tmp_path / "cut", quiet=True, cpu=True)
    monkeypatch.setattr(DMAE, "loss", loss)
    train(method, config, tmp_path / "cut", resume=True, quiet=True, cpu=True)
    whole, resumed = (load_file(tmp_path / run / "student" / "model.safetensors") for run in ("whole", "cut"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_data_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.delenv("KD_DATA", raising=False)
    method, config = load_config("dmae/mnist")
    with pytest.raises(InputError, match="KD_DATA"):
        train(method, config, tmp_path / "run", quiet=True, cpu=True)


def test_paper_config_builds_and_is_the_papers_setting():
    _, config = load_config("dmae/paper")
    args = config.method_args
    assert timm.is_model_pretrained(config.teacher.name)
    with torch.device("meta"):
        teacher = timm.create_model(config.teacher.name, num_classes=0)
        student = timm.create_model(config.student.name, num_classes=0)
        assert aligned_pairs(teacher, student, args.student_blocks, args.teacher_blocks) == [(8, 17)]
        distiller = DMAE(teacher, student, **{name: getattr(args, name) for name in type(args).model_fields})
        images = torch.zeros(2, 3, config.data.image_size, config.data.image_size)
        terms = distiller.loss(Batch(images, torch.zeros(2), torch.arange(2)))
    assert list(terms) == ["pixel", "align_8"]
    assert config.train.batch_size * config.train.accumulation == 4096
    assert config.train.optimizer.lr == pytest.approx(1.5e-4 * 4096 / 256)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method_args.mask_ratio=1", "method_args.mask_ratio' = 1: should be less than 1"),
        ("method_args.student_blocks=[1, 2]", "student_blocks and teacher_blocks are pairs: 2 and 1 are given"),
        ("method_args.distance=huber", "method_args.distance' = 'huber': allowed"),
    ],
)
def test_bad_config_is_named(override, message):
    with pytest.raises(InputError) as caught:
        load_config("dmae/small", [override])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("student.name=resnet18", "student.args"),
        ("data.augment.mixup=0.2", "data.augment: mixup and cutmix mix labels"),
        ("method_args.mask_ratio=0.97", "mask_ratio = 0.97: leaves none of the 16 patches visible"),
        ("student.args.patch_size=4", "teacher: 4x4 patches, student has 8x8"),
        ("finetune={train: {epochs: 1, monitor: acuracy}}", "did you mean 'accuracy'"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_trains(tmp_path, override, message):
    method, config = load_config("dmae/small", [override])
    with pytest.raises(InputError) as caught:
        train(method, config, tmp_path / "run", quiet=True, cpu=True)
    assert message in str(caught.value)
    assert not (tmp_path / "run").exists()
