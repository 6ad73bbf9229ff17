"""nerfstudio's side: a run end to end, reload by nerfstudio's own eval_setup, `ns-train`, teachers of stock methods."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from kdcore import run
from kdcore.errors import InputError
from kdcore.method import load_config

pytestmark = pytest.mark.slow

PLUGIN = "kd-pvd=kd_nerf.integrations.plugin:METHOD"
TINY = [
    "teacher.train.steps=6",
    "teacher.train.batch_size=32",
    "teacher.train.eval_every=6",
    "teacher.levels=3",
    "teacher.log2_size=8",
    "train.steps=6",
    "train.batch_size=32",
    "train.eval_every=3",
    "train.log_every=2",
    "student.width=8",
    "method_args.stage_ends=[3,5]",
    "data.scene={size: 12, train_views: 3, test_views: 1, supersample: 1}",
    "render={samples: 8, occupancy_resolution: 8, occupancy_threshold: 0.1, occupancy_warmup: 100}",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished tiny run of the method: hash grid to MLP."""
    patch = pytest.MonkeyPatch()
    patch.setenv("KD_CACHE", str(tmp_path_factory.mktemp("cache")))
    folder = tmp_path_factory.mktemp("runs") / "run"
    method, config = load_config("pvd/small", TINY)
    metrics = run.train(method, config, folder, quiet=True, cpu=True)
    yield folder, metrics
    patch.undo()


def test_a_run_has_metrics_a_log_and_a_curve(trained):
    folder, metrics = trained
    assert {"student/psnr", "student/ssim", "teacher/psnr", "student/logit_gap"} <= set(metrics)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    terms = [tuple(line["terms"]) for line in lines if line["kind"] == "train" and line["stage"] == "student"]
    points = ("feature", "colour", "density")
    assert list(dict.fromkeys(terms)) == [("feature",), points, (*points, "rgb")]
    profiles = {line["name"] for line in lines if line["kind"] == "profile"}
    assert profiles == {"psnr over seconds of training", "ssim over seconds of training"}
    curve = json.loads((folder / "student" / "curve.json").read_text())
    assert [point["step"] for point in curve] == [3, 6]
    assert curve[0]["seconds"] < curve[1]["seconds"]


def test_evaluation_gives_the_same_again_and_the_report_has_pictures(trained):
    from kdcore.report import write_report

    folder, metrics = trained
    assert run.evaluate(folder) == metrics
    page = write_report([folder], samples=1).read_text()
    assert "error of the student" in page
    assert "over seconds of training" in page


# ---------------------------------------------------------------- resume


def same(a, b, where=""):
    """Whether two checkpoints are equal, bit for bit."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for index, (one, other) in enumerate(zip(a, b)):
            same(one, other, f"{where}/{index}")
    else:
        assert a == b, where


RESUMED = [
    *TINY,
    "teacher.train.steps=18",
    "teacher.train.checkpoint_every=5",
    "render.occupancy_warmup=4",  # the grid is looked at in step 16 and settles
    "train.steps=9",
    "train.checkpoint_every=2",
    "method_args.stage_ends=[5,7]",
    "student.geometry=7",  # a linear map trains beside the student
]


def test_resume_gives_the_checkpoints_of_an_uncut_run(tmp_path, monkeypatch):
    """Cut in the teacher's training on photographs, in the first stage of the student's and in the last."""
    from kd_nerf.integrations.teachers import find_checkpoint
    from kd_nerf.integrations.trainer import ResumableTrainer

    iteration = ResumableTrainer.train_iteration
    method, config = load_config("pvd/small", RESUMED)
    monkeypatch.setenv("KD_CACHE", str(tmp_path / "one"))
    run.train(method, config, tmp_path / "whole", quiet=True, cpu=True)
    monkeypatch.setenv("KD_CACHE", str(tmp_path / "other"))
    for number, (stage, step) in enumerate([("teacher", 13), ("student", 3), ("student", 7)]):

        def cut(self, at, stage=stage, step=step):
            if (self.config.experiment_name, at) == (stage, step):
                raise KeyboardInterrupt
            return iteration(self, at)

        monkeypatch.setattr(ResumableTrainer, "train_iteration", cut)
        with pytest.raises(KeyboardInterrupt):
            run.train(method, config, tmp_path / "cut", resume=number > 0, quiet=True, cpu=True)
        (kept,) = (tmp_path / "cut" / "checkpoints" / stage).rglob("step-*.ckpt")
        assert int(kept.stem.split("-")[1]) == {"teacher": 10, "student": step - 1}[stage]
    monkeypatch.setattr(ResumableTrainer, "train_iteration", iteration)
    run.train(method, config, tmp_path / "cut", resume=True, quiet=True, cpu=True)
    for artefact, last in (("teacher", 17), ("student", 8)):
        found = [find_checkpoint(tmp_path / folder / artefact) for folder in ("whole", "cut")]
        assert [path.name for path in found] == [f"step-{last:09d}.ckpt"] * 2
        whole, resumed = (torch.load(path, weights_only=True) for path in found)
        assert "feature_map.weight" in whole["pipeline"] or artefact == "teacher"
        same(whole, resumed)


SCRIPT = """
import contextlib, io, sys, torch
from pathlib import Path
from nerfstudio.scripts.train import entrypoint
from nerfstudio.utils.eval_utils import eval_setup

told = io.StringIO()
with contextlib.redirect_stdout(told), contextlib.suppress(SystemExit):
    sys.argv = ["ns-train", "kd-pvd", "--help"]
    entrypoint()
Path("help.txt").write_text(told.getvalue())
for command in Path("commands.txt").read_text().splitlines():
    sys.argv = ["ns-train", *command.split()]
    entrypoint()
config, pipeline, checkpoint, step = eval_setup(Path("student/kd-pvd/nerfstudio/config.yml"))
camera, batch = next(iter(pipeline.datamanager.fixed_indices_eval_dataloader))
outputs = pipeline.model.get_outputs_for_camera(camera)
torch.save({"rgb": outputs["rgb"].cpu(), "step": step}, "reloaded.pt")
"""
COMMAND = """
kd-pvd --vis tensorboard --machine.device-type cpu --experiment-name e
--pipeline.datamanager.train-num-rays-per-batch 16 --pipeline.teacher-checkpoint teacher
--pipeline.model.field.architecture vm --pipeline.model.field.density-rank 2 --pipeline.model.field.colour-rank 2
--pipeline.model.field.resolution 8 --pipeline.model.samples 8 --pipeline.model.occupancy-resolution 8
--pipeline.pvd.stage-ends 2 4 {} blender-data --data scene
"""
RUNS = [
    "--timestamp t --max-num-iterations 3",
    "--timestamp resumed --max-num-iterations 2 --load-dir outputs/e/kd-pvd/t/nerfstudio_models",
    "--timestamp whole --max-num-iterations 5",
]


@pytest.fixture(scope="module")
def studio(trained):
    """The run's folder after nerfstudio's commands in a process of their own, which costs one import."""
    folder, _ = trained
    lines = [" ".join(COMMAND.format(run).split()) for run in RUNS]
    (folder / "commands.txt").write_text("\n".join(lines))
    settings = {**os.environ, "NERFSTUDIO_METHOD_CONFIGS": PLUGIN, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, cwd=folder, env=settings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_ns_train_tells_of_the_method(studio):
    text = (studio / "help.txt").read_text()
    assert "--pipeline.teacher-checkpoint" in text
    assert "--pipeline.pvd.stage-ends" in text
    assert "--pipeline.model.field.architecture" in text


def test_ns_train_converts_into_another_architecture(studio):
    from kd_nerf.integrations.teachers import load_teacher

    (checkpoint,) = studio.glob("outputs/e/kd-pvd/t/nerfstudio_models/step-*.ckpt")
    assert load_teacher(checkpoint).field.config.architecture == "vm"


def test_ns_train_goes_on_bit_for_bit(studio):
    resumed, whole = (
        torch.load(studio / f"outputs/e/kd-pvd/{run}/nerfstudio_models/step-000000004.ckpt", weights_only=True)
        for run in ("resumed", "whole")
    )
    same(resumed, whole)


def test_nerfstudio_reloads_the_student_and_draws_the_same_view(studio):
    from kd_nerf.runs import open_models

    reloaded = torch.load(studio / "reloaded.pt", weights_only=True)
    _, config, artefacts = run.load_run(studio)
    models, test = open_models(config, artefacts)
    assert reloaded["step"] == 5
    torch.testing.assert_close(reloaded["rgb"], models["student"].view(test.cameras, 0), atol=1e-4, rtol=0)


def test_a_checkpoint_holds_the_student_alone(trained):
    from kd_nerf.integrations.teachers import find_checkpoint, read_state

    folder, _ = trained
    state = read_state(find_checkpoint(folder / "student"))
    assert all(key.startswith(("field.radiance.", "occupancy.", "device_indicator")) for key in state), list(state)


# ---------------------------------------------------------------- a stock student

STOCK = """
import importlib.metadata, json, sys, torch
from pathlib import Path

listed = importlib.metadata.entry_points

def others(**wanted):
    found = listed(**wanted)
    if wanted.get("group") == "nerfstudio.method_configs":
        found = type(found)(one for one in found if not one.value.startswith("kd_"))
    return found

importlib.metadata.entry_points = others

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("kdcore", "kd_nerf"):
            raise ModuleNotFoundError(f"No module named '{name}'")

sys.meta_path.insert(0, Missing())
import torchmetrics.image.lpip
class Without(torch.nn.Module):  # its weights are a download
    def __init__(self, **options):
        super().__init__()
torchmetrics.image.lpip.LearnedPerceptualImagePatchSimilarity = Without
from nerfstudio.cameras.rays import Frustums, RaySamples
from nerfstudio.utils.eval_utils import eval_setup

config, pipeline, checkpoint, step = eval_setup(Path("export/nerfacto/nerfstudio/config.yml"), test_mode="inference")
model = pipeline.model
given = torch.load("points.pt", weights_only=True)
zero = torch.zeros(len(given["positions"]), 1, 1)
places = Frustums(given["positions"][:, None], given["directions"][:, None], zero, zero, torch.ones_like(zero))
samples = RaySamples(frustums=places, camera_indices=zero.long())
with torch.no_grad():
    density, geometry = model.field.get_density(samples)
    colour = next(iter(model.field.get_outputs(samples, geometry).values()))
    proposed = model.proposal_networks[0].get_density(samples)[0]
    view = model.get_outputs_for_camera(pipeline.datamanager.eval_dataset.cameras[0:1])
torch.save({"density": density[:, 0, 0], "colour": colour[:, 0], "proposed": proposed[:, 0, 0], "rgb": view["rgb"],
            "step": step}, "stock.pt")
print(json.dumps({"model": type(model).__module__, "loaded": [n for n in sys.modules if n.startswith("kd")]}))
"""


def test_a_nerfacto_student_opens_with_stock_classes_alone(trained, tmp_path):
    """In a process that cannot import kd: the same densities and colours, a proposal network that agrees, a view."""
    from kd_nerf.integrations.teachers import load_teacher

    changes = ["student.architecture=nerfacto", "export=[nerfacto]", "student.levels=3", "student.log2_size=8"]
    method, config = load_config("pvd/small", [*TINY, *changes, "student.finest_resolution=24"])
    run.train(method, config, tmp_path / "run", quiet=True, cpu=True)
    positions = torch.rand(40, 3) * 2.4 - 1.2
    directions = torch.nn.functional.normalize(torch.randn(40, 3), dim=-1)
    torch.save({"positions": positions, "directions": directions}, tmp_path / "run" / "points.pt")
    text = (tmp_path / "run" / "export/nerfacto/nerfstudio/config.yml").read_text()
    assert not any(name in text for name in ("kd_", "kd-", "kdcore"))
    settings = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", STOCK]
    done = subprocess.run(command, cwd=tmp_path / "run", env=settings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told == {"model": "nerfstudio.models.nerfacto", "loaded": []}
    found = torch.load(tmp_path / "run" / "stock.pt", weights_only=True)
    field = load_teacher(tmp_path / "run" / "student").field.eval()
    with torch.no_grad():
        expected = field(positions, directions)
    torch.testing.assert_close(found["density"], expected.logit.exp())
    torch.testing.assert_close(found["proposed"], expected.logit.exp())
    torch.testing.assert_close(found["colour"], expected.colour)
    assert found["rgb"].shape == (12, 12, 3)
    assert found["step"] == 5
    terms = {
        name
        for line in map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
        for name in line.get("terms", ())
    }
    assert "empty" in terms


# ---------------------------------------------------------------- stock teachers


def stock(kind: str):
    """A freshly initialised stock field and the state dict that its method's checkpoint has."""
    from nerfstudio.field_components import encodings as e
    from nerfstudio.fields.nerfacto_field import NerfactoField
    from nerfstudio.fields.tensorf_field import TensoRFField
    from nerfstudio.fields.vanilla_nerf_field import NeRFField

    box = torch.tensor([[-1.5] * 3, [1.5] * 3])
    if kind == "nerfacto":
        sizes = {"num_levels": 3, "max_res": 32, "log2_hashmap_size": 8, "hidden_dim": 16}
        field = NerfactoField(box, num_images=2, appearance_embedding_dim=4, implementation="torch", **sizes)
    elif kind == "vanilla-nerf":
        position = e.NeRFEncoding(3, 10, 0.0, 8.0, include_input=True)
        field = NeRFField(position, e.NeRFEncoding(3, 4, 0.0, 4.0, include_input=True))
    else:
        make = e.TensorVMEncoding if kind == "vm" else e.TensorCPEncoding
        field = TensoRFField(
            box,
            feature_encoding=e.NeRFEncoding(27, 2, 0, 2),
            direction_encoding=e.NeRFEncoding(3, 2, 0, 2),
            density_encoding=make(resolution=8, num_components=2),
            color_encoding=make(resolution=8, num_components=3),
        )
    prefix = "_model.field_fine." if kind == "vanilla-nerf" else "_model.field."
    return field.eval(), {f"{prefix}{key}": value for key, value in field.state_dict().items()}


@pytest.mark.parametrize("kind", ["nerfacto", "vanilla-nerf", "vm", "cp"])
def test_stock_fields_are_teachers(kind, tmp_path):
    from nerfstudio.field_components.field_heads import FieldHeadNames

    from kd_nerf.engine.fields import FieldConfig, make_field
    from kd_nerf.engine.rendering import OccupancyGrid, Rays, march
    from kd_nerf.integrations.teachers import load_teacher, samples_at
    from kd_nerf.methods.pvd import PVD

    field, state = stock(kind)
    torch.save({"pipeline": state, "step": 3}, tmp_path / "step-000000003.ckpt")
    teacher = load_teacher(tmp_path, contraction=False).field
    positions, directions = torch.rand(9, 3) - 0.5, torch.nn.functional.normalize(torch.randn(9, 3), dim=-1)
    with torch.no_grad():
        expected = field(samples_at(positions, directions))
        found = teacher(positions, directions)
    density = expected[FieldHeadNames.DENSITY].view(-1)
    torch.testing.assert_close(found.logit, density.clamp_min(1e-10).log().clamp(-2, 7))
    torch.testing.assert_close(found.colour, expected[FieldHeadNames.RGB].view(-1, 3))
    student = make_field(FieldConfig(architecture="mlp", layers=2, width=8), torch.tensor([[-1.5] * 3, [1.5] * 3]))
    distiller = PVD(teacher, student)
    limit = torch.ones(9)
    rays = Rays(-4 * directions + positions, directions, 0.1 * limit, 9 * limit)
    for step in (0, 5000):
        distiller.progress.step = step
        terms = distiller.loss(march(rays, student, OccupancyGrid(4), 6, jitter=True))
        assert ("feature" in terms) == (teacher.feature_dim is not None)
        terms.total().backward()
    assert all(p.grad is not None for p in distiller.parameters() if p.requires_grad)


def test_a_teacher_that_is_none_is_named(tmp_path):
    from kd_nerf.integrations.teachers import load_teacher

    with pytest.raises(InputError, match="no such file"):
        load_teacher(tmp_path / "nothing")
    (tmp_path / "step-000000001.ckpt").write_bytes(b"not a checkpoint")
    with pytest.raises(InputError, match="not a nerfstudio checkpoint"):
        load_teacher(tmp_path)
    torch.save({"pipeline": {"_model.x": torch.zeros(1)}}, tmp_path / "step-000000002.ckpt")
    with pytest.raises(InputError, match="not known"):
        load_teacher(tmp_path)


def test_teacher_and_student_in_different_spaces_are_named():
    from kd_nerf.engine.fields import FieldConfig, make_field
    from kd_nerf.integrations.pipeline import check_spaces

    box = torch.tensor([[-1.0] * 3, [1.0] * 3])
    dense = {"architecture": "dense", "resolution": 3}
    one = make_field(FieldConfig(**dense), box)
    with pytest.raises(InputError, match="contraction"):
        check_spaces(one, make_field(FieldConfig(contraction=True, **dense), box))
    with pytest.raises(InputError, match="box"):
        check_spaces(one, make_field(FieldConfig(**dense), 2 * box))


def test_a_contracted_teacher_for_a_boxed_student_is_named(tmp_path):
    method, config = load_config("pvd/small", [*TINY, "teacher.contraction=true"])
    with pytest.raises(InputError, match=r"student\.contraction"):
        run.check(method, config, tmp_path / "run", cpu=True)
