"""TrainStage: the accelerate loop. One process, `accelerate launch` (DDP, FSDP) and resume are one path.

An iteration takes `accumulation` micro-batches; every player whose turn it is sees them in order, minimises the mean
of its loss over them and steps once. Batch sizes in configs are totals over all processes. A run is a function of its
config and seed: `--resume` continues from the newest checkpoint to bit-identical weights (data order and augmentation
as `kdcore.data.seeded_loader` gives them).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import skip_first_batches
from accelerate.utils import (
    broadcast_object_list,
    gather_object,
    send_to_device,
    set_seed,
)
from torch import nn
from torch.utils.data import DataLoader

from kdcore import checkpoint as checkpoints
from kdcore.accelerator import make_accelerator as make_accelerator  # part of this module's interface
from kdcore.config import TrainConfig
from kdcore.data import set_epoch
from kdcore.distiller import Distiller, LossTerms, Player, Progress
from kdcore.ema import EMA
from kdcore.errors import InputError, RunFailed
from kdcore.gradients import rule_backward
from kdcore.monitor import Monitor
from kdcore.optim import make_optimizer, make_schedule
from kdcore.sharding import check_sharding, gathered, make_whole, scattered, scattered_optimizer, whole_weights
from kdcore.stages import Artefacts, RunContext, forget_lines_after, replace_folder, stage_seed
from kdcore.termlog import TermLog


@dataclass
class TrainSetup:
    """What a TrainStage trains. `evaluate` gets the deployed module in eval mode and returns validation metrics."""

    distiller: Distiller
    loader: Iterable[Any]
    evaluate: Callable[[nn.Module], Mapping[str, float]] | None = None


@dataclass
class TrainStage:
    """Trains a Distiller and saves what it deploys as `<run>/<artefact>/` through `save(module, folder)`.

    `build` is called with the generators seeded by (run seed, stage name), so that a stage does not depend on whether
    the stages before it ran or came from a cache.
    """

    name: str
    config: TrainConfig
    build: Callable[[RunContext], TrainSetup]
    save: Callable[[nn.Module, Path], None]
    artefact: str = "student"

    def run(self, context: RunContext) -> Artefacts:
        set_seed(stage_seed(context, self.name))
        loop = Loop(self.name, context, self.build(context), self.config)
        deployed = loop.fit()
        target = context.folder / self.artefact
        if context.is_main:
            replace_folder(target, lambda folder: self.save(deployed, folder))
        context.accelerator.wait_for_everyone()
        return {self.artefact: target}


@dataclass
class Turn:
    """A player with what the loop made for it."""

    player: Player
    optimizer: Any
    schedule: torch.optim.lr_scheduler.LambdaLR
    parameters: list[nn.Parameter]
    ema: EMA | None


class Loop:
    """The training loop of one stage. `fit` runs it to the end and returns the deployed module."""

    def __init__(self, name: str, context: RunContext, setup: TrainSetup, config: TrainConfig):
        self.name, self.context, self.config = name, context, config
        self.accelerator = context.accelerator
        self.distiller, self.evaluate = setup.distiller, setup.evaluate
        self.folder = context.folder / "checkpoints" / name
        self.monitor = Monitor(config)
        self._plan(setup.loader)
        self._prepare(setup)
        self.log = TermLog(context, name, config.log_every)
        self._rng: Any = None
        self.step = self.epoch = self.window = 0
        if context.resume:
            self._resume()
        self.log.attach(self)

    # ------------------------------------------------------------ set-up

    def _plan(self, loader: Iterable[Any]) -> None:
        try:
            batches = len(loader)  # type: ignore[arg-type]
        except TypeError:
            batches = None
        if batches == 0:
            raise InputError("train.batch_size: larger than the training set, so that no batch is left")
        if batches is None and self.config.steps is None:
            raise InputError("train.epochs: the loader has no length; give train.steps as the budget")
        per_epoch = math.ceil(batches / self.config.accumulation) if batches else self.config.steps
        assert per_epoch is not None
        self.steps = self.config.steps or (self.config.epochs or 0) * per_epoch
        self.steps_per_epoch = per_epoch
        epochs = math.ceil(self.steps / per_epoch)
        self.distiller.progress = Progress(epochs=epochs, steps=self.steps)

    def _prepare(self, setup: TrainSetup) -> None:
        accelerator, config = self.accelerator, self.config
        processes = accelerator.num_processes
        batch_size = getattr(setup.loader, "batch_size", None) or config.batch_size
        if batch_size % processes:
            raise InputError(f"train.batch_size = {batch_size}: not divisible by the {processes} processes")
        self.monitor.check(self.name, has_validation=self.evaluate is not None)
        check_sharding(accelerator, self.distiller)
        self.distiller.train()
        if config.compile:
            self.distiller.compile()
        players = self.distiller.players()
        optimizers = [make_optimizer(player, config) for player in players]
        self.loader: Any = accelerator.prepare(setup.loader)
        self.model, *optimizers = accelerator.prepare(self.distiller, *optimizers)
        self.turns = []
        for player, optimizer in zip(players, optimizers, strict=True):
            inner = getattr(optimizer, "optimizer", optimizer)
            ema = player.ema or config.ema
            self.turns.append(
                Turn(
                    player,
                    optimizer,
                    make_schedule(inner, player, config, self.steps, self.steps_per_epoch),
                    [parameter for group in inner.param_groups for parameter in group["params"]],
                    EMA(player.module, ema, config.batch_size * config.accumulation) if ema else None,
                )
            )

    # ------------------------------------------------------------ the loop

    def fit(self) -> nn.Module:
        """Trains to the end of the budget (or of patience) and returns the deployed module in eval mode."""
        with self.log:
            while self.step < self.steps and not self.monitor.out_of_patience:
                self._epoch()
        self._finish()
        return self.distiller.deployed().eval()

    def _epoch(self) -> None:
        self.distiller.progress.epoch = self.epoch
        self.distiller.epoch_start()
        for window in self._windows():
            self.window += 1
            self._iteration(window)
            done = self.step >= self.steps
            if self.step % self.config.checkpoint_every == 0 and not done:
                self._checkpoint()
            if done:
                break
        if self.window == 0:
            raise InputError(
                f"{self.name}: the loader gave no batch in epoch {self.epoch}; it must start anew each time"
            )
        self.distiller.epoch_end()
        self.epoch, self.window = self.epoch + 1, 0
        if self.evaluate is not None and (self.epoch % self.config.eval_every == 0 or self.step >= self.steps):
            self._evaluate()

    def _windows(self) -> Iterator[list[Any]]:
        """Lists of `accumulation` micro-batches; the last of an epoch may be shorter."""
        size, done = self.config.accumulation, self.window
        set_epoch(self.loader, self.epoch)
        loader = self.loader
        resumed = self._rng
        if done:
            loader = self._without(done * size)
        window: list[Any] = []
        for batch in loader:
            if resumed is not None:  # starting a loader may have drawn from the generators
                checkpoints.set_rng_state(resumed)
                resumed = self._rng = None
            window.append(
                batch if isinstance(self.loader, DataLoader) else send_to_device(batch, self.accelerator.device)
            )
            if len(window) == size:
                yield window
                window = []
        if resumed is not None:  # saved after the last micro-batch of its epoch
            checkpoints.set_rng_state(resumed)
            self._rng = None
        if window:
            yield window

    def _without(self, batches: int) -> Iterable[Any]:
        """The loader of the running epoch without its first batches; a DataLoader does not read them."""
        if not isinstance(self.loader, DataLoader):
            return islice(self.loader, batches, None)
        loader = skip_first_batches(self.loader, batches)
        set_epoch(loader, self.epoch)
        return loader

    def _iteration(self, window: list[Any]) -> None:
        for turn in self.turns:
            since = self.step - turn.player.start
            if since >= 0 and since % turn.player.every == 0:
                self._turn(turn, window)
        self.step += 1
        self.distiller.progress.step = self.step
        self.log.step_done(self.step, self.epoch)

    def _turn(self, turn: Turn, window: list[Any]) -> None:
        name = turn.player.name
        with self._only(turn):
            rule = self.distiller.gradient_rule(name)
            if rule is not None:
                rule_backward(self, turn, window, rule)
            else:
                for index, batch in enumerate(window):
                    last = index == len(window) - 1
                    with nullcontext() if last else self.accelerator.no_sync(self.model):
                        terms = self.terms(batch, name)
                        self.accelerator.backward(terms.total() / len(window) if len(window) > 1 else terms.total())
            clip = turn.player.clip or self.config.clip
            if clip is not None:
                self.accelerator.clip_grad_norm_(turn.parameters, clip)
            if turn.player.clip_value is not None:
                # Gradients of fp16 are unscaled once, by the first of the two.
                by_value = self.accelerator.clip_grad_value_ if clip is None else nn.utils.clip_grad_value_
                by_value(turn.parameters, turn.player.clip_value)
            turn.optimizer.step()
            turn.optimizer.zero_grad()
        turn.schedule.step()
        if turn.ema is not None:
            turn.ema.update()

    def terms(self, batch: Any, player: str) -> LossTerms:
        """The forward pass of one micro-batch, logged."""
        terms = LossTerms(self.model(batch, player))
        self.log.record(self.step, player, terms, batch)
        return terms

    def _only(self, turn: Turn) -> ExitStack:
        """With several players, only the active one's parameters collect gradients; the graph through others stays."""
        stack = ExitStack()
        if len(self.turns) > 1:
            own = {id(parameter) for parameter in turn.parameters}
            others = [p for other in self.turns for p in other.parameters if id(p) not in own and p.requires_grad]
            for parameter in others:
                parameter.requires_grad_(False)
            stack.callback(lambda: [parameter.requires_grad_(True) for parameter in others])
        return stack

    # ------------------------------------------------------------ validation and the end

    def _averaged(self) -> ExitStack:
        stack = ExitStack()
        for turn in self.turns:
            if turn.ema is not None:
                stack.enter_context(turn.ema.applied())
        return stack

    def _evaluate(self) -> None:
        self.log.flush()
        assert self.evaluate is not None
        with self._averaged(), torch.no_grad():
            deployed = self.distiller.deployed().eval()
            with whole_weights(self.model):
                metrics = dict(self.evaluate(deployed))
            self.distiller.train()
            self.monitor.judge(metrics, lambda: gathered(deployed.state_dict()))
        self.context.log(kind="eval", stage=self.name, step=self.step, epoch=self.epoch, metrics=metrics)
        self.log.show_metrics(metrics)

    def _check_parameters(self) -> None:
        """A finite loss can have a NaN gradient; the next loss would tell, but a checkpoint may come before it."""
        for turn in self.turns:
            if not all(bool(torch.isfinite(parameter).all()) for parameter in turn.parameters):
                message = f"step {self.step}: player '{turn.player.name}' has non-finite weights after a finite loss"
                raise RunFailed(message, self.last_good())

    def _finish(self) -> None:
        self._check_parameters()
        for turn in self.turns:
            if turn.ema is not None:
                turn.ema.copy_to_module()
        deployed = self.distiller.deployed()
        if self.monitor.best_weights is not None:
            deployed.load_state_dict(scattered(self.monitor.best_weights, deployed.state_dict()))
        make_whole(deployed)
        self.accelerator.wait_for_everyone()

    def last_good(self) -> Path | None:
        return checkpoints.latest(self.folder)

    # ------------------------------------------------------------ checkpoints

    def _checkpoint(self) -> None:
        self.log.flush()  # a non-finite loss must stop the run before it becomes a checkpoint
        self._check_parameters()
        generators = gather_object([checkpoints.rng_state()])
        model, state = gathered(self.distiller.checkpoint_state()), gathered(self._state(generators))
        if self.context.is_main:
            saved = checkpoints.Checkpoint(self.step, model, state, self.monitor.best_weights)
            checkpoints.save(self.folder, saved, keep=self.config.keep_checkpoints)
        self.accelerator.wait_for_everyone()

    def _state(self, generators: list[Any]) -> dict[str, Any]:
        scaler = self.accelerator.scaler
        return {
            "epoch": self.epoch,
            "window": self.window,
            "rng": generators,
            "optimizers": {turn.player.name: turn.optimizer.state_dict() for turn in self.turns},
            "schedules": {turn.player.name: turn.schedule.last_epoch for turn in self.turns},
            "ema": {turn.player.name: turn.ema.state_dict() for turn in self.turns if turn.ema is not None},
            "scaler": scaler.state_dict() if scaler is not None else None,
            "best": self.monitor.best[0] if self.monitor.best is not None else None,
            "bad_evaluations": self.monitor.bad_evaluations,
        }

    def _resume(self) -> None:
        path = broadcast_object_list([checkpoints.latest(self.folder)])[0]
        if path is None:
            forget_lines_after(self.context, self.name, 0, evaluates_again=True)
            return
        saved = checkpoints.load(path)
        state = saved.state
        processes = self.accelerator.num_processes
        if len(state["rng"]) != processes:
            raise InputError(f"checkpoint {path}: written by {len(state['rng'])} processes, resumed with {processes}")
        try:
            self._restore(saved)
        except (KeyError, RuntimeError, ValueError) as error:
            raise InputError(f"checkpoint {path}: of another method, model or config ({error})") from error
        self.step, self.epoch, self.window = saved.step, state["epoch"], state["window"]
        self.distiller.progress.step = self.step
        self._rng = state["rng"][self.accelerator.process_index]
        # The validation at the end of an epoch comes after a checkpoint of the same step, and comes again.
        forget_lines_after(self.context, self.name, saved.step, evaluates_again=True)
        self.context.say(f"{self.name}: resumed at step {self.step} of {self.steps}")

    def _restore(self, saved: checkpoints.Checkpoint) -> None:
        state = saved.state
        self.distiller.load_checkpoint_state(scattered(saved.model, self.distiller.state_dict()))
        for turn in self.turns:
            name = turn.player.name
            turn.optimizer.load_state_dict(scattered_optimizer(state["optimizers"][name], turn.parameters))
            turn.schedule.last_epoch = state["schedules"][name]
            turn.schedule._last_lr = [group["lr"] for group in turn.optimizer.param_groups]
            if turn.ema is not None:
                turn.ema.load_state_dict(scattered(state["ema"][name], turn.ema.shadow))
        if state["scaler"] is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if state["best"] is not None:
            self.monitor.best = (state["best"], dict(saved.best) if saved.best is not None else None)
        self.monitor.bad_evaluations = state["bad_evaluations"]
