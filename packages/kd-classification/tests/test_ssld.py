"""SSLD: the symmetric loss, the teacher's batch norm, labels that nothing reads, and runs from end to end."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from kd_classification.data import Batch
from kd_classification.engine.batch_norm import batch_statistics
from kd_classification.engine.selection import read_selection
from kd_classification.methods.ssld import METHOD, SSLD, distillation_loss, soft_cross_entropy
from kdcore import run
from kdcore.checkpoint import load_weights
from kdcore.errors import InputError
from kdcore.method import arm_config, load_config
from kdcore.stages import RunContext
from kdcore.training import make_accelerator

Z_S = [[1.0, 0.0, 0.0]]
Z_T = [[0.0, math.log(2.0), 0.0]]


def pair(requires_grad=False):
    z_s = torch.tensor(Z_S, dtype=torch.float64, requires_grad=requires_grad)
    return z_s, torch.tensor(Z_T, dtype=torch.float64)


def random_pair(seed, rows=4, classes=5, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, classes, generator=generator, dtype=torch.float64) * scale for _ in range(2)]


def small_resnet(seed=0, classes=4, width=4):
    torch.manual_seed(seed)
    args = {"layers": [1, 1, 1, 1], "channels": [width, width, width, 2 * width], "stem_width": 4}
    return timm.create_model("resnet18", num_classes=classes, in_chans=1, **args)


def digits_like(count=6, seed=1, labels=True):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 1, 16, 16, generator=generator)
    return Batch(images, torch.arange(count) % 4 if labels else None, torch.arange(count))


# ---------------------------------------------------------------- the loss


def test_values_of_e1_and_of_the_divergences_it_is_compared_with():
    z_s, z_t = pair()
    expected = {"forward": 0.2617239431, "symmetric": 0.2628918910, "js": 0.0638519664, "soft_ce": 1.3014447139}
    for name, value in expected.items():
        assert distillation_loss(z_s, z_t, name).item() == pytest.approx(value, abs=1e-10)
    assert distillation_loss(z_t, z_s, "forward").item() == pytest.approx(0.2640598388, abs=1e-10)


def test_gradient_is_that_of_e2():
    z_s, z_t = pair(requires_grad=True)
    (gradient,) = torch.autograd.grad(distillation_loss(z_s, z_t), z_s)
    assert gradient[0].tolist() == pytest.approx([0.3274792655, -0.2629663060, -0.0645129595], abs=1e-10)
    assert gradient.sum().item() == pytest.approx(0.0, abs=1e-15)

    z_s, z_t = random_pair(3)
    z_s.requires_grad_()
    (gradient,) = torch.autograd.grad(distillation_loss(z_s, z_t), z_s)
    log_p, log_q = z_s.detach().log_softmax(1), z_t.log_softmax(1)
    p, q = log_p.exp(), log_q.exp()
    reverse = (p * (log_p - log_q)).sum(1, keepdim=True)
    torch.testing.assert_close(gradient, ((p - q) + p * ((log_p - log_q) - reverse)) / (2 * len(p)), atol=1e-14, rtol=0)


@pytest.mark.parametrize("name", ["symmetric", "forward", "soft_ce", "js"])
def test_gradcheck(name):
    z_s, z_t = random_pair(0, rows=3)
    assert torch.autograd.gradcheck(lambda z: distillation_loss(z, z_t, name), z_s.requires_grad_())


def test_soft_cross_entropy_has_the_gradient_of_forward_kl():
    z_s, z_t = random_pair(1)
    z_s.requires_grad_()
    left, right = (torch.autograd.grad(distillation_loss(z_s, z_t, name), z_s)[0] for name in ("soft_ce", "forward"))
    torch.testing.assert_close(left, right, atol=1e-15, rtol=0)
    half = soft_cross_entropy(z_s.detach().half(), z_t.half())
    assert half.dtype == torch.float32


@given(st.integers(0, 10_000), st.floats(0.1, 10.0))
def test_symmetric_and_above_jensen_shannon(seed, scale):
    z_s, z_t = random_pair(seed, scale=scale)
    loss = distillation_loss(z_s, z_t)
    torch.testing.assert_close(loss, distillation_loss(z_t, z_s), atol=1e-14, rtol=1e-13)
    assert loss > distillation_loss(z_s, z_t, "js") > 0


@given(st.integers(0, 10_000))
def test_zero_with_zero_gradient_at_logits_equal_up_to_a_constant_per_sample(seed):
    _, z_t = random_pair(seed)
    shift = torch.linspace(-3, 3, len(z_t), dtype=torch.float64).unsqueeze(1)
    for constant in (torch.zeros_like(shift), shift):
        z_s = (z_t + constant).requires_grad_()
        loss = distillation_loss(z_s, z_t)
        (gradient,) = torch.autograd.grad(loss, z_s)
        assert abs(loss.item()) < 1e-14
        assert gradient.abs().max() < 1e-14


def test_near_equality_it_is_four_times_jensen_shannon():
    direction, z_t = random_pair(5, scale=1.0)
    ratios = []
    for size in (1e-1, 1e-2, 1e-3):
        z_s = z_t + size * direction
        ratios.append((distillation_loss(z_s, z_t) / distillation_loss(z_s, z_t, "js")).item())
    errors = [abs(ratio - 4) for ratio in ratios]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-4


def test_release_scaling_is_the_same_number():
    """The release multiplies by C and takes the mean over B x C."""
    z_s, z_t = random_pair(6)
    log_p, log_q = z_s.log_softmax(1), z_t.log_softmax(1)
    release = (0.5 * (log_q.exp() - log_p.exp()) * (log_q - log_p)).mean() * z_s.shape[1]
    assert distillation_loss(z_s, z_t).item() == pytest.approx(release.item(), abs=1e-12)


def test_extreme_logits_stay_finite_where_an_eps_flattens_the_gradient():
    z_t = torch.tensor([[60.0, -60.0, 0.0]])
    z_s = torch.tensor([[-60.0, 60.0, 0.0]], requires_grad=True)
    loss = distillation_loss(z_s, z_t)
    (gradient,) = torch.autograd.grad(loss, z_s)
    assert torch.isfinite(loss)
    assert torch.isfinite(gradient).all()
    assert loss.item() == pytest.approx(120.0, rel=1e-6)  # both one-hot: (120 + 120) / 2

    eps = 1e-10
    p, q = z_s.softmax(1), z_t.softmax(1)
    with_eps = 0.5 * (q * torch.log((q + eps) / (p + eps)) + p * torch.log((p + eps) / (q + eps))).sum()
    (other,) = torch.autograd.grad(with_eps, z_s)
    assert with_eps.item() < 30  # ln(1 / eps) is all an eps leaves of 120
    assert (gradient - other).abs().max() > 0.1


def test_unknown_loss_and_unequal_class_counts_are_refused():
    z_s, z_t = pair()
    with pytest.raises(ValueError, match="name is 'jeffreys'; allowed: 'symmetric'"):
        distillation_loss(z_s, z_t, "jeffreys")
    with pytest.raises(ValueError, match="classes"):
        distillation_loss(z_s, z_t[:, :2])


# ---------------------------------------------------------------- labels are not read


@pytest.mark.parametrize("labels", [torch.tensor([3, 2, 1, 0, 3, 2]), torch.full((6,), -1), None])
def test_labels_do_not_change_a_bit(labels):
    def trained(batch):
        distiller = SSLD(small_resnet(1, width=8), small_resnet(2)).train()
        optimizer = torch.optim.SGD(distiller.student.parameters(), lr=0.1, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            terms = distiller.loss(batch)
            terms.total().backward()
            optimizer.step()
        return terms.total().detach(), distiller.student.state_dict()

    batch = digits_like()
    (loss, state), (other_loss, other_state) = trained(batch), trained(batch._replace(labels=labels))
    assert torch.equal(loss, other_loss)
    assert all(torch.equal(state[name], other_state[name]) for name in state)


@pytest.mark.parametrize("labels", [torch.full((6,), -1), None])
def test_mixup_works_without_labels(labels):
    distiller = SSLD(small_resnet(1), small_resnet(2)).train()
    distiller.mixup = timm.data.Mixup(mixup_alpha=1.0, num_classes=4)
    batch = digits_like()._replace(labels=labels)
    mixed = distiller.mixed(batch)
    assert not torch.equal(mixed.images, batch.images)
    assert mixed.labels is labels
    assert set(distiller(batch)) == {"symmetric"}


def test_supervised_weights():
    batch = digits_like()
    distiller = SSLD(small_resnet(1), small_resnet(2), supervised=0.25, loss="forward").eval()
    terms = distiller.loss(batch)
    assert {name: weight for name, (weight, _) in terms.items()} == {"ce": 0.25, "forward": 0.75}
    logits = distiller.student(batch.images)
    torch.testing.assert_close(terms["ce"][1], F.cross_entropy(logits, batch.labels))
    assert list(SSLD(None, small_resnet(), supervised=1.0, teacher_bn="eval").loss(batch)) == ["ce"]


# ---------------------------------------------------------------- the teacher's batch norm


class DropoutTeacher(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.5))
        self.head = nn.Linear(6, 4)

    def forward(self, images):
        return self.head(self.body(images).mean((2, 3)))


@pytest.mark.parametrize("make", [DropoutTeacher, lambda: small_resnet(3)], ids=["dropout", "resnet"])
def test_teacher_depends_on_the_batch_in_train_mode_only_and_never_changes(make):
    batch, other = digits_like(), digits_like(seed=9)
    changed = batch._replace(images=torch.cat([batch.images[:1], other.images[1:]]))
    for mode, depends in (("train", True), ("eval", False)):
        teacher = make()
        before = {name: value.clone() for name, value in teacher.state_dict().items()}
        distiller = SSLD(teacher, small_resnet(2), teacher_bn=mode).train()
        z, z_changed, again = (distiller.teacher_logits(b) for b in (batch, changed, batch))
        assert torch.equal(z, again), "dropout must be off, and nothing may accumulate"
        same = torch.allclose(z[0], z_changed[0], atol=1e-6)
        assert same is not depends
        distiller.loss(batch).total().backward()
        assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
        assert all(p.grad is None for p in teacher.parameters())
        assert not any(module.training for module in teacher.modules())


def test_batch_statistics_are_those_of_torch_and_the_layers_are_restored_after_an_error():
    images = digits_like().images
    layer = nn.BatchNorm2d(1, momentum=None)
    layer.eval()
    layer.running_mean.fill_(float("inf"))  # a momentum of 0 would turn this into NaN
    with batch_statistics(layer):
        inside = layer(images)
    torch.testing.assert_close(inside, F.batch_norm(images, None, None, layer.weight, layer.bias, True))
    with pytest.raises(RuntimeError, match="stop"), batch_statistics(layer):
        raise RuntimeError("stop")
    assert (layer.training, layer.track_running_stats) == (False, True)
    assert layer.num_batches_tracked == 0


def test_timm_batch_norm_with_activation_is_covered():
    torch.manual_seed(0)
    teacher = timm.create_model("mobilenetv3_small_050", num_classes=4, in_chans=1)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    distiller = SSLD(teacher, small_resnet(2)).train()
    z = distiller.teacher_logits(digits_like())
    assert not torch.allclose(z, teacher(digits_like().images), atol=1e-3)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_batch_of_one_is_refused_where_it_has_no_statistics():
    single = digits_like(1)
    with pytest.raises(InputError, match=r"batch of 1 image.*train\.batch_size.*teacher_bn = 'eval'"):
        SSLD(small_resnet(1), small_resnet(2)).teacher_logits(single)
    assert SSLD(small_resnet(1), small_resnet(2), teacher_bn="eval").teacher_logits(single).shape == (1, 4)
    without_norm = nn.Sequential(nn.Flatten(), nn.Linear(256, 4))
    assert SSLD(without_norm, small_resnet(2)).teacher_logits(single).shape == (1, 4)


# ---------------------------------------------------------------- runs

SHRUNK = [
    "teacher.args={layers: [1, 1, 1, 1], channels: [8, 8, 16, 16], stem_width: 8}",
    "teacher.train.epochs=3",
    "train.steps=12",
    "train.checkpoint_every=5",
    "method_args.finetune.steps=7",
    "method_args.k=10",
    "train.log_every=1",
]


@pytest.fixture
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("KD_CACHE", str(tmp_path_factory.getbasetemp() / "kd-cache"))


def shrunk(*more):
    return load_config("ssld/small", [*SHRUNK, *more])


def logged(folder, stage):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line.get("kind") == "train" and line["stage"] == stage]


@pytest.mark.usefixtures("cache")
def test_run_leaves_a_student_that_stock_timm_loads(tmp_path):
    method, config = shrunk()
    metrics = run.train(method, config, tmp_path / "run", quiet=True, cpu=True)
    assert list(json.loads((tmp_path / "run/stages.json").read_text())) == ["teacher", "select", "distill", "finetune"]
    student = timm.create_model(
        config.student.name,
        num_classes=10,
        in_chans=1,
        checkpoint_path=str(tmp_path / "run/student/model.safetensors"),
        **config.student.args,
    )
    assert sum(p.numel() for p in student.parameters()) == metrics["student/parameters"]

    chosen = read_selection(tmp_path / "run/selection.csv")
    assert metrics["selected"] == len(chosen.index) <= 10 * 10
    assert metrics["out_of_domain_share"] == pytest.approx(chosen.out_of_domain.double().mean().item())
    assert max(torch.bincount(chosen.classes)) <= 10
    distill, finetune = logged(tmp_path / "run", "distill"), logged(tmp_path / "run", "finetune")
    assert (distill[-1]["step"], finetune[-1]["step"]) == (12, 7)


@pytest.mark.usefixtures("cache")
def test_resume_in_the_last_stage_gives_the_same_student(tmp_path, monkeypatch):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    method, config = shrunk()
    run.train(method, config, whole, quiet=True, cpu=True)

    original, calls = SSLD.loss, []

    def failing(self, batch, player="student"):
        calls.append(1)
        if len(calls) == 12 + 6:  # one step after finetune's checkpoint
            raise KeyboardInterrupt
        return original(self, batch, player)

    monkeypatch.setattr(SSLD, "loss", failing)
    with pytest.raises(KeyboardInterrupt):
        run.train(method, config, cut, quiet=True, cpu=True)
    monkeypatch.setattr(SSLD, "loss", original)
    assert not (cut / "student").exists()
    run.train(method, config, cut, resume=True, quiet=True, cpu=True)
    left, right = (load_weights(folder / "student/model.safetensors") for folder in (whole, cut))
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.slow
@pytest.mark.usefixtures("cache")
def test_every_arm_of_small_takes_the_same_number_of_steps(tmp_path):
    from kdcore.config import override, parse_override, read_yaml
    from kdcore.method import find_config

    values = override(read_yaml(find_config("ssld/small")), dict(parse_override(text) for text in SHRUNK))
    for name, overrides in values["compare"].items():
        method, config = arm_config(values, overrides)
        metrics = run.train(method, config, tmp_path / name, quiet=True, cpu=True)
        steps = {stage: logged(tmp_path / name, stage)[-1]["step"] for stage in ("distill", "finetune")}
        assert steps == {"distill": 12, "finetune": 7}
        assert ("selected" in metrics) is (config.method_args.pool is not None)


@pytest.mark.usefixtures("cache")
def test_finetune_starts_from_the_distilled_student_and_fix_moves_the_classifier_alone(tmp_path):
    method, config = shrunk("method_args.fix={image_size: 20, steps: 4}", "method_args.finetune.lr_scale=1.0e-9")
    metrics = run.train(method, config, tmp_path / "run", quiet=True, cpu=True)
    distilled, finetuned, fixed = (
        load_weights(tmp_path / f"run/{name}/model.safetensors") for name in ("distill", "finetune", "student")
    )
    trained = [n for n in distilled if "running" not in n and "num_batches" not in n]
    assert all(torch.allclose(distilled[n], finetuned[n], atol=1e-6) for n in trained)
    changed = {name for name in fixed if not torch.equal(fixed[name], finetuned[name])}
    assert changed == {"fc.weight", "fc.bias"}
    saved = json.loads((tmp_path / "run/student/config.json").read_text())
    assert saved["pretrained_cfg"]["input_size"] == [1, 20, 20]
    assert 0 <= metrics["student/accuracy"] <= 1
    assert METHOD.predict(config, {"student": tmp_path / "run/student"}, 2)[0]["image"].shape == (20, 20)


@pytest.mark.usefixtures("cache")
def test_lr_scales_reach_the_optimiser(tmp_path):
    """A factor of 0 leaves stem and stages as they were distilled; the head moves."""
    method, config = shrunk("method_args.lr_scales=[0, 0, 0, 0, 0]", "method_args.finetune.lr_scale=1.0")
    run.train(method, config, tmp_path / "run", quiet=True, cpu=True)
    before, after = (load_weights(tmp_path / f"run/{name}/model.safetensors") for name in ("distill", "student"))
    moved = {n for n in after if not torch.equal(before[n], after[n]) and "running" not in n and "num_batches" not in n}
    assert moved == {"fc.weight", "fc.bias"}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method_args.supervised=0.5"], r"method_args\.supervised = 0\.5: a pool has no labels"),
        (["method_args.teacher_per_class=4"], r"teacher_per_class = 4: must be at least data\.per_class = 8"),
        (["train.batch_size=1"], r"train\.batch_size = 1: teacher_bn = 'train' needs at least 2 images"),
        (["method_args.finetune.batch_size=1"], r"finetune\.batch_size = 1"),
        (["teacher.cache=somewhere"], r"teacher\.cache: not for ssld"),
        (["method_args.pool={name: image_folder}"], r"pool\.root: required for pool\.name = 'image_folder'"),
        (["method_args.pool={name: image_folder, root: /nowhere}"], r"pool\.root = /nowhere: no such folder"),
        (["method_args.pool={name: image_folder, root: $KD_UNSET/x}"], "environment variable is not set"),
        (["method_args.pool={name: file_list, root: /nowhere.txt}"], "not a readable file list"),
        (["method_args.pool={name: file_list, root: x, out_of_domain: 0.5}"], r"only with pool\.name = 'rest'"),
        (["method_args.labeller={name: resnet18}"], r"method_args\.labeller: has no weights"),
        (["method_args.labeller={name: resnet18, checkpoint: /nowhere.safetensors}"], "no such file"),
        (["data.per_class=null", "method_args.teacher_per_class=null"], r"data\.per_class leaves no training image"),
    ],
)
def test_bad_input_is_named_before_anything_trains(tmp_path, overrides, message):
    method, config = shrunk(*overrides)
    context = RunContext(config, tmp_path, make_accelerator(config.train, cpu=True))
    with pytest.raises(InputError, match=message):
        method.stages(config, context)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method_args.loss=kl", r"'method_args\.loss' = 'kl': allowed: 'symmetric'"),
        ("method_args.pool.duplicate=none", r"unknown key 'method_args\.pool\.duplicate'; did you mean 'duplicates'"),
        ("method_args.k=0", r"'method_args\.k' = 0"),
        ("method_args.finetune={epochs: null}", "needs a budget"),
    ],
)
def test_bad_config_is_named(override, message):
    with pytest.raises(InputError, match=message):
        shrunk(override)


def test_paper_config_names_networks_that_timm_has():
    _, config = load_config("ssld/paper")
    assert config.method_args.finetune.budget(config.train).optimizer.lr == pytest.approx(0.008, rel=1e-3)
    assert config.method_args.finetune.budget(config.train).batch_size == 2048
    for model in (config.teacher, config.student):
        assert timm.is_model(model.name)
        with torch.device("meta"):
            network = timm.create_model(model.name, num_classes=1000)
        assert network.num_classes == 1000
    assert config.teacher.name in timm.list_pretrained("resnext101_32x16d*")


@pytest.mark.slow
@pytest.mark.usefixtures("cache")
def test_two_processes_choose_the_same_images(tmp_path):
    """Each process scores half of the pool; teacher and data are those of the single process."""
    method, config = shrunk()
    run.train(method, config, tmp_path / "one", quiet=True, cpu=True)
    kd = Path(sys.executable).with_name("kd")
    launch = [*(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2")]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command = [*launch, str(kd), "train", "ssld/small", *SHRUNK, "--output", str(tmp_path / "two"), "-q", "--cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    finished = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=300, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    one, two = (read_selection(tmp_path / name / "selection.csv") for name in ("one", "two"))
    assert torch.equal(one.index, two.index)
    assert torch.equal(one.classes, two.classes)
    torch.testing.assert_close(one.scores, two.scores, atol=2e-6, rtol=0)
    assert (tmp_path / "two" / "student" / "model.safetensors").is_file()


@pytest.mark.slow
def test_unlabelled_images_carry_the_student_and_confidence_keeps_foreign_ones_out(tmp_path):
    """Digits, two seeds: without any label the pool gives 3 points and more over supervised training on the same
    in-domain images, and top-k takes less than half of the pool's share of out-of-domain images."""
    gains, shares = [], []
    for seed in (0, 1):
        arms = {}
        for name, overrides in (
            ("ssld", []),
            ("ce", ["method_args.supervised=1.0", "method_args.pool=null"]),
        ):
            method, config = load_config("ssld/small", [f"seed={seed}", *overrides])
            arms[name] = SimpleNamespace(
                metrics=run.train(method, config, tmp_path / f"{name}-{seed}", quiet=True, cpu=True), config=config
            )
        gains.append(arms["ssld"].metrics["student/accuracy"] - arms["ce"].metrics["student/accuracy"])
        shares.append(arms["ssld"].metrics["out_of_domain_share"])
    assert sum(gains) / len(gains) > 0.03
    assert max(shares) < arms["ssld"].config.method_args.pool.out_of_domain / 2
