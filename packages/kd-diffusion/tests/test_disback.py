"""DisBack: the pointer, the path on disk, numbers by hand in a Gaussian world, hosts, and whole runs."""

from __future__ import annotations

import copy
import hashlib
import json

import pytest
import torch
from diffusers import DiffusionPipeline
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from kd_diffusion import runs
from kd_diffusion.checkpoint_path import denoising_error, read_checkpoint, write_checkpoint
from kd_diffusion.engine.denoiser import Denoiser
from kd_diffusion.engine.distillation import Networks
from kd_diffusion.engine.draws import Draws
from kd_diffusion.engine.lora import adapter_state
from kd_diffusion.engine.process import EDM, add_noise
from kd_diffusion.engine.score import dmd_weight
from kd_diffusion.integrations.conditioners import NoConditioner
from kd_diffusion.integrations.pipelines import open_pipeline, opened
from kd_diffusion.methods import disback, dmd2, swiftbrush
from kd_diffusion.methods import sid as sid_method
from kd_diffusion.methods.disback import (
    METHOD,
    Backtracking,
    DiffInstruct,
    DiffInstructConfig,
    Recording,
    pointer,
    prepare_networks,
)
from kd_diffusion.methods.dmd2 import DMD2, DMD2Config
from kd_diffusion.testing import tiny_unet, unet_pipeline
from kdcore import checkpoint, run
from kdcore.compare import load_arms
from kdcore.config import override, read_yaml
from kdcore.errors import InputError
from kdcore.method import config_folder, config_of

CONFIGS = sorted(path.stem for path in config_folder("disback").glob("*.yaml"))
FAST = {
    "train.steps": 4,
    "train.batch_size": 8,
    "train.optimizer": {"name": "adam", "lr": 1e-3, "betas": [0.0, 0.999]},
    "evaluation": {"samples": 40, "batch_size": 40, "teacher_steps": [1]},
}
SHORT = {
    "method_args.host": "diff_instruct",
    "method_args.path_length": 2,
    "method_args.record_iterations": 3,
    "method_args.segment_iterations": 1,
}
SWIFTBRUSH = {
    "method_args.host": "swiftbrush",
    "method_args.host_args": {"lora": {"rank": 2, "alpha": 2, "targets": ["to_q", "to_v"]}},
}


def config(folder, method=METHOD, **changes):
    values = {
        "method": method.key,
        "teacher": {"pretrained": str(folder), "null_class": 10},
        "data": {"name": "digits"},
        "train": {"steps": 1},
    }
    return config_of(method, override(values, {**FAST, **changes}))


def networks() -> Networks:
    found = opened(unet_pipeline(), null_class=10)
    fake, student = (found.denoiser_for(tiny_unet().train()) for _ in range(2))
    return Networks(found.denoiser, fake, student, found.conditioner, found.space)


def batch(count=4, seed=0) -> dict:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 10, (count,), generator=generator)
    return {"x": torch.randn(count, 1, 8, 8, generator=generator), "class_labels": labels}


def moved(network: nn.Module, scale: float) -> nn.Module:
    """A copy at some distance from a network."""
    other, generator = copy.deepcopy(network), torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return other


def write_path(folder, teacher: nn.Module, scales) -> None:
    for index, scale in enumerate(scales):
        write_checkpoint(moved(teacher, scale), folder, index)


def state(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


def weights(folder) -> dict[str, torch.Tensor]:
    return open_pipeline(folder).network.state_dict()


def descend(method, steps: int, lr: float = 0.01) -> None:
    """A few steps of both players by plain gradient descent."""
    host = method.host if isinstance(method, Backtracking) else method
    for step in range(steps):
        method.progress.step = step
        for player, module in (("generator", host.generator), ("fake", host.fake)):
            parameters = [p for p in module.parameters() if p.requires_grad]
            total = method.loss(batch(seed=step), player).total()
            gradients = torch.autograd.grad(total, parameters, allow_unused=True)
            with torch.no_grad():
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    if gradient is not None:
                        parameter -= lr * gradient


class Gaussian(nn.Module):
    """The exact denoiser of N(mean, 1) in EDM's form, which can be trained: mu = m + (x_t - m) / (1 + s^2)."""

    def __init__(self, mean: float):
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(mean, dtype=torch.float64))

    def forward(self, sample, timestep, class_labels=None, return_dict=False):
        s = (timestep.double() / 250).exp().reshape(-1, 1, 1, 1)
        x_t = sample * (s**2 + 0.25).sqrt()
        return (self.mean + (x_t - self.mean) / (1 + s**2),)


class Space:
    shape = (1, 1, 1)


def gaussian_networks(teacher: float, fake: float) -> Networks:
    one, two, three = (Denoiser(Gaussian(mean), EDM(), "sample") for mean in (teacher, fake, fake))
    return Networks(one, two, three, NoConditioner(), Space())


# ---------------------------------------------------------------- the pointer


def test_the_pointer_goes_back_to_the_teacher_and_stays():
    at = [pointer(j, segment=100, length=4) for j in (0, 99, 100, 199, 200, 299, 300, 301, 10**6)]
    assert at == [3, 3, 2, 2, 1, 1, 0, 0, 0]


@given(st.integers(0, 10_000), st.integers(1, 500), st.integers(1, 12))
def test_the_pointer_never_leaves_the_path(iteration, segment, length):
    at = pointer(iteration, segment=segment, length=length)
    assert 0 <= at < length
    assert 0 <= at - pointer(iteration + 1, segment=segment, length=length) <= 1


def test_the_order_of_the_targets(tmp_path):
    """path: s_3 .. s_0; reversed: s_1 .. s_3 and the teacher; teacher: always s_0."""
    wanted = {"path": [3, 2, 1, 0, 0], "reversed": [1, 2, 3, 0, 0], "teacher": [0] * 5}
    for number in range(5):
        write_checkpoint(Gaussian(float(number)), tmp_path, number)
    for target, order in wanted.items():
        host = DiffInstruct(gaussian_networks(0.0, 4.0), DiffInstructConfig())
        method = Backtracking(host, tmp_path, length=4, segment=2, target=target)
        for iteration in range(10):
            method.follow(iteration)
            assert host.real_score.network.mean.item() == order[iteration // 2], (target, iteration)


# ---------------------------------------------------------------- the path on disk


def test_a_checkpoint_comes_back_as_it_was_written(tmp_path):
    network, other = tiny_unet(), moved(tiny_unet(), 0.1)
    write_checkpoint(other, tmp_path, 3)
    read_checkpoint(network, tmp_path, 3)
    assert equal(state(network), state(other))
    assert [path.name for path in tmp_path.iterdir()] == ["s_3.safetensors"]


@pytest.mark.parametrize("damage", ["missing key", "extra key", "prefix", "shape", "no file", "rubbish"])
def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path, damage):
    from safetensors.torch import load_file, save_file

    file = tmp_path / "s_1.safetensors"
    write_checkpoint(tiny_unet(), tmp_path, 1)
    held = load_file(file)
    first = next(iter(held))
    if damage == "missing key":
        del held[first]
    elif damage == "extra key":
        held["more"] = torch.zeros(1)
    elif damage == "prefix":  # a checkpoint of a whole module, whose names all miss
        held = {f"fake_unet.{name}": value for name, value in held.items()}
    elif damage == "shape":
        held[first] = held[first][:1].clone()
    save_file(held, file)
    if damage == "no file":
        file.unlink()
    elif damage == "rubbish":
        file.write_bytes(b"12345678rubbish")
    with pytest.raises(InputError, match=r"path: s_1\.safetensors does not fit UNet2DModel"):
        read_checkpoint(tiny_unet(), tmp_path, 1)


# ---------------------------------------------------------------- numbers


def test_the_first_mismatch_of_the_path_is_a_quarter_of_the_hosts(tmp_path):
    """Teacher N(0, 1), generator N(2, 1), m_{N-1} = 1.5, s = 1: Delta = (1 - k)(A - m) is .25 against 1."""
    write_checkpoint(Gaussian(0.0), tmp_path, 0)
    write_checkpoint(Gaussian(1.5), tmp_path, 1)
    host = DiffInstruct(gaussian_networks(0.0, 2.0), DiffInstructConfig())
    x_t = torch.randn(5, 1, 1, 1, dtype=torch.float64)
    t = torch.ones(5, dtype=torch.float64)
    plain = host.fake_prediction(x_t, t, {}) - host.real_prediction(x_t, t, {})
    torch.testing.assert_close(plain, torch.ones_like(plain))
    method = Backtracking(host, tmp_path, length=2, segment=10)
    method.follow(0)
    first = host.fake_prediction(x_t, t, {}) - host.real_prediction(x_t, t, {})
    torch.testing.assert_close(first, torch.full_like(first, 0.25))
    method.follow(10)
    torch.testing.assert_close(host.fake_prediction(x_t, t, {}) - host.real_prediction(x_t, t, {}), plain)


def test_weight_of_diff_instruct():
    """w_t a_t (score_f - score_r) with w_t = s^2 / a is a (mu_f - mu_r)."""
    from kd_diffusion.engine.process import VP

    process = VP(torch.full((1000,), 0.64, dtype=torch.float64))
    found = gaussian_networks(0.0, 2.0)
    for denoiser in (found.teacher, found.fake, found.generator):
        denoiser.process = process
    host = DiffInstruct(found, DiffInstructConfig())
    x = torch.randn(3, 1, 1, 1, dtype=torch.float64)
    torch.testing.assert_close(host.weight(x, x, torch.tensor([1, 2, 3])), torch.full_like(x, 0.8))


def test_the_recorded_path_is_monotone_in_a_gaussian_world(tmp_path):
    """Means go from the teacher's to the generator's; the error on generated samples falls, on real ones it rises."""
    denoiser = Denoiser(Gaussian(0.0), EDM(), "sample")
    write_checkpoint(denoiser.network, tmp_path, 0)
    marks = [4, 8, 12, 16]
    recording = Recording(
        denoiser,
        tmp_path,
        marks,
        conditioner=NoConditioner(),
        data=lambda batch, draw: 2.0 + draw.normal((512, 1, 1, 1)).double(),
    )
    optimizer = torch.optim.SGD(recording.parameters(), lr=0.2)
    for step in range(17):
        recording.progress.step = step
        recording.loss({"index": torch.arange(512)}).total().backward()
        optimizer.step()
        optimizer.zero_grad()
    draw = Draws(0).at("test", 0)
    noise = draw.normal((4000, 1, 1, 1)).double()
    means, errors = [], []
    for index in range(5):
        read_checkpoint(denoiser.network, tmp_path, index)
        means.append(denoiser.network.mean.item())
        errors.append([denoising_error(denoiser, a + noise, {}, Draws(0).at("noise", 0))[0] for a in (2.0, 0.0)])
    assert means == sorted(means)
    assert means[0] == 0
    assert means[-1] < 2.1
    generated, real = zip(*errors, strict=True)
    assert list(generated) == sorted(generated, reverse=True)
    assert list(real) == sorted(real)


def test_the_recording_sees_the_share_of_empty_conditions_that_is_asked_for(tmp_path):
    found = networks()
    for drop in (0.0, 0.3, 1.0):
        recording = Recording(found.fake, tmp_path, [], conditioner=found.conditioner, drop=drop)
        condition = recording.conditional({"class_labels": torch.arange(4000) % 10})
        share = (condition["class_labels"] == 10).double().mean().item()
        assert share == drop if drop in (0.0, 1.0) else abs(share - drop) < 0.04


def test_the_first_gradient_is_between_the_ends_of_the_path(tmp_path):
    """At iteration 0 mu_f = mu_{s_N} and g = W (mu_{s_N} - mu_{s_{N-1}})."""
    found = networks()
    teacher = found.teacher.network
    write_path(tmp_path, teacher, [0.0, 0.02, 0.05])
    prepare_networks(found, tmp_path, 2, None)
    assert equal(state(found.fake.network), state(moved(tiny_unet(), 0.05)))
    host = DMD2(found, DMD2Config(gan=None), seed=3)
    method = Backtracking(host, tmp_path, length=2, segment=5)
    method.follow(0)
    x, t = batch()["x"], torch.tensor([0.5, 1.0, 2.0, 4.0], dtype=torch.float64)
    condition = {"class_labels": batch()["class_labels"]}
    x_t = add_noise(host.process, x, torch.randn(x.shape), t)
    last, before = (opened(unet_pipeline()).denoiser_for(moved(tiny_unet(), scale)) for scale in (0.05, 0.02))
    with torch.no_grad():
        mu_last, mu_before = last(x_t, t, condition), before(x_t, t, condition)
    expected = dmd_weight(x, mu_before) * (mu_last - mu_before)  # the normaliser is the target's own
    torch.testing.assert_close(host.direction(x, x_t, t, condition), expected)


def test_a_path_of_teachers_is_the_host(tmp_path):
    """All s_i the teacher: the generator's trajectory is the host's whose fake score starts at the teacher."""
    plain = DMD2(networks(), DMD2Config(gan=None, fake_updates=1), seed=3)
    plain.fake.network.load_state_dict(plain.real_score.network.state_dict())
    found = networks()
    write_path(tmp_path, found.teacher.network, [0.0] * 4)
    prepare_networks(found, tmp_path, 3, None)
    method = Backtracking(DMD2(found, DMD2Config(gan=None, fake_updates=1), seed=3), tmp_path, length=3, segment=1)
    descend(plain, 5)
    descend(method, 5)
    assert equal(state(plain.generator), state(method.host.generator))
    assert not equal(state(plain.generator), state(networks().generator))


def test_only_the_target_changes_between_segments(tmp_path):
    found = networks()
    write_path(tmp_path, found.teacher.network, [0.0, 0.02, 0.05])
    prepare_networks(found, tmp_path, 2, None)
    method = Backtracking(DMD2(found, DMD2Config(gan=None), seed=3), tmp_path, length=2, segment=2)
    method.follow(1)
    before = [state(m) for m in (method.host.fake, method.host.generator, method.host.real_score)]
    method.follow(2)
    after = [state(m) for m in (method.host.fake, method.host.generator, method.host.real_score)]
    assert [equal(a, b) for a, b in zip(before, after, strict=True)] == [True, True, False]
    assert equal(after[2], state(networks().teacher))
    assert not any(p.requires_grad for p in method.host.real_score.parameters())
    assert not any(name.startswith("host.teacher") for name in method.checkpoint_state())


# ---------------------------------------------------------------- hosts


def test_the_target_of_sid_stays_differentiable_in_its_input(tmp_path):
    found = networks()
    write_path(tmp_path, found.teacher.network, [0.0, 0.02, 0.05])
    prepare_networks(found, tmp_path, 2, None)
    args = sid_method.SiDConfig(guidance_scale=1.0)
    method = Backtracking(sid_method.SiD(found, args, seed=0), tmp_path, length=2, segment=1)
    method.follow(0)
    x_t = batch()["x"].requires_grad_()
    condition = {"class_labels": batch()["class_labels"]}
    method.host.real_prediction(x_t, torch.ones(4, dtype=torch.float64), condition).sum().backward()
    assert x_t.grad is not None
    assert x_t.grad.abs().sum() > 0
    assert [player.name for player in method.players()] == ["fake", "generator"]


@pytest.mark.parametrize("kind", ["unet", "text"])
def test_the_path_of_adapters(tmp_path, tiny_unet_folder, tiny_text_folder, kind):
    """Host with a LoRA fake score: s_1 .. s_N are adapters on the teacher, s_0 is the teacher without."""
    folder, null = (tiny_unet_folder, 10) if kind == "unet" else (tiny_text_folder, None)
    settings = config(folder, **SWIFTBRUSH, **{"teacher.null_class": null})
    _, host_config = disback.host_of(settings)
    found_pipe = open_pipeline(folder, null_class=null)
    found = runs.adapter_networks(host_config, found_pipe, {}, None)
    network = found.fake.network
    plain = state(network)
    for index, scale in enumerate((0.0, 0.3, 0.6)):
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                if "lora_B" in name:
                    parameter.fill_(scale)
        write_checkpoint(network, tmp_path, index)
    network.load_state_dict(plain)
    prepare_networks(found, tmp_path, 2, host_config.method_args.lora)
    method = Backtracking(swiftbrush.build(host_config, found), tmp_path, length=2, segment=1)
    trained = [name for name, p in network.named_parameters() if p.requires_grad]
    assert trained
    assert all(".default." in name for name in trained)
    t = method.host.process.at(torch.tensor([500, 700]))
    x_t = torch.randn(2, *found.space.shape, generator=torch.Generator().manual_seed(0))
    condition = found.conditioner.blank(2)
    outputs = {}
    with torch.no_grad():
        outputs["fake"] = found.fake(x_t, t, condition)
        for iteration in (0, 1):
            method.follow(iteration)
            outputs[iteration] = found.teacher(x_t, t, condition)
            torch.testing.assert_close(found.fake(x_t, t, condition), outputs["fake"])
        teacher = open_pipeline(folder, null_class=null).denoiser.eval()(x_t, t, condition)
        read_checkpoint(network, tmp_path, 1)
        first = found.fake(x_t, t, condition)
    torch.testing.assert_close(outputs[1], teacher)  # the adapter is off
    torch.testing.assert_close(outputs[0], first)
    assert not torch.allclose(outputs[0], outputs[1])
    assert not torch.allclose(outputs["fake"], outputs[0])
    assert set(adapter_state(network)) == set(adapter_state(network, "path"))
    assert not any(".path." in name for name in method.checkpoint_state())


@pytest.mark.parametrize("host", ["dmd2", "swiftbrush", "sid", "diff_instruct"])
def test_hosts_and_their_default_arguments(host):
    recipe, host_config = disback.host_of(config("x", **{"method_args.host": host}))
    assert isinstance(host_config.method_args, recipe.arguments)
    assert host_config.train.steps == 4


# ---------------------------------------------------------------- runs


def test_without_a_path_a_run_is_the_hosts(tmp_path, tiny_unet_folder):
    arguments = {"gan": None, "fake_updates": 2}
    host = config(tiny_unet_folder, dmd2.METHOD, **{"method_args": arguments, "data.held_out": 0.0})
    run.train(dmd2.METHOD, host, tmp_path / "host", quiet=True, cpu=True)
    args = {"method_args.path_length": 0, "method_args.host_args": arguments, "data.held_out": 0.0}
    metrics = run.train(METHOD, config(tiny_unet_folder, **args), tmp_path / "own", quiet=True, cpu=True)
    assert equal(weights(tmp_path / "host" / "student"), weights(tmp_path / "own" / "student"))
    assert not equal(weights(tmp_path / "host" / "student"), weights(tiny_unet_folder))
    assert "path/moved" not in metrics


@pytest.fixture(scope="module")
def short_run(tmp_path_factory, tiny_unet_folder):
    """A run with a path of two, and what its generator started from."""
    folder, starts = tmp_path_factory.mktemp("short") / "run", []
    init = Backtracking.__init__

    def watched(self, host, *args, **options):
        init(self, host, *args, **options)
        starts.append((state(host.student), state(host.fake.network)))

    before = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in tiny_unet_folder.rglob("*.safetensors")}
    patch = pytest.MonkeyPatch()
    patch.setattr(Backtracking, "__init__", watched)
    changes = {"train.checkpoint_every": 3, "train.ema": {"decay": 0.9}, "data.held_out": 0.0}
    settings = config(tiny_unet_folder, **SHORT, **changes)
    metrics = run.train(METHOD, settings, folder, quiet=True, cpu=True)
    patch.undo()
    after = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in before}
    return folder, metrics, starts, before == after


def test_the_recording_leaves_the_generator_and_the_teacher(short_run, tiny_unet_folder):
    folder, _, starts, untouched = short_run
    assert untouched
    teacher = weights(tiny_unet_folder)
    (generator, fake), *more = starts
    assert not more
    assert equal(generator, teacher)
    network = tiny_unet()
    read_checkpoint(network, folder / "path", 0)
    assert equal(state(network), teacher)
    read_checkpoint(network, folder / "path", 2)
    assert equal(state(network), fake)
    assert not equal(fake, teacher)


def test_the_path_is_described(short_run):
    folder, metrics, _, _ = short_run
    index = json.loads((folder / "path" / "index.json").read_text())
    assert index["iterations"] == [0, 1, 3]
    assert set(index["errors"]) == {"generated", "real"}
    assert all(len(values) == 3 for values in index["errors"].values())
    assert metrics["path/moved"] == index["moved"] > 0
    names = [json.loads(line).get("name", "") for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert sum(name.startswith("denoising error along the path") for name in names) == 2


def test_segments_do_not_reset_optimisers_nor_the_average(short_run):
    """Every update up to the checkpoint counts, across two changes of the target."""
    folder, *_ = short_run
    saved = checkpoint.load(checkpoint.latest(folder / "checkpoints" / "student"))
    assert saved.step == 3
    for player in ("generator", "fake"):
        steps = {int(entry["step"]) for entry in saved.state["optimizers"][player]["state"].values()}
        assert steps == {3}
    assert set(saved.state["ema"]) == {"generator"}


def test_the_student_samples_in_stock_diffusers(short_run):
    folder, *_ = short_run
    pipe = DiffusionPipeline.from_pretrained(folder / "student")
    pipe.set_progress_bar_config(disable=True)
    images = pipe(batch_size=2, class_labels=[1, 2], num_inference_steps=1, output_type="np").images
    assert images.shape == (2, 8, 8, 1)
    _, loaded, artefacts = run.load_run(folder)
    assert METHOD.predict(loaded, artefacts, 1)[0]["images"]["student"].shape == (8, 8)


@pytest.mark.parametrize("stage", ["record", "student"])
def test_a_resumed_run_has_its_pointer_and_its_path(tmp_path, tiny_unet_folder, short_run, monkeypatch, stage):
    """Cut in the middle of a segment, then resumed: the same weights as in one go."""
    every = 2 if stage == "record" else 3
    changes = {"train.checkpoint_every": every, "train.ema": {"decay": 0.9}, "data.held_out": 0.0}
    settings = config(tiny_unet_folder, **SHORT, **changes)
    kind, last = (Recording, 2) if stage == "record" else (Backtracking, 3)
    loss = kind.loss

    def killed(self, batch, *args):
        if self.progress.step == last:
            raise KeyboardInterrupt
        return loss(self, batch, *args)

    with monkeypatch.context() as patch:
        patch.setattr(kind, "loss", killed)
        with pytest.raises(KeyboardInterrupt):
            run.train(METHOD, settings, tmp_path / "run", quiet=True, cpu=True)
    run.train(METHOD, settings, tmp_path / "run", resume=True, quiet=True, cpu=True)
    assert equal(weights(tmp_path / "run" / "student"), weights(short_run[0] / "student"))
    for index in range(3):
        name = f"path/s_{index}.safetensors"
        assert (tmp_path / "run" / name).read_bytes() == (short_run[0] / name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("target", ["teacher", "reversed"])
def test_the_ablations_are_other_runs(tmp_path, tiny_unet_folder, short_run, target):
    changes = {"method_args.path_length": 3, "method_args.target": target}
    settings = config(tiny_unet_folder, **{**SHORT, **changes})
    metrics = run.train(METHOD, settings, tmp_path / "run", quiet=True, cpu=True)
    assert metrics["student/frechet"] > 0
    assert not equal(weights(tmp_path / "run" / "student"), weights(short_run[0] / "student"))


@pytest.mark.slow
@pytest.mark.parametrize("host", ["dmd2", "sid", "swiftbrush"])
def test_a_run_on_each_host(tmp_path, tiny_unet_folder, host):
    args = SWIFTBRUSH["method_args.host_args"] if host == "swiftbrush" else {}
    changes = {**SHORT, "method_args.host": host, "method_args.host_args": args}
    metrics = run.train(METHOD, config(tiny_unet_folder, **changes), tmp_path / "run", quiet=True, cpu=True)
    assert metrics["student/frechet"] > 0
    sizes = [(tmp_path / "run" / "path" / f"s_{index}.safetensors").stat().st_size for index in range(3)]
    whole = sum(p.numel() * 4 for p in open_pipeline(tiny_unet_folder).network.parameters())
    assert all(size < whole / 2 if host == "swiftbrush" else size >= whole for size in sizes)
    assert open_pipeline(tmp_path / "run" / "student").network is not None


@pytest.mark.slow
def test_a_run_on_prompts_alone(tmp_path, tiny_text_folder):
    (tmp_path / "prompts.txt").write_text("\n".join(f"a {word}" for word in ("one", "two", "three", "four") * 8))
    changes = {
        **SHORT,
        **SWIFTBRUSH,
        "teacher.null_class": None,
        "data": {"name": "prompts", "root": str(tmp_path / "prompts.txt")},
    }
    metrics = run.train(METHOD, config(tiny_text_folder, **changes), tmp_path / "run", quiet=True, cpu=True)
    assert metrics["path/moved"] > 0
    errors = json.loads((tmp_path / "run" / "path" / "index.json").read_text())["errors"]
    assert list(errors) == ["generated"]


# ---------------------------------------------------------------- input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method_args.host": "dmd"}, r"method_args\.host"),
        ({"method_args.path_length": -1}, r"method_args\.path_length"),
        ({"method_args.segment_iterations": 0}, r"method_args\.segment_iterations"),
        ({"method_args.prompt_drop": 1.5}, r"method_args\.prompt_drop"),
        ({"method_args.target": "nothing"}, r"method_args\.target"),
        ({"method_args.segments": 3}, r"did you mean 'segment_iterations'"),
    ],
)
def test_arguments_out_of_range_are_named(changes, message):
    with pytest.raises(InputError, match=message):
        config("x", **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method_args.host_args": {"fake_update": 3}}, r"method_args\.host_args.*did you mean 'fake_updates'"),
        (
            {"method_args.path_length": 5, "method_args.record_iterations": 4},
            r"method_args\.path_length = 5: allowed: up to record_iterations = 4",
        ),
        (
            {"method_args.host": "swiftbrush", "method_args.host_args": {"fake": "noise"}},
            r"method_args\.host_args\.fake = 'noise'",
        ),
    ],
)
def test_what_does_not_fit_is_said_before_anything_trains(tmp_path, tiny_unet_folder, changes, message):
    with pytest.raises(InputError, match=message):
        run.check(METHOD, config(tiny_unet_folder, **changes), tmp_path / "run", cpu=True)


def test_the_exact_teacher_of_a_mixture_cannot_degrade(tmp_path):
    values = {"method": "disback", "teacher": {"world": {"name": "mixture"}}, "data": {"name": "mixture"}}
    values |= {"train": {"steps": 1}, "method_args": {"host_args": {"gan": None}}}
    with pytest.raises(InputError, match=r"cannot be fine-tuned; give path_length: 0"):
        run.check(METHOD, config_of(METHOD, values), tmp_path / "run", cpu=True)


# ---------------------------------------------------------------- the shipped configs


@pytest.mark.parametrize("name", CONFIGS)
def test_shipped_configs_and_their_arms_are_valid(name):
    assert {"small", "paper"} <= set(CONFIGS)
    arms = load_arms(f"disback/{name}")
    assert arms[0].name == "disback"
    assert len(arms) > 1
    for arm in arms:
        if arm.method.key == "disback":
            disback.host_of(arm.config)


@pytest.mark.slow
def test_the_papers_settings_train_on_another_pipeline(tmp_path, tiny_text_folder):
    from PIL import Image

    for subject in ("cat", "dog"):
        (tmp_path / "images" / subject).mkdir(parents=True)
        for index in range(6):
            Image.new("L", (16, 16), 20 * index).save(tmp_path / "images" / subject / f"{index}.png")
    changes = {
        "teacher.pretrained": str(tiny_text_folder),
        "teacher.variant": None,
        "teacher.dtype": "fp32",
        "student.pretrained": str(tiny_text_folder),
        "data.root": str(tmp_path / "images"),
        "data.image_size": 16,
        "data.channels": 1,
        "data.held_out": 0.0,
        "method_args.record_iterations": 10,
        "train.steps": 2,
        "train.precision": "fp32",
        "train.num_workers": 0,
        "evaluation": {"samples": 4, "batch_size": 4, "teacher_steps": [1]},
    }
    values = override(read_yaml(config_folder("disback") / "paper.yaml"), changes)
    metrics = run.train(METHOD, config_of(METHOD, values), tmp_path / "run", quiet=True, cpu=True)
    assert metrics["path/moved"] > 0
    assert len(list((tmp_path / "run" / "path").glob("s_*.safetensors"))) == 11
    assert open_pipeline(tmp_path / "run" / "student").pipe.scheduler.config.num_train_timesteps == 400
