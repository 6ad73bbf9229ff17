"""A Distiller trained through timm's task protocol: optimiser factory, EMA, compile, DDP, checkpoints."""

import copy

import pytest
import timm
import torch
from timm.models import load_checkpoint
from timm.optim import create_optimizer_v2
from timm.task import LogitDistillationTask, TrainingTask, resume_task_checkpoint
from timm.utils import CheckpointSaver
from torch import nn

from kd_classification.engine.classifier import ClassifierDistiller
from kd_classification.integrations import as_timm_task
from kd_classification.methods.kd import KD
from kd_classification.models import Adapted
from kdcore.distiller import LossTerms, Player
from kdcore.errors import InputError


def network(width=4, seed=0, mean=0.5):
    torch.manual_seed(seed)
    args = {"layers": [1, 1, 1, 1], "channels": [width, width, width, 2 * width], "stem_width": 4}
    cfg = {"mean": (mean,) * 3, "std": (0.5,) * 3}
    return timm.create_model("resnet18", num_classes=5, pretrained_cfg_overlay=cfg, **args)


class Projected(ClassifierDistiller):
    """A method with a trained part that does not ship, and a clock."""

    def __init__(self, teacher, student):
        super().__init__(teacher, student)
        self.projector = nn.Linear(8, 16)
        self.register_buffer("epochs_seen", torch.zeros(()))

    def epoch_end(self):
        self.epochs_seen += 1

    def loss(self, batch, player="student"):
        features = self.student.forward_head(self.student.forward_features(batch.images), pre_logits=True)
        with torch.no_grad():
            wanted = self.teacher.forward_head(self.teacher.forward_features(batch.images), pre_logits=True)
        logits = self.student.get_classifier()(features)
        ce = nn.functional.cross_entropy(logits, batch.labels)
        return LossTerms(ce=(1.0, ce), feature=(0.5, (self.projector(features) - wanted).square().mean()))


@pytest.fixture
def batch():
    torch.manual_seed(1)
    return torch.randn(8, 3, 32, 32), torch.randint(5, (8,))


def train(task, batch, optimizer, steps=3):
    task.get_trainable_module().train()
    losses = []
    for _ in range(steps):
        result = task(*batch)
        optimizer.zero_grad()
        result["loss"].backward()
        optimizer.step()
        task.update_ema()
        losses.append(result["loss"].item())
    return losses


def sgd(task):
    return create_optimizer_v2(task.get_trainable_module(), "sgd", lr=0.05, weight_decay=1e-4)


def test_result_has_loss_logits_and_terms(batch):
    task = as_timm_task(KD(network(8), network(), alpha=0.3, temperature=2.0))
    assert isinstance(task, TrainingTask)
    task.get_trainable_module().eval()
    result = task(*batch)
    assert set(result) == {"loss", "output", "ce", "kd"}
    torch.testing.assert_close(result["loss"], 0.7 * result["ce"] + 0.3 * result["kd"])
    torch.testing.assert_close(result["output"], task.get_eval_model()(batch[0]))


def test_same_step_as_timms_own_logit_distillation(batch):
    student = network()
    ours = as_timm_task(KD(network(8, seed=3, mean=0.2), copy.deepcopy(student), alpha=0.4, temperature=3.0))
    theirs = LogitDistillationTask(
        copy.deepcopy(student),
        network(8, seed=3, mean=0.2),
        criterion=nn.CrossEntropyLoss(),
        task_loss_weight=0.6,
        temperature=3.0,
        verbose=False,
    )
    expected = train(theirs, batch, sgd(theirs))
    assert train(ours, batch, sgd(ours)) == pytest.approx(expected, rel=1e-5)
    states = ours.get_checkpoint_state()["state_dict"], theirs.get_checkpoint_state()["state_dict"]
    torch.testing.assert_close(*states, rtol=1e-4, atol=1e-5)


def test_teacher_with_another_normalisation_sees_its_own(batch):
    teacher = network(8, mean=0.2)
    distiller = KD(copy.deepcopy(teacher), network())
    as_timm_task(distiller)
    assert isinstance(distiller.teacher, Adapted)
    pixels = batch[0] * 0.5 + 0.5
    torch.testing.assert_close(distiller.teacher(batch[0]), teacher.eval()((pixels - 0.2) / 0.5), rtol=1e-4, atol=1e-5)
    same = KD(network(8), network())
    before = same.teacher
    as_timm_task(same)
    assert same.teacher is before


def test_grey_images_keep_one_channel():
    teacher = timm.create_model("resnet10t", num_classes=5, in_chans=1)  # ImageNet's statistics, three values
    cfg = {"mean": (0.3,), "std": (0.4,)}
    args = {"layers": [1] * 4, "channels": [4] * 4, "stem_width": 4}
    student = timm.create_model("resnet18", num_classes=5, in_chans=1, pretrained_cfg_overlay=cfg, **args)
    task = as_timm_task(KD(teacher, student))
    images = torch.randn(2, 1, 32, 32)
    assert task(images, torch.tensor([0, 1]))["output"].shape == (2, 5)
    pixels = images * 0.4 + 0.3
    mean, std = (sum(teacher.pretrained_cfg[name]) / 3 for name in ("mean", "std"))
    torch.testing.assert_close(task.distiller.teacher(images), teacher((pixels - mean) / std), rtol=1e-4, atol=1e-5)


def test_only_what_trains_is_optimised_and_teacher_stays(batch):
    task = as_timm_task(Projected(network(8), network()))
    teacher = copy.deepcopy(task.distiller.teacher.state_dict())
    optimizer = sgd(task)
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in task.distiller.parameters() if p.requires_grad}
    before = task.distiller.projector.weight.clone()
    losses = train(task, batch, optimizer, steps=20)
    assert losses[-1] < losses[0]
    assert not torch.equal(before, task.distiller.projector.weight)
    torch.testing.assert_close(task.distiller.teacher.state_dict(), teacher, rtol=0, atol=0)
    assert len(task.get_clip_parameters(exclude_head=True)) == len(task.get_clip_parameters()) - 2


def test_layer_decay_and_no_weight_decay_go_through_the_student():
    torch.manual_seed(0)
    student = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=24, num_heads=2, num_classes=5)
    task = as_timm_task(KD(network(8), student))
    optimizer = create_optimizer_v2(task.get_trainable_module(), "adamw", lr=1.0, weight_decay=0.1, layer_decay=0.5)
    scale = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert scale[id(student.head.weight)] == 1.0
    assert scale[id(student.patch_embed.proj.weight)] < scale[id(student.blocks[1].mlp.fc1.weight)] < 1.0
    assert decay[id(student.pos_embed)] == 0.0
    assert decay[id(student.head.weight)] == 0.1


def test_ema_shares_the_teacher_and_follows_the_student(batch):
    task = as_timm_task(Projected(network(8), network()))
    task.setup_ema(decay=0.5)
    train(task, batch, sgd(task))
    averaged = task.get_eval_model(ema=True)
    assert task.get_trainable_module(ema=True).module.distiller.teacher is task.distiller.teacher
    ours, theirs = task.distiller.student.conv1.weight, averaged.conv1.weight
    assert not torch.equal(ours, theirs)
    assert set(task.get_checkpoint_state(ema=True)) == {"state_dict_ema", "task_state_ema"}
    averaged.eval()(batch[0])
    assert task.get_trainable_module(ema=True).module.logits is None, "validation must not keep logits"


def test_checkpoint_round_trip_through_timms_saver(batch, tmp_path):
    task = as_timm_task(Projected(network(8), network()), epochs=4, steps_per_epoch=2)
    optimizer = sgd(task)
    train(task, batch, optimizer, steps=3)
    saver = CheckpointSaver(task.get_eval_model(), optimizer, task=task, checkpoint_dir=str(tmp_path))
    saver.save_checkpoint(epoch=1)
    saved = str(tmp_path / "last.pth.tar")
    content = torch.load(saved, weights_only=False)
    assert set(content["state_dict"]) == set(network().state_dict())
    assert set(content["task_state"]["auxiliary"]) == {"projector.weight", "projector.bias", "epochs_seen"}

    other = as_timm_task(Projected(network(8), network(seed=9)), epochs=4, steps_per_epoch=2)
    assert resume_task_checkpoint(other, saved, sgd(other), log_info=False) == 2
    torch.testing.assert_close(other.distiller.checkpoint_state(), task.distiller.checkpoint_state(), rtol=0, atol=0)
    assert other.distiller.progress.step == 3
    stock = network(seed=11)
    load_checkpoint(stock, saved, use_ema=False, weights_only=False)
    torch.testing.assert_close(stock.state_dict(), task.distiller.student.state_dict(), rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="does not fit KD"):
        as_timm_task(KD(network(8), network())).load_checkpoint_state(content["state_dict"], content["task_state"])


def test_progress_and_epoch_hooks_follow_the_calls(batch):
    task = as_timm_task(Projected(network(8), network()), epochs=3, steps_per_epoch=2)
    train(task, batch, sgd(task), steps=5)
    assert (task.distiller.progress.epoch, task.distiller.progress.step) == (2, 5)
    assert task.distiller.epochs_seen == 2
    task.get_trainable_module().eval()
    task(*batch)
    assert task.distiller.progress.step == 5, "a validation call is no training step"


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_task_takes_the_same_steps(batch, backend):
    plain = as_timm_task(KD(network(8), network()))
    compiled = as_timm_task(KD(network(8), network()))
    expected = train(plain, batch, sgd(plain))
    optimizer = sgd(compiled)
    evaluated = compiled.compile(backend=backend)
    assert train(compiled, batch, optimizer) == pytest.approx(expected, rel=1e-3)
    evaluated.eval()
    plain.get_eval_model().eval()
    torch.testing.assert_close(evaluated(batch[0]), plain.get_eval_model()(batch[0]), rtol=1e-2, atol=1e-3)
    names = set(compiled.get_checkpoint_state()["state_dict"])
    assert names == set(network().state_dict())


@pytest.fixture
def process_group(tmp_path):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_prepare_distributed_takes_the_same_steps(batch, process_group):
    plain, distributed = (as_timm_task(Projected(network(8), network())) for _ in range(2))
    distributed.distiller.load_state_dict(plain.distiller.state_dict())
    expected = train(plain, batch, sgd(plain))
    assert distributed.prepare_distributed() is distributed
    assert isinstance(distributed.get_trainable_module(), nn.parallel.DistributedDataParallel)
    with distributed.no_sync():
        assert train(distributed, batch, sgd(distributed)) == pytest.approx(expected, rel=1e-5)
    assert set(distributed.get_checkpoint_state()["state_dict"]) == set(network().state_dict())


def test_soft_labels_of_timms_mixup(batch):
    from timm.data import Mixup

    images, labels = Mixup(mixup_alpha=0.8, num_classes=5)(batch[0].clone(), batch[1])
    task = as_timm_task(KD(network(8), network()))
    assert torch.isfinite(task(images, labels)["loss"])


def test_what_a_single_sum_cannot_train_is_refused():
    class Two(KD):
        def players(self):
            return [Player("a", self.student), Player("b", self.student)]

    class Ruled(KD):
        def gradient_rule(self, player):
            return lambda terms: terms["ce"]

    with pytest.raises(InputError, match=r"Two has players \['a', 'b'\]"):
        as_timm_task(Two(network(8), network()))
    with pytest.raises(InputError, match="Ruled combines gradients per term"):
        as_timm_task(Ruled(network(8), network()))
    cached = KD(network(8), network())
    cached.teacher_cache = {}
    with pytest.raises(InputError, match="cached teacher outputs"):
        as_timm_task(cached)
