"""UniDistill through mmengine's Runner and `kd`: a run, its student in stock mmdet3d, resume, bad input, operators."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from kdcore.errors import InputError

pytestmark = pytest.mark.slow

TINY = (
    "train_cfg.max_iters=4",
    "train_cfg.val_interval=4",
    "teacher_training.train_cfg.max_iters=1",
    "teacher_training.train_cfg.val_interval=1",
    "train_dataloader.batch_size=2",
    "default_hooks.logger.interval=2",
    "default_hooks.checkpoint.interval=2",
    "test_dataloader.dataset.indices=2",
    "val_dataloader.dataset.indices=2",
    "method_args.relation=4.0",  # not 1: it shows in the weighted terms
)


@pytest.fixture(scope="module", autouse=True)
def few_scenes():
    from kd_detection3d import integrations, scenes  # noqa: F401  before mmdet3d, which asks for mmcv's operators

    patch = pytest.MonkeyPatch()
    patch.setattr(scenes, "COUNTS", {"train": 6, "val": 3})
    yield
    patch.undo()


def train(folder: Path, *overrides: str, name: str = "unidistill/small", **options):
    from kdcore import run
    from kdcore.method import load_config

    method, config = load_config(name, [*TINY, *overrides])
    return run.train(method, config, folder, quiet=True, cpu=True, **options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    return folder, train(folder)


def test_run_leaves_metrics_log_and_a_report(finished):
    from kdcore import run
    from kdcore.report import write_report

    folder, metrics = finished
    assert {"student/mAP", "teacher/mAP", "student/mAP_1m", "student/ATE", "student/parameters"} <= set(metrics)
    assert {"foreground_gap", "background_gap", "relation_gap", "clutter_detections"} <= set(metrics)
    assert metrics["student/parameters"] != metrics["teacher/parameters"]
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    student = [r for r in records if r["stage"] == "student"]
    assert [r["step"] for r in student if r["kind"] == "train"] == [2, 4]
    terms = student[0]["terms"]
    assert set(terms) == {"task0.heatmap", "task0.bbox", "feature", "relation", "class_response", "box_response"}
    assert terms["relation"]["weighted"] == pytest.approx(4 * terms["relation"]["raw"])
    assert all(np.isfinite(term["raw"]) for term in terms.values())
    assert [(r["step"], "mAP" in r["metrics"]) for r in student if r["kind"] == "eval"] == [(4, True)]
    assert run.evaluate(folder)["student/mAP"] == metrics["student/mAP"]
    page = write_report([folder]).read_text()
    for text in ("camera", "points and truth", "teacher", "mAP_2m"):
        assert text in page, text


STOCK = """
import sys, types
class Compiled(types.ModuleType):                            # as mmcv with its operators answers
    def __getattr__(self, name):
        if name.startswith("__"): raise AttributeError(name)
        return lambda *a, **k: None
sys.path[:] = [p for p in sys.path if "/packages/" not in p and "/shared/" not in p]
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in repr(f).lower()]
sys.modules["kdcore"] = None                                  # importing it raises
sys.modules["mmcv._ext"] = Compiled("mmcv._ext")
import torch
from mmdet3d.apis import init_model
def show(folder, model, features):
    task = model.pts_bbox_head(features)[0][0]
    print(tuple(task["heatmap"].shape), model.dataset_meta["classes"])
teacher = init_model(sys.argv[2] + "/config.py", sys.argv[2] + "/model.pth", device="cpu")
voxels = {"voxels": torch.rand(5, 20, 4), "num_points": torch.full((5,), 20), "coors": torch.zeros(5, 4).int()}
show(sys.argv[2], teacher, teacher.extract_feat({"voxels": voxels}, [{}])[1])
assert "kd_detection3d" not in sys.modules                    # LiDAR: all of it is stock
sys.path.insert(0, sys.argv[1])                               # camera: two files beside its config
student = init_model(sys.argv[1] + "/config.py", sys.argv[1] + "/model.pth", device="cpu")
import kd_detection3d
assert not hasattr(kd_detection3d, "__version__")             # the folder's files, not the package
camera = torch.tensor([[64.0, 0, 63.5, 0], [0, 64, 25.6, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
turn = torch.tensor([[0.0, -1, 0, 0], [0, 0, -1, 0], [1, 0, 0, 0], [0, 0, 0, 1]])
inputs = {"imgs": torch.zeros(1, 1, 3, 64, 128)}
show(sys.argv[1], student, student.extract_feat(inputs, [{"lidar2img": [(camera @ turn).numpy()]}])[1])
"""


def test_networks_open_in_stock_mmdet3d_where_kd_is_not_importable(finished):
    folder, _ = finished
    arguments = [str(folder / "student"), str(folder / "teacher")]
    done = subprocess.run([sys.executable, "-c", STOCK, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    shown = [line for line in done.stdout.splitlines() if line.startswith("(")]
    assert shown == ["(1, 3, 32, 32) ['Pedestrian', 'Cyclist', 'Car']"] * 2
    for role in ("student", "teacher"):
        saved = torch.load(folder / role / "model.pth", weights_only=True)
        assert set(saved) == {"state_dict", "meta"}
        assert not any("teacher" in name for name in saved["state_dict"])


def test_a_cut_run_resumes_to_the_same_bits(finished, tmp_path, monkeypatch):
    from kd_detection3d.integrations.stage import RunHook

    folder, _ = finished
    whole = torch.load(folder / "student" / "model.pth", weights_only=True)["state_dict"]
    original = RunHook.after_train_iter

    def cut(self, runner, *args, **kwargs):
        original(self, runner, *args, **kwargs)
        if self.stage == "student" and runner.iter == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(RunHook, "after_train_iter", cut)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run")
    monkeypatch.setattr(RunHook, "after_train_iter", original)
    work = tmp_path / "run" / "checkpoints" / "student"
    state = torch.load(work / "checkpoint-00000002" / "state.pth", weights_only=True)
    assert not any("teachers" in name for name in state["state_dict"])
    train(tmp_path / "run", resume=True)
    resumed = torch.load(tmp_path / "run" / "student" / "model.pth", weights_only=True)["state_dict"]
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())


def test_mmengines_own_runner_trains_the_config(finished, tmp_path):
    from mmengine.config import Config
    from mmengine.runner import Runner

    from kd_detection3d.integrations.stage import quiet_mmengine
    from kdcore.method import find_config

    folder, _ = finished
    cfg = Config.fromfile(find_config("unidistill/small"))
    cfg.work_dir, cfg.log_level = str(tmp_path), "ERROR"
    cfg.model.teachers.teacher.checkpoint = str(folder / "teacher" / "model.pth")
    cfg.train_cfg.max_iters, cfg.train_dataloader.batch_size = 1, 2
    cfg.val_dataloader = cfg.val_cfg = cfg.val_evaluator = None
    cfg.test_dataloader = cfg.test_cfg = cfg.test_evaluator = None
    cfg.custom_hooks = [{"type": "StudentHook"}]
    with quiet_mmengine():
        runner = Runner.from_cfg(cfg)
        runner.train()
    teacher = torch.load(folder / "teacher" / "model.pth", weights_only=True)["state_dict"]
    kept = runner.model.distiller.teacher.state_dict()
    assert all(torch.equal(kept[name], value) for name, value in teacher.items())
    assert (tmp_path / "student" / "config.py").is_file()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "model.teachers.teacher.model.pts_bbox_head.tasks=[{num_class: 2, class_names: [Cyclist, Car]}]",
            r"model\.teachers\.teacher: has 2 classes \(Cyclist, Car\), the student has 3",
        ),
        ("method_args.student_taps={low: view_transfrm}", r"student_taps: .*no module 'view_transfrm'; did you mean"),
        ("method_args.teacher_taps={low: pts_middle_encoder, high: neck}", r"teacher_taps: .*no module 'neck'"),
        ("method_args.path=L2X", "method_args.path.*L2X"),
        ("model.student.img_backbone.depth=19", r"model\.student: the network cannot be built"),
        ("model.studnt={}", r"model\.studnt: unknown"),
        ("model.teachers.teacher.checkpoint=absent.pth", r"checkpoint = 'absent.pth': no such file"),
        ("teacher_training=null", r"model\.teachers\.teacher\.checkpoint: the teacher has no weights"),
        ("train_dataloader.dataset.split=trane", r"train_dataloader\.dataset\.split = 'trane': allowed: train, val"),
        (
            "test_dataloader.dataset.metainfo.classes=[Car]",
            r"model\.student: has 3 classes .*test_dataloader\.dataset has 1 \(Car\)",
        ),
        (
            "train_dataloader.dataset={type: KittiDataset, data_root: $ABSENT_DATA, ann_file: a.pkl}",
            "data_root = .*variable is not set",
        ),
        (
            "test_dataloader.dataset.data_prefix={pts: absent}",
            r"test_dataloader\.dataset: .*first frame cannot be read",
        ),
        (
            "train_dataloader.dataset={type: KittiDataset, data_root: '.', ann_file: absent.pkl}",
            r"train_dataloader\.dataset\.ann_file = 'absent.pkl': no such info file",
        ),
    ],
)
def test_bad_input_is_named_before_anything_trains(override, message, tmp_path):
    with pytest.raises(InputError, match=message):
        train(tmp_path / "run", override)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["small-f2c", "small-c2l", "small-f2l"])
def test_every_path_takes_a_step(name):
    from mmengine.dataset import pseudo_collate

    from kd_detection3d.engine.batch import DetectionBatch
    from kd_detection3d.integrations import detector, networks, stage
    from kdcore.distiller import freeze
    from kdcore.method import load_config

    _, config = load_config(f"unidistill/{name}")
    with stage.quiet_mmengine():
        student = networks.build(config.model["student"], "student")
        teacher = networks.build(config.model["teachers"]["teacher"]["model"], "teacher")
        arguments = {"type": "UniDistill", **config.method_args.model_dump()}
        made = detector.make_distiller(arguments, student, torch.nn.ModuleDict({"teacher": freeze(teacher)}))
        data = stage.check_dataset(config.train_dataloader["dataset"], "data")
        batch = pseudo_collate([data[0], data[1]])
        terms = made.train().loss(DetectionBatch(batch["inputs"], batch["data_samples"]))
        terms.total().backward()
    assert all(torch.isfinite(value) for _, value in terms.values())
    assert {"feature", "relation", "class_response", "box_response"} < set(terms)
    assert all(p.grad is not None for p in made.student.parameters())


# ---------------------------------------------------------------- parts


def test_lifted_pixels_land_where_they_look():
    from kd_detection3d import scenes
    from kd_detection3d.integrations.detectors import LiftSplat

    lift = LiftSplat(1, 1, scenes.RANGE, (32, 32), depth=(2.0, 26.0, 1.0))
    camera = torch.tensor(scenes.intrinsics() @ scenes.LIDAR2CAM)[None, None].float()
    places = lift.frustum((8, 16), camera, (64, 128))[0, 0]
    ahead = camera[0, 0] @ torch.cat([places, torch.ones_like(places[..., :1])], -1)[..., None]
    pixels = ahead[..., :2, 0] / ahead[..., 2:3, 0]
    torch.testing.assert_close(pixels[0, :, 0, 0], torch.arange(16) * 8 + 3.5)
    torch.testing.assert_close(pixels[:, 0, 5, 1], torch.arange(8) * 8 + 3.5)
    torch.testing.assert_close(ahead[..., 2, 0].mean((0, 1)), lift.depths)
    with torch.no_grad():
        lift.depth_net.weight.zero_()
        lift.depth_net.bias.zero_()
        lift.depth_net.bias[8] = 100.0  # every pixel is 10 m away
        lift.depth_net.bias[-1] = 1.0
    found = lift(torch.zeros(1, 1, 1, 8, 16), camera, (64, 128), [{}])[0, 0]
    assert found.shape == (32, 32)
    rows, columns = (found > 1e-6).nonzero(as_tuple=True)
    assert columns.unique().tolist() == [12]  # 10 m ahead, in cells of 0.8 m
    assert rows.min() >= 3
    assert rows.max() <= 28
    flipped = {"transformation_3d_flow": ["HF"], "pcd_horizontal_flip": True}
    shifted = {"transformation_3d_flow": ["T"], "pcd_trans": np.array([1.6, 0.0, 0.0])}
    mirrored = lift(torch.zeros(1, 1, 1, 8, 16), camera, (64, 128), [flipped])[0, 0]
    torch.testing.assert_close(mirrored, found.flip(0))
    moved = lift(torch.zeros(1, 1, 1, 8, 16), camera, (64, 128), [shifted])[0, 0]
    assert (moved > 1e-6).nonzero(as_tuple=True)[1].unique().tolist() == [14]
    assert found.sum() > 20  # most of the 128 pixels are within the range


def test_images_are_resized_with_their_cameras():
    from kd_detection3d.integrations.transforms import ResizeCropImages

    picture = np.zeros((90, 160, 3), np.uint8)
    picture[58:62, 38:42] = 255  # around (39.5, 59.5)
    for arguments in ({}, {"flip": 1.0}, {"resize": (1.25, 1.25)}, {"resize": (0.9, 0.9)}):
        step = ResizeCropImages((40, 80), **arguments)
        results = step.transform({"img": [picture], "lidar2img": [np.eye(4)]})
        (changed,), (camera,) = results["img"], results["lidar2img"]
        rows, columns = np.nonzero(changed[..., 0] > 60)
        expected = camera @ [39.5, 59.5, 1, 1]  # at depth 1
        assert changed.shape == (40, 80, 3)
        assert [columns.mean(), rows.mean()] == pytest.approx(expected[:2].tolist(), abs=0.5), arguments


def test_operators_answer_under_their_names_and_say_what_they_miss():
    import mmcv.ops

    from kd_detection3d.integrations import mmcv_ext

    boxes = torch.tensor([[0.0, 0, 4, 2, 0.1], [0.1, 0, 4, 2, 0.1], [9, 0, 4, 2, 1]])
    kept = mmcv.ops.nms_rotated(boxes, torch.tensor([0.5, 0.9, 0.3]), 0.5)[1]
    assert kept.tolist() == [1, 2]
    assert mmcv.ops.box_iou_rotated(boxes, boxes).diagonal().tolist() == pytest.approx([1, 1, 1])
    voxels = mmcv.ops.Voxelization([1, 1, 1], [0, 0, 0, 4, 4, 1], 2, max_voxels=8)
    assert [len(part) for part in voxels(torch.rand(20, 4))] == [1, 1, 1]
    if mmcv_ext.provide({}):
        with pytest.raises(NotImplementedError, match="operator 'psamask_forward' is not compiled"):
            sys.modules["mmcv._ext"].psamask_forward()


def kitti(boxes: list[list[float]], score: float) -> dict[str, np.ndarray]:
    rows = np.array(boxes, float)
    return {
        "name": np.array(["Car"] * len(rows)),
        "truncated": np.zeros(len(rows)),
        "occluded": np.zeros(len(rows)),
        "alpha": np.full(len(rows), -10.0),
        "bbox": np.tile([0.0, 0, 100, 100], (len(rows), 1)),
        "location": rows[:, :3],
        "dimensions": rows[:, 3:6],
        "rotation_y": rows[:, 6],
        "score": np.full(len(rows), score),
    }


def test_kittis_evaluation_runs_without_cuda():
    from mmdet3d.evaluation import kitti_eval

    truth = [kitti([[float(i % 5), 1.7, 10.0 + i, 4.0, 1.6, 1.8, 0.1 * i]], 0.0) for i in range(45)]
    exact = [{**frame, "score": np.array([0.5 + i / 100])} for i, frame in enumerate(truth)]
    turned = [{**frame, "rotation_y": frame["rotation_y"] + np.pi / 2} for frame in exact]
    for found, expected in ((exact, 100.0), (turned, 0.0)):
        _, values = kitti_eval(truth, copy.deepcopy(found), ["Car"], eval_types=["bev", "3d"])
        for name in ("KITTI/Car_BEV_AP11_moderate_strict", "KITTI/Car_3D_AP11_moderate_strict"):
            assert values[name] == pytest.approx(expected, abs=0.01), values


# ---------------------------------------------------------------- real frames


@pytest.fixture
def samples() -> Path:
    if "KD_DATA" not in os.environ:
        pytest.skip("KD_DATA is not set: the folder with mmdet3d_samples")
    return Path(os.environ["KD_DATA"]) / "mmdet3d_samples"


def adapted(model, limits, cell, classes):
    """A small network's config for another area and other classes, on 32 x 32 cells."""
    if isinstance(model, dict):
        known = {
            "point_cloud_range": limits,
            "pc_range": limits[:2],
            "voxel_size": [cell, cell, limits[5] - limits[2]],
            "tasks": [{"num_class": len(classes), "class_names": classes}],
            "post_center_range": limits,
            "post_center_limit_range": limits,
            "max_num": 20,
        }
        return {k: known[k] if k in known else adapted(v, limits, cell, classes) for k, v in model.items()}
    return [adapted(item, limits, cell, classes) for item in model] if isinstance(model, list) else model


def frame(dataset, limits, cell, classes, features):
    """One step and one prediction on a data set's only frame, camera student and LiDAR teacher."""
    from mmengine.dataset import pseudo_collate

    from kd_detection3d.engine.batch import DetectionBatch
    from kd_detection3d.integrations import detector, evaluation, networks, stage
    from kdcore.distiller import freeze
    from kdcore.method import load_config

    _, config = load_config("unidistill/small")
    student = adapted(config.model["student"], limits, cell, classes)
    teacher = adapted(config.model["teachers"]["teacher"]["model"], limits, cell, classes)
    teacher["pts_voxel_encoder"]["in_channels"] = features
    with stage.quiet_mmengine():
        student, teacher = networks.build(student, "student"), freeze(networks.build(teacher, "teacher"))
        made = detector.make_distiller(
            {"type": "UniDistill", "path": "L2C", "point_cloud_range": limits},
            student,
            torch.nn.ModuleDict({"teacher": teacher}),
        ).train()
        batch = pseudo_collate([stage.check_dataset(dataset, "train")[0]])
        terms = made.loss(DetectionBatch(batch["inputs"], batch["data_samples"]))
        terms.total().backward()
        read = {"LoadPointsFromFile", "LoadCameras", "ResizeCropImages"}
        pipeline = [step for step in dataset["pipeline"] if step["type"] in read]
        pipeline.append({"type": "Pack3DDetInputs", "keys": ["points", "img"]})
        test = pseudo_collate([stage.check_dataset({**dataset, "test_mode": True, "pipeline": pipeline}, "test")[0]])
        found = [detector.predict(network.eval(), test)[0] for network in (student, teacher)]
    assert all(torch.isfinite(value) for _, value in terms.values())
    assert terms["feature"][1] > 0
    truth = evaluation.truth_of(test["data_samples"][0], limits)
    return found, [evaluation.predicted(sample, limits) for sample in found], truth


def steps(features: int, limits, size, *, velocity: bool):
    return [
        {"type": "LoadPointsFromFile", "coord_type": "LIDAR", "load_dim": features, "use_dim": features},
        {"type": "LoadAnnotations3D", "with_bbox_3d": True, "with_label_3d": True},
        *([] if velocity else [{"type": "ZeroVelocity"}]),
        {"type": "GlobalRotScaleTrans", "rot_range": [-0.1, 0.1], "translation_std": [0.1, 0.1, 0]},
        {"type": "RandomFlip3D", "sync_2d": False, "flip_ratio_bev_horizontal": 1.0},
        {"type": "ObjectRangeFilter", "point_cloud_range": limits},
        {"type": "LoadCameras"},
        {"type": "ResizeCropImages", "size": size, "flip": 0.5},
        {"type": "Pack3DDetInputs", "keys": ["points", "img", "gt_bboxes_3d", "gt_labels_3d"]},
    ]


def test_kittis_frame_goes_through(samples, tmp_path):
    import mmengine
    from mmdet3d.evaluation import KittiMetric

    from kd_detection3d import metrics
    from kdcore.run import to_json

    classes, limits = ["Pedestrian", "Cyclist", "Car"], [0.0, -25.6, -3.0, 51.2, 25.6, 1.0]
    info = mmengine.load(samples / "kitti_demo" / "000008.pkl")  # pickled by mmdet3d, as its users have them
    labels = {name: label for label, name in enumerate(classes)}
    info["metainfo"]["categories"] = {**labels, "DontCare": -1}
    info["data_list"][0]["sample_idx"] = 0
    (tmp_path / "infos.json").write_text(to_json(info))
    root = str(samples / "kitti_demo")
    dataset = {
        "type": "KittiDataset",
        "data_root": root,
        "ann_file": str(tmp_path / "infos.json"),
        "data_prefix": {"pts": "", "img": ""},
        "modality": {"use_lidar": True, "use_camera": True},
        "metainfo": {"classes": classes},
        "pipeline": steps(4, limits, (64, 208), velocity=False),
    }
    found, frames, truth = frame(dataset, limits, 1.6, classes, 4)
    assert len(truth.boxes) > 1
    assert {classes[label] for label in truth.labels} == {"Car"}
    assert metrics.detection_scores([truth], [truth], classes)["mAP"] == pytest.approx(1)
    assert len(frames[0].boxes) <= 20
    metric = KittiMetric(ann_file=str(tmp_path / "infos.json"), metric="bbox", pcd_limit_range=limits)
    metric.dataset_meta = {"classes": classes}
    metric.process({}, [found[0].to_dict()])
    values = metric.evaluate(1)
    assert any("Car_BEV_AP40" in name for name in values), values


def test_nuscenes_frame_goes_through(samples):
    from kd_detection3d import metrics

    classes = [
        *("car", "truck", "trailer", "bus", "construction_vehicle", "bicycle", "motorcycle"),
        *("pedestrian", "traffic_cone", "barrier"),
    ]
    limits = [-51.2, -51.2, -5.0, 51.2, 51.2, 3.0]
    (info,) = (samples / "nuscenes_demo").glob("*.pkl")
    dataset = {
        "type": "NuScenesDataset",
        "data_root": str(info.parent),
        "ann_file": info.name,
        "data_prefix": {"pts": "", "img": ""},
        "modality": {"use_lidar": True, "use_camera": True},
        "metainfo": {"classes": classes},
        "pipeline": steps(5, limits, (64, 176), velocity=True),
    }
    _, frames, truth = frame(dataset, limits, 3.2, classes, 5)
    assert len(truth.boxes) > 10
    assert metrics.detection_scores([truth], [truth], classes)["mAP"] == pytest.approx(1)
    assert np.isfinite(metrics.detection_scores(frames[:1], [truth], classes)["mAP"])
