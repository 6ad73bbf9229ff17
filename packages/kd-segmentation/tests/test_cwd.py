"""Tapped losses on plain modules; then the baselines through mmengine's Runner, stock loading, resume, bad input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from kd_segmentation.engine.batch import SegBatch
from kd_segmentation.engine.losses import channel_kl, pixel_kl
from kd_segmentation.engine.tapped import TappedDistiller
from kd_segmentation.methods.cwd import CWD
from kdcore.distiller import freeze
from kdcore.errors import InputError


class Net(nn.Module):
    """A segmentation network of two layers with the interface of mmseg's segmentors."""

    def __init__(self, width: int, classes: int = 3):
        super().__init__()
        self.backbone = nn.Conv2d(3, width, 3, stride=2, padding=1)
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, images):
        return self.head(self.backbone(images).relu())

    def loss(self, images, samples):
        return {"decode.loss_ce": self(images).square().mean(), "decode.acc_seg": torch.tensor(50.0)}


def networks(width: int = 4):
    torch.manual_seed(0)
    return Net(width).double(), {"teacher": freeze(Net(6).double())}


def test_terms_are_the_weighted_losses_of_tapped_modules():
    student, teachers = networks()
    distiller = TappedDistiller(
        student, teachers, losses={"kl": {"type": "PixelKL", "temperature": 2.0, "weight": 0.5}}, task=2.0
    )
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    terms = distiller.loss(SegBatch(images))
    assert list(terms) == ["decode.ce", "kl"]
    expected = 2 * student(images).square().mean() + 0.5 * pixel_kl(student(images), teachers["teacher"](images), 2.0)
    assert terms.total().item() == pytest.approx(expected.item())
    terms.total().backward()
    assert all(parameter.grad is None for parameter in teachers["teacher"].parameters())
    assert student.backbone.weight.grad.abs().sum() > 0


def test_inputs_of_modules_are_compared_too():
    student, teachers = networks(6)
    losses = {"f": {"type": "FeatureMSE", "student": "head:input", "teacher": "head:input"}}
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    terms = TappedDistiller(student, teachers, losses=losses).loss(SegBatch(images))
    own, theirs = (net.backbone(images).relu() for net in (student, teachers["teacher"]))
    assert terms["f"][1].item() == pytest.approx((own - theirs).square().mean().item())


def test_default_is_the_papers_loss_and_none_is_the_task_alone():
    student, teachers = networks()
    images = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    terms = CWD(student, teachers).loss(SegBatch(images))
    weight, value = terms["channel"]
    assert weight == 3.0
    assert value.item() == pytest.approx(channel_kl(student(images), teachers["teacher"](images), 4.0).item())
    assert list(CWD(student, teachers, losses={}).loss(SegBatch(images))) == ["decode.ce"]


def test_connector_maps_channels_and_is_trained():
    student, teachers = networks()
    losses = {"f": {"type": "FeatureMSE", "student": "backbone", "teacher": "backbone", "connector": "conv1x1"}}
    student, teachers = student.float(), {name: teacher.float() for name, teacher in teachers.items()}
    distiller = TappedDistiller(student, teachers, losses=losses)
    assert tuple(distiller.tapped.connectors["f"].weight.shape) == (6, 4, 1, 1)
    distiller.loss(SegBatch(torch.randn(1, 3, 8, 8))).total().backward()
    assert distiller.tapped.connectors["f"].weight.grad.abs().sum() > 0
    assert student.training


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (
            {"type": "FeatureMSE", "student": "backbon"},
            r"losses\.x\.student: Net has no module 'backbon'; did you mean",
        ),
        ({"type": "FeatureMSE", "teacher": "head.conv"}, r"losses\.x\.teacher: Net has no module 'head\.conv'"),
        ({"type": "PixelKl"}, r"losses\.x\.type = 'PixelKl': no such loss; did you mean 'PixelKL'"),
        ({"type": "PixelKL", "temprature": 2}, r"losses\.x: .*temprature"),
        ({"type": "PixelKL", "source": "big"}, r"losses\.x\.source = 'big': no such teacher"),
        ({"type": "PixelKL", "weight": -1}, r"losses\.x: 'weight' = -1"),
        ({"type": "PixelKL", "connector": "mlp"}, r"losses\.x\.connector = 'mlp': allowed: conv1x1"),
        ({"student": "backbone"}, r"losses\.x: 'type' is required"),
    ],
)
def test_bad_losses_are_named(loss, message):
    student, teachers = networks()
    with pytest.raises(InputError, match=message):
        TappedDistiller(student, teachers, losses={"x": loss})


def test_losses_need_a_teacher():
    with pytest.raises(InputError, match="there is no teacher"):
        CWD(networks()[0], {})


def test_show_lists_the_methods_fields_and_not_the_budget_of_other_packages():
    from kd_segmentation.methods.cwd import METHOD
    from kdcore.cli.fields import rows

    names = [row.name for row in rows(METHOD.config, first="method_args")]
    assert names[:3] == ["method_args", "method_args.task", "method_args.losses"]
    assert "train_cfg" in names
    assert not any(name == "train" or name.startswith("train.") for name in names)


# ---------------------------------------------------------------- with mmseg

TINY = (
    "train_cfg.max_iters=6",
    "train_cfg.val_interval=6",
    "teacher_training.train_cfg.max_iters=2",
    "train_dataloader.batch_size=4",
    "default_hooks.logger.interval=2",
    "default_hooks.checkpoint.interval=2",
    "test_dataloader.dataset.indices=4",
    "val_dataloader.dataset.indices=4",
)


def train(folder: Path, *overrides: str, name: str = "cwd/small", **options):
    from kdcore import run
    from kdcore.method import load_config

    method, config = load_config(name, [*TINY, *overrides])
    return run.train(method, config, folder, quiet=True, cpu=True, **options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    return folder, train(folder)


@pytest.mark.slow
def test_run_leaves_metrics_log_and_a_report(finished):
    from kdcore import run
    from kdcore.report import write_report

    folder, metrics = finished
    assert {"student/mIoU", "teacher/mIoU", "student/pixel_accuracy", "student/parameters"} <= set(metrics)
    assert any(name.startswith("student/iou/") for name in metrics)
    assert len(metrics["confusion_matrix"]) == len(metrics["class_names"]) == 6
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    student = [r for r in records if r["stage"] == "student"]
    assert [r["step"] for r in student if r["kind"] == "train"] == [2, 4, 6]
    terms = student[0]["terms"]
    assert set(terms) == {"decode.ce", "channel"}
    assert terms["channel"]["weighted"] == pytest.approx(3 * terms["channel"]["raw"])
    assert student[0]["samples_per_second"] > 0
    assert [(r["step"], "mIoU" in r["metrics"]) for r in student if r["kind"] == "eval"] == [(6, True)]
    assert run.evaluate(folder)["student/mIoU"] == metrics["student/mIoU"]
    page = write_report([folder]).read_text()
    for text in ("truth", "teacher", "student&#x27;s errors", "iou/brick"):
        assert text in page, text


@pytest.mark.slow
def test_a_teacher_with_its_own_seed_is_one_for_all_runs(tmp_path, monkeypatch):
    def teacher(seed: int, cache: str) -> dict[str, torch.Tensor]:
        monkeypatch.setenv("KD_CACHE", str(tmp_path / cache))
        folder = tmp_path / f"{cache}-{seed}"
        train(folder, f"seed={seed}", "teacher_training.seed=7", "train_cfg.max_iters=1")
        return torch.load(folder / "teacher" / "model.pth", weights_only=True)["state_dict"]

    first, cached, again = teacher(0, "one"), teacher(1, "one"), teacher(1, "other")
    assert len(list((tmp_path / "one" / "teacher").iterdir())) == 1  # one entry in the cache
    for name, value in first.items():
        assert torch.equal(value, cached[name]), name
        assert torch.equal(value, again[name]), name  # also where each run trains it


STOCK = """
import sys, types
class Compiled(types.ModuleType):                            # as mmcv with its operators answers
    def __getattr__(self, name):
        if name.startswith("__"): raise AttributeError(name)
        return lambda *a, **k: None
for name in ("kd_segmentation", "kdcore"):
    sys.modules[name] = None                                  # importing either raises
sys.modules["mmcv._ext"] = Compiled("mmcv._ext")
from mmseg.apis import inference_model, init_model
import numpy as np
model = init_model(sys.argv[1] + "/config.py", sys.argv[1] + "/model.pth", device="cpu")
result = inference_model(model, np.full((64, 64, 3), 90, np.uint8))
print(tuple(result.pred_sem_seg.data.shape), len(model.dataset_meta["classes"]))
"""


@pytest.mark.slow
def test_student_opens_in_stock_mmseg_where_kd_is_not_importable(finished):
    folder, _ = finished
    done = subprocess.run(
        [sys.executable, "-c", STOCK, str(folder / "student")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "(1, 64, 64) 6"
    saved = torch.load(folder / "student" / "model.pth", weights_only=True)
    assert set(saved) == {"state_dict", "meta"}
    assert not any("teacher" in name for name in saved["state_dict"])


@pytest.mark.slow
def test_a_cut_run_resumes_to_the_same_bits(finished, tmp_path, monkeypatch):
    from kd_segmentation.integrations.stage import RunHook

    folder, _ = finished
    whole = torch.load(folder / "student" / "model.pth", weights_only=True)["state_dict"]
    original = RunHook.after_train_iter

    def cut(self, runner, *args, **kwargs):
        original(self, runner, *args, **kwargs)
        if self.stage == "student" and runner.iter == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(RunHook, "after_train_iter", cut)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run")
    work = tmp_path / "run" / "checkpoints" / "student"
    assert sorted(path.name for path in work.glob("checkpoint-*")) == ["checkpoint-00000002", "checkpoint-00000004"]
    state = torch.load(work / "checkpoint-00000004" / "state.pth", weights_only=True)
    assert not any("teachers" in name for name in state["state_dict"])
    monkeypatch.setattr(RunHook, "after_train_iter", original)
    (work / "checkpoint-00000004" / "state.pth").write_bytes(b"broken")
    with pytest.raises(InputError, match=r"state\.pth is corrupt.*checkpoint-00000002 is good: remove"):
        train(tmp_path / "run", resume=True)
    import shutil

    shutil.rmtree(work / "checkpoint-00000004")
    train(tmp_path / "run", resume=True)
    resumed = torch.load(tmp_path / "run" / "student" / "model.pth", weights_only=True)["state_dict"]
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if r["stage"] == "student" and r["kind"] == "train"] == [2, 4, 6]


SCRIPT = """
import sys
from mmengine.config import Config
from mmengine.runner import Runner
cfg = Config.fromfile(sys.argv[1])
cfg.work_dir = sys.argv[2]
teacher = cfg.model.teachers.teacher
teacher.checkpoint = sys.argv[3]
cfg.train_cfg.val_interval = 4
for loader in (cfg.val_dataloader, cfg.test_dataloader):
    loader.dataset.indices = 4
cfg.default_hooks.checkpoint.interval = 2
cfg.default_hooks.logger.interval = 1
cfg.custom_hooks = [
    dict(type="StudentEMAHook", decay=0.5), dict(type="StudentHook"), dict(type="PicturesHook", count=2),
    dict(type="SwitchHook", switches=[dict(at=0, freeze=["backbone"]), dict(at=2, scales=dict(channel=0.0))]),
]
for cfg.train_cfg.max_iters, cfg.resume in ((4, False), (6, True)):
    runner = Runner.from_cfg(cfg)
    runner.train()
    model = runner.model
    print("DONE", runner.iter, model.scales, next(model.student.backbone.parameters()).requires_grad)
"""


@pytest.mark.slow
def test_mmengines_own_runner_trains_the_config_and_resumes(finished, tmp_path):
    from kdcore.method import find_config

    folder, _ = finished
    arguments = [str(find_config("cwd/small")), str(tmp_path), str(folder / "teacher" / "model.pth")]
    done = subprocess.run([sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for last in (4, 6):
        assert f"DONE {last} {{'channel': 0.0}} False" in done.stdout
    assert "Advance dataloader 2 steps" in done.stdout + done.stderr  # from the checkpoint of iteration 2
    assert (tmp_path / "student" / "config.py").is_file()
    assert len(list((tmp_path / "pictures").glob("*/*.png"))) >= 2
    assert torch.load(tmp_path / "student" / "model.pth", weights_only=True)["meta"]["dataset_meta"]["classes"]


RANKS = """
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from kdcore import run
from kdcore.method import load_config
from kd_segmentation.integrations import segmentor

seen, models, plain = [], [], segmentor.DistilledModel.loss

def loss(self, inputs, data_samples):
    models.append(self)
    seen.append(float(inputs.double().sum()))
    return plain(self, inputs, data_samples)

segmentor.DistilledModel.loss = loss
method, config = load_config("cwd/small", sys.argv[2:])
run.train(method, config, Path(sys.argv[1]), quiet=True, cpu=True)
weights = {name: value.detach().clone() for name, value in models[-1].student.named_parameters()}
torch.save({"seen": seen, "weights": weights, "backend": dist.get_backend()}, f"{sys.argv[1]}-{dist.get_rank()}.pt")
"""


@pytest.mark.slow
def test_two_processes_train_one_student(finished, tmp_path):
    folder, _ = finished
    (tmp_path / "ranks.py").write_text(RANKS)
    teacher = f"model.teachers.teacher.checkpoint={folder / 'teacher' / 'model.pth'}"
    launch = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    command = [*launch, str(tmp_path / "ranks.py"), str(tmp_path / "run"), *TINY, teacher]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [torch.load(tmp_path / f"run-{rank}.pt", weights_only=True) for rank in range(2)]
    assert [rank["backend"] for rank in ranks] == ["gloo"] * 2
    assert len(ranks[0]["seen"]) == len(ranks[1]["seen"]) > 0
    assert all(a != b for a, b in zip(ranks[0]["seen"], ranks[1]["seen"]))  # images of their own
    saved = torch.load(tmp_path / "run" / "student" / "model.pth", weights_only=True)["state_dict"]
    for name, value in ranks[0]["weights"].items():  # and one gradient
        assert torch.equal(value, ranks[1]["weights"][name]), name
        assert torch.equal(value, saved[name]), name
    assert "mIoU" in (tmp_path / "run" / "metrics.json").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "model.teachers.teacher.model.decode_head.num_classes=5",
            r"model\.teachers\.teacher: has 5 classes, the student has 6",
        ),
        ("model.student.decode_head.num_classes=5", "has 6 classes, the student has 5"),
        ("method_args.losses.channel.student=decode_head.conv_sec", "no module 'decode_head.conv_sec'; did you mean"),
        ("model.student.backbone.depth=19", r"model\.student: the network cannot be built"),
        ("model.studnt={}", r"model\.studnt: unknown"),
        (
            "model.teachers.teacher.checkpoint=absent.pth",
            r"model\.teachers\.teacher\.checkpoint = 'absent.pth': no such",
        ),
        ("teacher_training=null", r"model\.teachers\.teacher\.checkpoint: the teacher has no weights"),
        ("train.steps=3", "takes no 'train' section: the budget is train_cfg"),
        ("train_dataloader.dataset.split=trane", r"train_dataloader\.dataset\.split = 'trane': allowed: train, val"),
        ("domains.blur.split=val_blurr", r"domains\.blur\.split = 'val_blurr'"),
        ("optim_wraper={}", "unknown key 'optim_wraper'; did you mean 'optim_wrapper'"),
        ("train_dataloader.dataset={type: CamVidDataset, data_root: $ABSENT_DATA/camvid}", "variable is not set"),
    ],
)
def test_bad_input_is_named_before_anything_trains(override, message, tmp_path):
    with pytest.raises(InputError, match=message):
        train(tmp_path / "run", override)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_misspelt_section_of_a_python_config(tmp_path):
    from kd_segmentation.runs import read_config

    (tmp_path / "x.py").write_text("method = 'cwd'\ntrain_dataloder = dict()\n")
    with pytest.raises(InputError, match="'train_dataloder' is no section; did you mean 'train_dataloader'"):
        read_config(tmp_path / "x.py")
    (tmp_path / "x.py").write_text("method = 'cwd'\n_base_ = ['absent.py']\n")
    with pytest.raises(InputError, match="mmengine cannot read it"):
        read_config(tmp_path / "x.py")


@pytest.mark.slow
def test_streams_refuse_an_overlap_and_repeat_the_smaller_set():
    from kd_segmentation.integrations.datasets import StreamDataset, TextureMosaicDataset

    first, rest = ({"type": "TextureMosaicDataset", "indices": part} for part in ([0, 1], [2, 3, 4, 5, 6]))
    data = StreamDataset(first, rest)
    assert len(data) == 5
    item = data[4]
    assert set(item) == {"labelled", "unlabelled_0", "unlabelled_1"}
    assert item["unlabelled_0"]["img_path"].endswith("0006.png")
    with pytest.raises(InputError, match=r"overlaps the labelled split: .*0001\.png"):
        StreamDataset(first, {"type": "TextureMosaicDataset", "indices": [1, 2]})
    with pytest.raises(InputError, match="split = 'x': allowed: train"):
        TextureMosaicDataset(split="x")


@pytest.mark.slow
def test_teachers_get_their_own_normalisation_and_operators_say_what_they_miss():
    import mmcv.ops

    from kd_segmentation.integrations import mmcv_ext
    from kd_segmentation.integrations.networks import Teacher

    class Seen(nn.Module):
        def __init__(self, **preprocessor):
            super().__init__()
            from kd_segmentation.integrations.segmentor import StreamPreprocessor

            self.data_preprocessor = StreamPreprocessor(**preprocessor)

        def forward(self, images):
            return images

    raw = torch.rand(1, 3, 2, 2) * 255  # BGR
    student = {"mean": [10.0, 20.0, 30.0], "std": [1.0, 2.0, 4.0], "bgr_to_rgb": True}
    mean, std = (torch.tensor(student[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    theirs = {"mean": [5.0, 6.0, 7.0], "std": [3.0, 2.0, 1.0]}
    expected = (raw - torch.tensor([5.0, 6, 7]).view(1, 3, 1, 1)) / torch.tensor([3.0, 2, 1]).view(1, 3, 1, 1)
    found = Teacher(Seen(**theirs), student)((raw.flip(1) - mean) / std)
    torch.testing.assert_close(found, expected)
    same = (raw.flip(1) - mean) / std
    assert Teacher(Seen(**student), student)(same) is same
    if mmcv_ext.provide({}):
        with pytest.raises(NotImplementedError, match="operator 'psamask_forward' is not compiled"):
            sys.modules["mmcv._ext"].psamask_forward()
        values = torch.rand(1, 6, 2, 4, dtype=torch.float64, requires_grad=True)
        places = torch.rand(1, 3, 2, 1, 2, 2, dtype=torch.float64, requires_grad=True)
        weights = torch.rand(1, 3, 2, 1, 2, dtype=torch.float64, requires_grad=True)
        function = mmcv.ops.multi_scale_deform_attn.MultiScaleDeformableAttnFunction
        shapes, starts = torch.tensor([[2, 3]]), torch.tensor([0])
        assert torch.autograd.gradcheck(
            lambda v, p, w: function.apply(v, shapes, starts, p, w, 64), (values, places, weights)
        )


@pytest.mark.parametrize("name", ["cwd/paper", "mgd/paper", "gkd/paper"])
def test_paper_configs_read_their_folders_from_the_environment(name, monkeypatch):
    from kdcore.method import load_config

    monkeypatch.delenv("CITYSCAPES", raising=False)
    assert "data/cityscapes" in str(load_config(name)[1].model_dump())
    monkeypatch.setenv("CITYSCAPES", "/disk/scapes")
    found = str(load_config(name)[1].model_dump())
    assert "/disk/scapes" in found
    assert "data/cityscapes" not in found
    assert "{{" not in found
