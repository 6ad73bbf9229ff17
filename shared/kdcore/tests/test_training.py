"""The training loop on problems small enough to be repeated in plain torch."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState, GradientState
from accelerate.tracking import GeneralTracker
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import kdcore.accelerator
from kdcore import checkpoint as checkpoints
from kdcore.config import EMAConfig, OptimizerConfig, RunConfig, TrainConfig
from kdcore.data import seeded_loader
from kdcore.distiller import Distiller, LossTerms, Player
from kdcore.errors import InputError, NonFiniteLoss, RunFailed
from kdcore.stages import RunContext, run_stages
from kdcore.training import Loop, TrainSetup, TrainStage, make_accelerator

SGD = {"name": "sgd", "lr": 0.1, "momentum": 0.0}


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def points(size: int = 12, inputs: int = 3) -> TensorDataset:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(size, inputs, generator=generator, dtype=torch.float64)
    return TensorDataset(x, x.sum(1, keepdim=True) + 0.1 * torch.randn(size, 1, generator=generator).double())


class Regression(Distiller):
    """Least squares of a linear student in float64. `hook(distiller, player, terms)` may change the terms."""

    def __init__(self, hook=None, players=None, inputs: int = 3):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.student = nn.Linear(inputs, 1).double()
        self.hook, self.made = hook, players

    def players(self) -> list[Player]:
        return self.made(self) if self.made else super().players()

    def loss(self, batch, player: str = "student") -> LossTerms:
        x, y = batch
        terms = LossTerms(mse=(1.0, F.mse_loss(self.student(x), y)))
        if self.hook is not None:
            self.hook(self, player, terms)
        return terms


def make_loop(
    folder: Path, distiller: Distiller, *, loader=None, evaluate=None, resume=False, size=12, **train
) -> Loop:
    config = TrainConfig(**{"batch_size": 2, "optimizer": SGD, **train})
    folder.mkdir(exist_ok=True)
    accelerator = make_accelerator(config, cpu=True, folder=folder)
    context = RunContext(RunConfig(method="test", train=config), folder, accelerator, resume=resume, quiet=True)
    loader = seeded_loader(points(size), config.batch_size, seed=3) if loader is None else loader
    return Loop("student", context, TrainSetup(distiller, loader, evaluate), config)


def fit(folder: Path, distiller: Distiller, **options) -> Loop:
    loop = make_loop(folder, distiller, **options)
    loop.fit()
    return loop


def weights(distiller: Distiller) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in distiller.student.parameters()])


def lines(folder: Path, kind: str = "train") -> list[dict]:
    read = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in read if line["kind"] == kind]


def steps_saved(folder: Path) -> list[int]:
    return [
        int(path.name.removeprefix("step-")) for path in checkpoints.checkpoints(folder / "checkpoints" / "student")
    ]


# ---------------------------------------------------------------- accumulation


def test_accumulation_equals_one_big_batch(tmp_path):
    small, big = Regression(), Regression()
    fit(tmp_path / "a", small, batch_size=2, accumulation=3, epochs=3, size=12)
    fit(tmp_path / "b", big, batch_size=6, epochs=3, size=12)
    torch.testing.assert_close(weights(small), weights(big), rtol=1e-12, atol=1e-12)
    assert not torch.equal(weights(big), weights(Regression()))


def test_the_last_shorter_window_is_averaged_over_its_own_length(tmp_path):
    distiller, plain = Regression(), Regression()
    loader = DataLoader(points(10), batch_size=2)  # 5 micro-batches: windows of 2, 2 and 1
    loop = fit(tmp_path, distiller, loader=loader, accumulation=2, epochs=1)
    assert (loop.steps, loop.step) == (3, 3)
    optimizer = torch.optim.SGD(plain.student.parameters(), lr=0.1)
    for window in ([0, 1], [2, 3], [4]):
        optimizer.zero_grad()
        for index in window:
            batch = points(10)[2 * index : 2 * index + 2]
            (plain.loss(batch).total() / len(window)).backward()
        optimizer.step()
    torch.testing.assert_close(weights(distiller), weights(plain), rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------- budget and loaders


def test_steps_take_precedence_over_epochs(tmp_path):
    loop = fit(tmp_path, Regression(), epochs=5, steps=8)  # 6 steps an epoch
    assert (loop.step, loop.epoch, loop.distiller.progress.epochs) == (8, 2, 2)
    assert loop.distiller.progress.fraction == 1.0


def test_epochs_are_passes_over_the_loader(tmp_path):
    assert fit(tmp_path, Regression(), epochs=2).step == 12


def test_a_batch_larger_than_the_data_is_refused(tmp_path):
    loader = seeded_loader(points(12), 16, drop_last=True)
    with pytest.raises(InputError, match=r"train\.batch_size: larger than the training set"):
        make_loop(tmp_path, Regression(), loader=loader, batch_size=16, epochs=1)


class Stream:
    """Batches without a length, the same ones every time."""

    def __init__(self, size: int = 6):
        self.batches = [points()[2 * i : 2 * i + 2] for i in range(size)]

    def __iter__(self):
        return iter(self.batches)


def test_a_loader_without_length_needs_steps(tmp_path):
    with pytest.raises(InputError, match=r"train\.epochs: the loader has no length; give train\.steps"):
        make_loop(tmp_path, Regression(), loader=Stream(), epochs=1)
    assert fit(tmp_path, Regression(), loader=Stream(), steps=8).epoch == 2


@pytest.mark.parametrize(("loader", "epoch"), [(Stream(0), 0), (iter(Stream(3)), 1)], ids=["empty", "used up"])
def test_a_loader_that_gives_nothing_does_not_hang(tmp_path, loader, epoch):
    with pytest.raises(InputError, match=f"student: the loader gave no batch in epoch {epoch}"):
        fit(tmp_path, Regression(), loader=loader, steps=8)


# ---------------------------------------------------------------- clip, moving average


@pytest.mark.parametrize(
    ("run_clip", "player_clip", "norm"), [(0.25, None, 0.25), (0.25, 0.125, 0.125), (1e9, None, None)]
)
def test_clip_bounds_the_norm_of_a_players_gradient(tmp_path, run_clip, player_clip, norm):
    start = weights(Regression())
    distiller = Regression(players=lambda d: [Player("student", d, clip=player_clip)])
    fit(tmp_path, distiller, steps=1, clip=run_clip, optimizer={**SGD, "lr": 1.0})
    moved = (weights(distiller) - start).norm().item()
    if norm is None:  # far above the gradient's norm: not touched
        free = Regression()
        fit(tmp_path / "free", free, steps=1, optimizer={**SGD, "lr": 1.0})
        assert moved == (weights(free) - start).norm().item() > 0.25
    else:
        assert moved == pytest.approx(norm, rel=1e-5)  # torch divides by the norm + 1e-6


def test_what_ships_and_what_is_validated_is_the_moving_average(tmp_path):
    path, seen = [], []

    def remember(distiller, player, terms):
        path.append(weights(distiller))

    def evaluate(module):
        seen.append((torch.cat([p.flatten() for p in module.parameters()]).clone(), module.training))
        return {"x": 0.0}

    distiller = Regression(hook=remember)
    fit(tmp_path, distiller, epochs=1, ema={"decay": 0.75, "warmup": False}, evaluate=evaluate)
    raw = Regression()
    fit(tmp_path / "raw", raw, epochs=1)
    average = path[0]
    for w in [*path[1:], weights(raw)]:  # the path holds the weights before each of the 6 steps
        average = 0.75 * average + 0.25 * w
    torch.testing.assert_close(weights(distiller), average, rtol=1e-12, atol=1e-12)
    assert torch.equal(seen[0][0], weights(distiller))
    assert seen[0][1] is False


# ---------------------------------------------------------------- validation


def scripted(values, taken):
    """A validation that gives the values in order and keeps the weights it saw."""

    def evaluate(module):
        taken.append(torch.cat([p.detach().flatten() for p in module.parameters()]).clone())
        return {"score": values[len(taken) - 1], "other": 0.0}

    return evaluate


@pytest.mark.parametrize(
    ("mode", "values", "stops", "best"),
    [
        ("max", [1.0, 3.0, 2.0, 3.0, 9.0], 4, 2),  # an equal score is no improvement
        ("min", [1.0, 3.0, 0.5, 2.0, 2.0, 9.0], 5, 3),
        ("max", [math.nan, 3.0, math.nan, 2.0, 9.0], 4, 2),
        ("max", [math.nan, math.nan, 9.0], 2, None),
    ],
)
def test_patience_stops_and_restore_best_ends_with_the_best_weights(tmp_path, mode, values, stops, best):
    taken = []
    distiller = Regression()
    options = {"monitor": "score", "mode": mode, "patience": 2, "restore_best": True}
    loop = fit(tmp_path, distiller, epochs=9, evaluate=scripted(values, taken), **options)
    assert loop.epoch == len(taken) == stops
    assert torch.equal(weights(distiller), taken[(best or stops) - 1])
    assert len(lines(tmp_path, "eval")) == stops


def test_without_restore_best_the_last_weights_stay(tmp_path):
    taken = []
    distiller = Regression()
    fit(tmp_path, distiller, epochs=3, evaluate=scripted([3.0, 2.0, 1.0], taken), monitor="score")
    assert torch.equal(weights(distiller), taken[2])


def test_eval_every_counts_epochs_and_the_end_is_always_validated(tmp_path):
    taken = []
    fit(tmp_path, Regression(), epochs=5, eval_every=2, evaluate=scripted([0.0] * 5, taken))
    assert [line["epoch"] for line in lines(tmp_path, "eval")] == [2, 4, 5]


def test_a_monitor_that_does_not_exist_is_refused_with_the_names(tmp_path):
    with pytest.raises(InputError, match=r"train\.monitor = 'scor': validation gives other, score"):
        fit(tmp_path, Regression(), epochs=1, evaluate=scripted([1.0], []), monitor="scor")
    with pytest.raises(InputError, match=r"train\.monitor = 'score': stage 'student' has no validation"):
        make_loop(tmp_path, Regression(), epochs=1, monitor="score")


def test_training_mode_comes_back_after_validation(tmp_path):
    modes = []
    distiller = Regression(hook=lambda d, player, terms: modes.append(d.student.training))
    fit(tmp_path, distiller, epochs=2, evaluate=lambda module: {"x": 0.0})
    assert modes == [True] * 12
    assert not distiller.student.training  # what ships


# ---------------------------------------------------------------- what is not finite


def test_a_nan_loss_stops_the_run_before_it_becomes_a_checkpoint(tmp_path):
    def extra(distiller, player, terms, at=None):
        factor = math.nan if distiller.progress.step == at else 1.0
        terms["extra"] = (0.5, factor * terms["mse"][1])

    poison = partial(extra, at=7)
    with pytest.raises(NonFiniteLoss, match=r"step 7: loss term 'extra' of player 'student' is nan") as caught:
        fit(tmp_path, Regression(hook=poison), epochs=3, checkpoint_every=3, log_every=100)
    error = caught.value
    assert (error.step, error.term, error.player) == (7, "extra", "student")
    assert steps_saved(tmp_path) == [3, 6]
    assert error.checkpoint is not None
    assert error.checkpoint.name == "step-00000006"
    good = checkpoints.load(error.checkpoint)
    assert all(torch.isfinite(value).all() for value in good.model.values())
    healthy = Regression(hook=extra)
    fit(tmp_path, healthy, epochs=3, resume=True)  # goes on from it
    whole = Regression(hook=extra)
    fit(tmp_path / "whole", whole, epochs=3)
    assert torch.equal(weights(healthy), weights(whole))


def test_a_nan_gradient_of_a_finite_loss_does_not_become_a_checkpoint(tmp_path):
    def poison(distiller, player, terms):
        if distiller.progress.step == 5:
            w = distiller.student.weight
            terms["root"] = (1.0, (w - w).square().sum().sqrt())  # 0, and its gradient 0 / 0

    with pytest.raises(RunFailed, match="step 6: player 'student' has non-finite weights") as caught:
        fit(tmp_path, Regression(hook=poison), epochs=2, checkpoint_every=3)
    assert steps_saved(tmp_path) == [3]
    assert caught.value.checkpoint is not None
    assert caught.value.checkpoint.name == "step-00000003"


# ---------------------------------------------------------------- several players


class Pair(Distiller):
    """A student and a critic; each turn notes who may collect gradients, and the weights it starts from."""

    def __init__(self, every: int):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(2)
            self.student, self.critic = nn.Linear(3, 1).double(), nn.Linear(1, 1).double()
        self.every, self.turns = every, []

    def players(self):
        return [Player("critic", self.critic), Player("student", self.student, every=self.every)]

    def loss(self, batch, player: str = "student") -> LossTerms:
        own, other = (self.critic, self.student) if player == "critic" else (self.student, self.critic)
        assert all(p.requires_grad for p in own.parameters())
        assert not any(p.requires_grad for p in other.parameters())
        assert all(p.grad is None for p in self.parameters())
        self.turns.append((self.progress.step, player, self.student.weight.clone(), self.critic.weight.clone()))
        value = self.critic(self.student(batch[0])).mean()
        return LossTerms(score=(1.0, -value if player == "student" else value + self.critic.weight.square().sum()))


def test_players_take_turns_and_leave_each_other_alone(tmp_path):
    pair = Pair(every=3)
    fit(tmp_path, pair, steps=7, log_every=1)
    assert [(step, who) for step, who, *_ in pair.turns if who == "student"] == [
        (0, "student"),
        (3, "student"),
        (6, "student"),
    ]
    assert [step for step, who, *_ in pair.turns if who == "critic"] == list(range(7))
    after = [*pair.turns[1:], (7, None, pair.student.weight.detach(), pair.critic.weight.detach())]
    for (_, who, student, critic), (_, _, next_student, next_critic) in zip(pair.turns, after, strict=True):
        assert torch.equal(student, next_student) == (who == "critic")
        assert torch.equal(critic, next_critic) == (who == "student")
    assert all(p.requires_grad and p.grad is None for p in pair.parameters())
    assert {line["player"] for line in lines(tmp_path)} == {"critic", "student"}


def test_a_gradient_flows_through_the_other_player(tmp_path):
    pair = Pair(every=1)
    start, through = pair.student.weight.clone(), pair.critic.weight.clone()
    fit(tmp_path, pair, steps=1, loader=DataLoader(points(2), batch_size=2))
    critic = pair.turns[1][3]  # the critic has stepped before the student's turn
    assert not torch.equal(critic, through)
    expected = start + 0.1 * critic * points(2).tensors[0].mean(0)
    torch.testing.assert_close(pair.student.weight.detach(), expected.detach(), rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------- precision, compile


class Classifier(Distiller):
    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.student = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
        self.types = set()

    def loss(self, batch, player: str = "student") -> LossTerms:
        output = self.student(batch[0].float())
        self.types.add(output.dtype)
        return LossTerms(mse=(1.0, F.mse_loss(output.float(), batch[1].float())))


def test_bf16_autocast_runs_with_float32_weights(tmp_path):
    low, high = Classifier(), Classifier()
    fit(tmp_path / "low", low, epochs=3, precision="bf16", log_every=6)
    AcceleratorState._reset_state(reset_partial_state=True)
    fit(tmp_path / "high", high, epochs=3, log_every=6)
    assert low.types == {torch.bfloat16}
    assert high.types == {torch.float32}
    assert all(p.dtype == torch.float32 for p in low.student.parameters())
    ends = [lines(tmp_path / name)[-1]["total"] for name in ("low", "high")]
    assert ends[0] == pytest.approx(ends[1], rel=0.05)  # bf16 keeps 8 bits
    assert ends[0] != ends[1]


@pytest.mark.slow
def test_compile_gives_the_same_losses(tmp_path):
    class Quiet(Classifier):
        def loss(self, batch, player="student"):
            return LossTerms(mse=(1.0, F.mse_loss(self.student(batch[0].float()), batch[1].float())))

    plain, compiled = Quiet(), Quiet()
    fit(tmp_path / "plain", plain, steps=6, log_every=1)
    loop = fit(tmp_path / "compiled", compiled, steps=6, log_every=1, compile=True)
    assert loop.distiller._compiled_call_impl is not None
    losses = [[line["total"] for line in lines(tmp_path / name)] for name in ("plain", "compiled")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert compiled.state_dict().keys() == plain.state_dict().keys()


# ---------------------------------------------------------------- checkpoints and resume


def test_checkpoints_come_every_n_steps_and_the_newest_are_kept(tmp_path):
    fit(tmp_path, Regression(), epochs=2, checkpoint_every=3, keep_checkpoints=2)  # after 3, 6 and 9 of 12 steps
    assert steps_saved(tmp_path) == [6, 9]


RUNS = ("whole", "cut")


class Cut(Exception):
    pass


def cut_at(step):
    def hook(distiller, player, terms):
        if distiller.progress.step == step:
            raise Cut

    return hook


@pytest.mark.parametrize("loader", ["DataLoader", "plain iterable"])
@pytest.mark.parametrize("step", [4, 6, 7, 8])  # 3 steps an epoch, a checkpoint every 2
def test_a_resumed_run_ends_where_a_whole_one_does(tmp_path, step, loader):
    def options():
        return {
            "epochs": 3,
            "loader": None if loader == "DataLoader" else [points()[i : i + 2] for i in range(0, 12, 2)],
            "accumulation": 2,
            "checkpoint_every": 2,
            "log_every": 2,
            "optimizer": {"name": "adamw", "lr": 0.05},
            "schedule": {"name": "cosine", "warmup_epochs": 1},
            "ema": {"decay": 0.9},
            "evaluate": lambda module: {"score": float(module.bias.detach())},
            "monitor": "score",
            "restore_best": True,
        }

    whole = Regression()
    fit(tmp_path / "whole", whole, **options())
    with pytest.raises(Cut):
        fit(tmp_path / "cut", Regression(hook=cut_at(step)), **options())
    resumed = Regression()
    fit(tmp_path / "cut", resumed, resume=True, **options())
    assert torch.equal(weights(resumed), weights(whole))
    for kind in ("train", "eval"):
        logged = [[{**line, "time": 0, "samples_per_second": 0} for line in lines(tmp_path / n, kind)] for n in RUNS]
        assert logged[0] == logged[1]


def test_a_line_that_a_kill_cut_off_is_dropped_on_resume(tmp_path):
    with pytest.raises(Cut):
        fit(tmp_path, Regression(hook=cut_at(5)), epochs=1, checkpoint_every=3, log_every=1)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5]
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "sta')
    fit(tmp_path, Regression(), epochs=1, resume=True, log_every=1)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_without_resume_old_checkpoints_are_not_read(tmp_path):
    with pytest.raises(Cut):
        fit(tmp_path, Regression(hook=cut_at(5)), epochs=1, checkpoint_every=3)
    assert make_loop(tmp_path, Regression(), epochs=1).step == 0
    assert make_loop(tmp_path, Regression(), epochs=1, resume=True).step == 3


class Other(Regression):
    def __init__(self):
        super().__init__()
        self.auxiliary = nn.Linear(1, 1)


def split(distiller):
    return [{"params": [parameter]} for parameter in distiller.parameters()]


@pytest.mark.parametrize(
    "other",
    [
        lambda: Other(),
        lambda: Regression(inputs=4),
        lambda: Regression(players=lambda d: [Player("teacher", d)]),
        lambda: Regression(players=lambda d: [Player("student", d, ema=EMAConfig())]),
        lambda: Regression(players=lambda d: [Player("student", d, param_groups=split(d))]),
    ],
    ids=["method", "model", "players", "average", "parameter groups"],
)  # fmt: skip
def test_a_foreign_checkpoint_is_bad_input(tmp_path, other):
    fit(tmp_path, Regression(), epochs=1, checkpoint_every=3)
    with pytest.raises(InputError, match=r"checkpoint .*step-00000003: of another method, model or config"):
        make_loop(tmp_path, other(), epochs=1, resume=True)


def test_a_checkpoint_of_another_number_of_processes_is_refused(tmp_path):
    fit(tmp_path, Regression(), epochs=1, checkpoint_every=3)
    folder = tmp_path / "checkpoints" / "student"
    saved = checkpoints.load(checkpoints.latest(folder))
    saved.state["rng"] = saved.state["rng"] * 2
    checkpoints.save(folder, saved)
    with pytest.raises(InputError, match="written by 2 processes, resumed with 1"):
        make_loop(tmp_path, Regression(), epochs=1, resume=True)


# ---------------------------------------------------------------- the log


def test_a_line_holds_the_means_of_raw_and_weighted_terms_since_the_last(tmp_path):
    losses = []

    def add(distiller, player, terms):
        terms["kd"] = (0.5 if distiller.progress.step < 4 else 0.25, 2 * terms["mse"][1])
        losses.append(terms["mse"][1].item())

    fit(tmp_path, Regression(hook=add), epochs=1, log_every=3)
    first, second, third = lines(tmp_path)  # a changed weight starts a new line after 4 steps
    assert [line["step"] for line in (first, second, third)] == [3, 4, 6]
    mean = sum(losses[:3]) / 3
    assert first["terms"]["mse"] == pytest.approx({"raw": mean, "weighted": mean}, rel=1e-6)
    assert first["terms"]["kd"] == pytest.approx({"raw": 2 * mean, "weighted": mean}, rel=1e-6)
    assert first["total"] == pytest.approx(2 * mean, rel=1e-6)
    assert third["terms"]["kd"]["weighted"] == pytest.approx(0.5 * sum(losses[4:]) / 2, rel=1e-6)
    assert first["samples_per_second"] > 0


def test_the_logged_rate_follows_the_schedule_by_epoch(tmp_path):
    schedule = {"name": "multistep", "milestones": [1, 2], "gamma": 0.5, "unit": "epoch"}
    fit(tmp_path, Regression(), epochs=3, log_every=1, schedule=schedule)
    # A line is written after the step and the schedule's: its rate is that of the next step.
    assert [line["lr"] for line in lines(tmp_path)] == pytest.approx([0.1] * 5 + [0.05] * 6 + [0.025] * 7)


class Recorder(GeneralTracker):
    name, requires_logging_directory = "recorder", False

    def __init__(self):
        super().__init__()
        self.records = []

    @property
    def tracker(self):
        return self.records

    def store_init_configuration(self, values):
        raise NotImplementedError

    def log(self, values, step=None, **_):
        self.records.append((step, values))


def test_trackers_get_the_raw_terms_and_the_rate(tmp_path):
    loop = make_loop(tmp_path, Regression(), epochs=1, log_every=3)
    recorder = Recorder()
    loop.accelerator.trackers = [recorder]
    loop.fit()
    written = [(line["step"], line["terms"]["mse"]["raw"]) for line in lines(tmp_path)]
    assert [(step, values["student/student/mse"]) for step, values in recorder.records] == written
    assert all(values["student/student/lr"] == 0.1 for _, values in recorder.records)


# ---------------------------------------------------------------- the accelerator


@pytest.mark.parametrize(("tracker", "package"), [("tensorboard", "tensorboard or tensorboardX"), ("wandb", "wandb")])
def test_a_tracker_whose_package_is_missing_is_named(monkeypatch, tracker, package):
    monkeypatch.setattr(kdcore.accelerator.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=f"train.trackers: '{tracker}' needs the package {package}: not installed"):
        make_accelerator(TrainConfig(epochs=1, trackers=[tracker]), cpu=True)


def test_fp16_without_an_accelerator_is_refused():
    with pytest.raises(InputError, match=r"train\.precision = 'fp16': needs an accelerator"):
        make_accelerator(TrainConfig(epochs=1, precision="fp16"), cpu=True)


@pytest.mark.parametrize("name", ["DEEPSPEED", "MEGATRON_LM"])
def test_launchers_that_are_not_supported_are_refused(monkeypatch, name):
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(InputError, match=f"{name} is not supported, allowed: DDP and FSDP"):
        make_accelerator(TrainConfig(epochs=1), cpu=True)


def test_processes_that_did_not_find_each_other_are_refused(monkeypatch):
    class Alone:
        num_processes = 1

        def __init__(self, **_):
            pass

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(kdcore.accelerator, "Accelerator", Alone)
    with pytest.raises(InputError, match="WORLD_SIZE = 2: the processes did not find each other"):
        make_accelerator(TrainConfig(epochs=1), cpu=True)


# ---------------------------------------------------------------- the stage


def test_a_stage_is_seeded_by_its_name_and_saves_what_is_deployed(tmp_path):
    drawn = []

    def build(context):
        drawn.append(torch.rand(1).item())
        return TrainSetup(Regression(), seeded_loader(points(), 2))

    def save(module, folder):
        assert not module.training
        torch.save(module.state_dict(), folder / "weights.pt")

    config = TrainConfig(epochs=1, batch_size=2, optimizer=OptimizerConfig(**SGD))
    for index, name in enumerate(["a", "a", "b"]):
        folder = tmp_path / str(index)
        folder.mkdir()
        context = RunContext(RunConfig(method="x", seed=4), folder, make_accelerator(config, cpu=True), quiet=True)
        torch.manual_seed(index)  # what ran before does not matter
        artefacts = run_stages([TrainStage(name, config, build, save)], context)
        assert artefacts == {"student": folder / "student"}
        assert [path.name for path in (folder / "student").iterdir()] == ["weights.pt"]
        assert not list(folder.glob(".student*"))
        assert list(json.loads((folder / "stages.json").read_text())) == [name]
        count = len(drawn)
        run_stages([TrainStage(name, config, build, save)], context)
        assert len(drawn) == count  # finished before
    assert drawn[0] == drawn[1] != drawn[2]


# ---------------------------------------------------------------- when a player acts, and how far it steps


def test_a_player_acts_on_every_nth_iteration_from_its_start_on(tmp_path):
    acted = []

    def hook(distiller, player, terms):
        acted.append((distiller.progress.step, player))

    def players(distiller):
        return [Player("late", distiller.student, start=3, every=2), Player("always", distiller.student)]

    fit(tmp_path, Regression(hook=hook, players=players), steps=8, size=16)
    assert [step for step, player in acted if player == "late"] == [3, 5, 7]
    assert [step for step, player in acted if player == "always"] == list(range(8))


@pytest.mark.parametrize("clip", [None, 1e6])
def test_clip_value_bounds_every_entry_of_the_gradient(tmp_path, clip):
    def players(distiller):
        return [Player("student", distiller.student, clip=clip, clip_value=0.01)]

    distiller, plain = Regression(players=players), Regression()
    before, loader = weights(distiller), DataLoader(points(2), batch_size=2)
    fit(tmp_path, distiller, loader=loader, steps=1)
    plain.loss(points(2)[:]).total().backward()
    gradient = torch.cat([p.grad.flatten() for p in plain.student.parameters()])
    assert bool((gradient.abs() > 0.01).any())
    torch.testing.assert_close(weights(distiller), before - 0.1 * gradient.clamp(-0.01, 0.01), rtol=1e-12, atol=1e-12)


def test_a_half_life_counts_the_samples_of_a_whole_step(tmp_path):
    ema = EMAConfig(kind="halflife", halflife=12, ramp=None)
    distiller, seen = Regression(), []
    distiller.hook = lambda d, player, terms: seen.append(weights(d))
    fit(tmp_path, distiller, ema=ema, steps=1, accumulation=3, batch_size=2)
    plain = Regression()
    fit(tmp_path / "plain", plain, steps=1, accumulation=3, batch_size=2)
    expected = seen[0].lerp(weights(plain), 1 - 0.5 ** (6 / 12))
    torch.testing.assert_close(weights(distiller), expected, rtol=1e-12, atol=1e-12)
