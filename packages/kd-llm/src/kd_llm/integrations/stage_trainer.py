"""The DistillTrainer inside a stage: the run's optimiser, data order, log, validation, averages and resume."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from rich.progress import Progress
from torch import nn
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from kd_llm.integrations.stage import LMSetup
from kd_llm.integrations.terms import flat
from kd_llm.integrations.trainer import DistillTrainer
from kdcore.checkpoint import rng_state, set_rng_state
from kdcore.config import TrainConfig
from kdcore.data import seeded_loader, set_epoch
from kdcore.distiller import Player
from kdcore.ema import EMA
from kdcore.errors import InputError
from kdcore.monitor import Monitor
from kdcore.optim import make_optimizer, make_schedule
from kdcore.sharding import whole_weights
from kdcore.stages import RunContext, forget_lines_after, replace_folder
from kdcore.termlog import metrics_text, progress_bar, terms_text, track


class StageTrainer(DistillTrainer):
    """`fit` trains to the end of the budget, from the newest checkpoint where the run is resumed."""

    def __init__(self, args: TrainingArguments, setup: LMSetup, stage: str, config: TrainConfig, context: RunContext):
        self.setup, self.stage, self.config, self.context = setup, stage, config, context
        super().__init__(
            setup.model,
            args,
            objective=setup.objective,
            window_hook=setup.window_hook,
            train_dataset=setup.dataset,
            data_collator=setup.collate,
            processing_class=setup.tokenizer,
            callbacks=[*setup.callbacks, _StageCallback(self)],
        )
        self.remove_callback(PrinterCallback)
        self.player = Player("student", self._all_trained(), param_groups=setup.optimizer)
        samples = config.batch_size * config.accumulation
        if (config.ema or config.restore_best) and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise InputError("train.ema, train.restore_best: not with FSDP or DeepSpeed, which shard the weights")
        self.ema = EMA(self.student, config.ema, samples) if config.ema else None
        self.monitor = Monitor(config)
        self.samples, self.since = 0, time.perf_counter()
        self.bar: Progress | None = None

    def _all_trained(self) -> nn.Module:
        return nn.ModuleDict({"student": self.model, "auxiliary": self.objective.auxiliary})

    def fit(self) -> None:
        """Raises: NonFiniteLoss, RunFailed; InputError for a checkpoint of another run or another data set."""
        path = broadcast_object_list([self.last_good()])[0] if self.context.resume else None
        if path is not None:
            self._check_processes(path)
        with self._progress_bar():
            try:
                self.train(resume_from_checkpoint=None if path is None else str(path))
            except (KeyError, ValueError, RuntimeError) as error:
                if path is not None and "state_dict" in str(error) and not isinstance(error, InputError):
                    raise InputError(f"checkpoint {path}: of another model or config ({error})") from error
                raise
        self._check_weights()
        if self.ema is not None:
            self.ema.copy_to_module()
        if self.monitor.best_weights is not None:
            self.student.load_state_dict(self.monitor.best_weights)

    def _check_processes(self, path: Path) -> None:
        written = max(1, len(list(path.glob("rng_state_*.pth"))))
        if written != self.accelerator.num_processes:
            now = self.accelerator.num_processes
            raise InputError(f"checkpoint {path}: written by {written} processes, resumed with {now}")

    # ------------------------------------------------------------ data, optimiser, schedule

    def get_train_dataloader(self) -> Any:
        if isinstance(self.train_dataset, IterableDataset) or not hasattr(self.train_dataset, "__len__"):
            self.batches_per_epoch = None
            return super().get_train_dataloader()
        if not len(self.train_dataset):
            raise InputError(f"stage '{self.stage}': its training set is empty")
        loader = seeded_loader(
            self.train_dataset,
            self.args.per_device_train_batch_size,
            seed=self.args.seed,
            num_workers=self.args.dataloader_num_workers,
            collate=self.data_collator,
        )
        prepared = self.accelerator.prepare(loader)
        self.batches_per_epoch = len(prepared)
        return prepared

    @property
    def steps_per_epoch(self) -> int:
        if self.batches_per_epoch is None:
            return int(self.args.max_steps)
        return max(1, math.ceil(self.batches_per_epoch / self.args.gradient_accumulation_steps))

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        set_epoch(kwargs["train_dataloader"], kwargs["epoch"])  # Trainer's reaches no sampler behind a shard
        super()._run_epoch(*args, **kwargs)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            player = self.player
            if model is not None and model is not self.model:
                player = Player("student", model, param_groups=self.setup.optimizer)
            self.optimizer = make_optimizer(player, self.config)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.lr_scheduler is None:
            inner = optimizer or self.optimizer
            inner = getattr(inner, "optimizer", inner)
            self.lr_scheduler = make_schedule(inner, self.player, self.config, num_training_steps, self.steps_per_epoch)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _get_grad_norm(self, model, grad_norm=None):
        return grad_norm  # measured where it is clipped, and not for the log alone

    def floating_point_ops(self, inputs: Mapping[str, Any]) -> int:
        return 0  # not shown, and a count over all parameters in every micro-batch

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None) -> Any:
        self.samples += len(inputs["input_ids"]) * self.accelerator.num_processes
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    # ------------------------------------------------------------ log

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and "learning_rate" in logs:
            logs.update(flat(self.write_line()))
        Trainer.log(self, logs, start_time)

    def write_line(self) -> dict[str, dict[str, float]]:
        """The line of metrics.jsonl for the steps since the last one. Raises NonFiniteLoss."""
        terms = self.meter.means()
        if not terms:
            return {}
        step, seconds = self.state.global_step, max(1e-9, time.perf_counter() - self.since)
        record = {
            "kind": "train",
            "stage": self.stage,
            "player": "student",
            "step": step,
            "epoch": (step - 1) // self.steps_per_epoch,
            "terms": terms,
            "total": sum(term["weighted"] for term in terms.values()),
            "lr": self.optimizer.param_groups[0]["lr"],
            "samples_per_second": round(self.samples / seconds, 1),
        }
        if hasattr(self.window_hook, "statistics"):
            record.update(self.window_hook.statistics())
        self.samples, self.since = 0, time.perf_counter()
        self.context.log(**record)
        track(self.context, record)
        if self.bar is not None:
            self.bar.update(self._task, completed=step, total=self.state.max_steps, terms=terms_text(terms))
        return terms

    def _progress_bar(self) -> Any:
        if self.context.quiet or not self.context.is_main:
            return nullcontext()
        self.bar, self._task = progress_bar(self.stage)
        return self.bar

    # ------------------------------------------------------------ validation

    def validate(self) -> bool:
        """Runs the set-up's eval and writes its line; False where patience has run out."""
        assert self.setup.eval is not None
        self.write_line()
        kept, student = rng_state(), self.student
        with ExitStack() as stack:
            stack.callback(set_rng_state, kept)
            stack.enter_context(torch.no_grad())
            if self.ema is not None:
                stack.enter_context(self.ema.applied())
            stack.enter_context(whole_weights(self.model_wrapped))
            stack.callback(student.train)
            metrics = dict(self.setup.eval(student.eval()))
            self.monitor.judge(metrics, student.state_dict)
        step = self.state.global_step
        epoch = math.ceil(step / self.steps_per_epoch)
        self.context.log(kind="eval", stage=self.stage, step=step, epoch=epoch, metrics=metrics)
        if self.bar is not None:
            self.bar.console.print(metrics_text(self.stage, epoch, metrics))
        return not self.monitor.out_of_patience

    # ------------------------------------------------------------ checkpoints and the end

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.write_line()  # a non-finite loss must stop the run before it becomes a checkpoint
        super()._save_checkpoint(model, trial)

    def more_state(self) -> dict[str, Any]:
        return {
            "ema": None if self.ema is None else self.ema.state_dict(),
            "best": None if self.monitor.best is None else list(self.monitor.best),
            "bad_evaluations": self.monitor.bad_evaluations,
        }

    def load_more_state(self, state: Mapping[str, Any]) -> None:
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        self.monitor.best = None if state["best"] is None else (state["best"][0], state["best"][1])
        self.monitor.bad_evaluations = state["bad_evaluations"]

    def save_student(self, target: Path) -> None:
        """The student alone, with its tokenizer; collective under FSDP."""
        wrapped, student = self.model_wrapped, self.student
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        state = self.accelerator.get_state_dict(wrapped) if sharded else None
        if not self.context.is_main:
            return
        student = self.accelerator.unwrap_model(student, keep_fp32_wrapper=False)
        if hasattr(student, "merge_and_unload") and self.setup.merge and not sharded:
            student = student.merge_and_unload()

        def write(folder: Path) -> None:
            student.save_pretrained(folder, state_dict=state)
            if self.setup.tokenizer is not None:
                self.setup.tokenizer.save_pretrained(folder)

        replace_folder(target, write)


class _StageCallback(TrainerCallback):
    def __init__(self, trainer: StageTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        trainer = self.trainer
        if trainer.context.resume:
            forget_lines_after(trainer.context, trainer.stage, state.global_step, evaluates_again=False)
            if state.global_step:
                trainer.context.say(f"{trainer.stage}: resumed at step {state.global_step} of {state.max_steps}")
        trainer.since = time.perf_counter()
        if trainer.bar is not None:
            trainer.bar.update(trainer._task, completed=state.global_step, total=state.max_steps)

    def on_step_end(self, args, state, control, **kwargs):
        trainer, done = self.trainer, state.global_step >= state.max_steps
        if trainer.ema is not None:
            trainer.ema.update()
        if trainer.setup.eval is not None:
            epoch, rest = divmod(state.global_step, trainer.steps_per_epoch)
            due = rest == 0 and epoch % trainer.config.eval_every == 0
            if (due or done) and not trainer.validate():
                control.should_training_stop = True
        if done or control.should_training_stop:
            control.should_save = False  # the student itself is what is left
            control.should_log = True
        return control
