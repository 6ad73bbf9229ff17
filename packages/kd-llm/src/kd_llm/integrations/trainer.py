"""DistillTrainer: transformers' Trainer that minimises an `Objective`. Same arguments, callbacks, resume, launchers.

    trainer = DistillTrainer(student, TrainingArguments(...), teacher=teacher, train_dataset=..., data_collator=...)
    trainer.train()

The student is the Trainer's model, plain or peft; what is saved is the student alone. The loss is normalised over the
whole optimiser step and all processes, so that 1 x 8, 2 x 4 and 4 x 2 micro-batches of the same examples have the same
gradient. Modules of `objective.auxiliary` are trained too; they are in `objective.pt` of a checkpoint, nowhere else.

A checkpoint `checkpoint-N` is written under another name and renamed, with the SHA-256 of its files: it is whole or
absent. A loss term that is not finite ends the training with NonFiniteLoss before it can become a checkpoint.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint, rotate_checkpoints

from kd_llm.engine.heads import instance_forward
from kd_llm.engine.objective import DivergenceArgs, Objective, StudentCall, TokenObjective
from kd_llm.engine.rows import EXTRA, model_inputs
from kd_llm.engine.teachers import LocalTeacher, TeacherSource
from kd_llm.integrations.terms import TermMeter, flat
from kdcore.checkpoint import check, rng_state, set_rng_state, sha256, sync, trainer_checkpoints
from kdcore.distiller import LossTerms
from kdcore.errors import InputError, RunFailed

OBJECTIVE_FILE, MANIFEST = "objective.pt", "manifest.json"
WindowHook = Callable[[nn.Module, Sequence[Mapping[str, Any]], int], Sequence[Mapping[str, Any]]]


class DistillTrainer(Trainer):
    """See the module. Arguments beyond Trainer's:

    objective: what is minimised; None makes a `TokenObjective` of `teacher` and `distill`.
    teacher: a model (it is frozen) or a `TeacherSource`. distill: the divergence; forward KL by default.
    teacher_processing_class: the teacher's tokenizer, needed where the vocabularies have different sizes; it is
        compared with `processing_class`, the student's.
    window_hook: (student, micro-batches, step) -> micro-batches, before the tokens of an optimiser step are counted;
        on-policy responses come in here. Its `statistics()`, if it has that method, is logged beside the terms.
    Raises: InputError for a teacher that does not fit the student, and for launchers this cannot run under.
    """

    loss_is_scaled_for_ga = True  # normalised over the step by `items`

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TrainingArguments | None = None,
        *positional: Any,
        objective: Objective | None = None,
        teacher: nn.Module | TeacherSource | None = None,
        distill: DivergenceArgs | None = None,
        teacher_processing_class: Any = None,
        window_hook: WindowHook | None = None,
        **kwargs: Any,
    ):
        if kwargs.get("compute_loss_func") is not None or (args is not None and args.label_smoothing_factor):
            raise InputError("compute_loss_func, label_smoothing_factor: the objective is the loss; leave them out")
        if args is not None and args.torch_compile:
            raise InputError("torch_compile: the forward is the objective's; compile the body, model.model.compile()")
        super().__init__(model, args, *positional, **kwargs)
        if self.args.n_gpu > 1:
            raise InputError(f"{self.args.n_gpu} devices in one process: start with `accelerate launch` or torchrun")
        if self.is_deepspeed_enabled and self.accelerator.state.deepspeed_plugin.zero_stage == 3:
            raise InputError("DeepSpeed ZeRO-3: shards the head outside of its own forward; use FSDP 2, DDP or ZeRO-2")
        if objective is None:
            objective = self._default_objective(teacher, distill, teacher_processing_class)
        elif teacher is not None or distill is not None:
            raise InputError("objective: given with teacher or distill, which are for the default objective; give one")
        self.objective = objective.to(self.args.device)
        self.window_hook = window_hook
        self.meter = TermMeter(self._summed, self.last_good, "student")
        self.student = self.model  # self.model becomes the wrapped one under FSDP
        objective.prepare(self.student)
        self._check_auxiliary()
        # First: what an objective does to the weights comes before averages, validation and checkpoints see them.
        self.callback_handler.callbacks.insert(0, _AfterStep(self))

    def _default_objective(self, teacher: Any, distill: DivergenceArgs | None, tokenizer: Any) -> Objective:
        if teacher is None and distill is None:
            raise InputError("objective: given none, and no teacher; give an Objective, or teacher (and distill)")
        if tokenizer is not None and self.processing_class is None:
            raise InputError("teacher_processing_class: is compared with the student's; give processing_class too")
        source = LocalTeacher(teacher) if isinstance(teacher, nn.Module) else teacher
        return TokenObjective(source, distill, tokenizers=tokenizer and (self.processing_class, tokenizer))

    def call_model_init(self, trial: Any = None) -> nn.Module:
        model = super().call_model_init(trial)
        if hasattr(self, "objective"):  # a later call, by train()
            self.student = model
            self.objective.prepare(model)
        return model

    def _check_auxiliary(self) -> None:
        own = {id(p) for p in self.objective.auxiliary.parameters()}
        stray = [name for name, p in self.objective.named_parameters() if p.requires_grad and id(p) not in own]
        if stray:
            raise InputError(f"objective: trainable parameters outside of `auxiliary`: {', '.join(stray[:5])}")
        if own and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise InputError("objective: auxiliary parameters train under DDP alone, not with FSDP or DeepSpeed")
        if self.optimizer is not None:
            held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
            if any(p.requires_grad and id(p) not in held for p in self.objective.auxiliary.parameters()):
                raise InputError("optimizers: the optimiser does not hold the parameters of objective.auxiliary")

    # ------------------------------------------------------------ the loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The objective inside the student's forward, times the number of processes (DDP and FSDP average)."""
        terms = self.terms(model, inputs, num_items_in_batch)
        loss = terms.total()
        if model.training:
            self.meter.record(self.state.global_step, terms)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        if not return_outputs:
            return loss
        with torch.no_grad():
            outputs = model(**self._model_inputs(inputs)) if self._wants_outputs else {}
        return loss, outputs

    _wants_outputs = False

    def terms(self, model: nn.Module, inputs: Mapping[str, Any], items: Tensor | int | None) -> LossTerms:
        """The objective's terms on one micro-batch, by a forward pass of the (wrapped) model."""
        student = self.student
        forward = student.forward  # with accelerate's autocast, if there is one

        def inside(*_: Any, **__: Any) -> dict[str, tuple[float, Tensor]]:
            call = StudentCall(student, self.objective.shift, forward)
            terms = self.objective.loss(call, inputs, items)
            # DDP and FSDP look for the graph in plain containers; a term of weight 0 must not look used.
            return {name: (w, term if w != 0 else term.detach()) for name, (w, term) in terms.items()}

        with instance_forward(student, inside), self.accelerator.autocast():
            return LossTerms(model(**self._model_inputs(inputs)))

    def _model_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        return model_inputs(self.student, inputs)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        self._wants_outputs = not prediction_loss_only
        try:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        finally:
            self._wants_outputs = False

    def training_step(self, model, inputs, num_items_in_batch=None) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients and self.accelerator.num_processes > 1:
            self._average_auxiliary_gradients()
        return loss

    def _average_auxiliary_gradients(self) -> None:
        """DDP wraps the student alone; the processes agree on whether a parameter has a gradient."""
        for parameter in self.objective.auxiliary.parameters():
            if parameter.requires_grad:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                torch.distributed.all_reduce(parameter.grad)
                parameter.grad /= self.accelerator.num_processes

    # ------------------------------------------------------------ batches and their counts

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches = []
        for _ in range(num_batches):
            try:
                batches.append(next(epoch_iterator))
            except StopIteration:
                break
        if batches:
            batches = self._window(batches)
        return batches, self._get_num_items_in_batch(batches, device)

    def _window(self, batches: list[Any]) -> list[Any]:
        """A hook's random draws are its own: a resumed run, which draws here before its state is back, stays exact."""
        if self.window_hook is None and type(self.objective).window is Objective.window:
            return batches
        kept, step = rng_state(), self.state.global_step
        try:
            if self.window_hook is not None:
                batches = list(self.window_hook(self.student, batches, step))
            return list(self.objective.window(self.student, batches, step))
        finally:
            set_rng_state(kept)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor | None:
        """What the optimiser step predicts, over all processes where average_tokens_across_devices is set."""
        if not batch_samples:
            return None
        counts = [self.objective.count(batch).to(device) for batch in batch_samples]
        items = torch.stack(counts).sum()
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            items = self.accelerator.gather(items).sum()
        return items / (self.get_tp_size() * self.get_cp_size() * self.get_sp_size())

    def _set_signature_columns_if_needed(self) -> None:
        fresh = self._signature_columns is None
        super()._set_signature_columns_if_needed()
        if fresh:
            self._signature_columns += [*EXTRA, *self.objective.columns]

    # ------------------------------------------------------------ optimiser

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        module = self.model if model is None else model
        if any(True for _ in self.objective.auxiliary.parameters()):
            module = nn.ModuleDict({"student": module, "auxiliary": self.objective.auxiliary})
        return super().create_optimizer(module)

    def _trained(self, model: nn.Module) -> list[nn.Parameter]:
        return [*model.parameters(), *self.objective.auxiliary.parameters()]

    def _clip_grad_norm(self, model):
        if not len(self.objective.auxiliary):
            return super()._clip_grad_norm(model)
        return self.accelerator.clip_grad_norm_(self._trained(model), self.args.max_grad_norm)

    # ------------------------------------------------------------ log

    def _summed(self, values: Tensor) -> Tensor:
        if self.accelerator.num_processes == 1:
            return values
        return self.accelerator.reduce(values, "sum")

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and "learning_rate" in logs:
            logs.update(flat(self.meter.means()))
            if hasattr(self.window_hook, "statistics"):
                logs.update(self.window_hook.statistics())
        super().log(logs, start_time)

    def train(self, *args: Any, **kwargs: Any):
        self.meter.clear()
        self.objective.auxiliary.zero_grad()
        output = super().train(*args, **kwargs)
        self.meter.check()
        return output

    # ------------------------------------------------------------ checkpoints

    def last_good(self) -> Path | None:
        """The newest checkpoint in the output folder."""
        folder = self.args.output_dir
        found = get_last_checkpoint(folder) if os.path.isdir(folder) else None
        return None if found is None else Path(found)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.meter.check()
        self._check_weights()
        run = Path(self._get_output_dir(trial))
        if self.args.push_to_hub:  # uploads in the background from where it was written
            super()._save_checkpoint(model, trial)
            if self.args.should_save:
                self._add_own(run / f"checkpoint-{self.state.global_step}")
            return
        name, keep = f"checkpoint-{self.state.global_step}", self.args.save_total_limit
        temporary = run / f".{name}.tmp"
        if self.args.should_save:
            shutil.rmtree(temporary, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        own = self._get_output_dir
        self._get_output_dir = lambda trial: str(temporary)  # type: ignore[method-assign]
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._get_output_dir = own  # type: ignore[method-assign]
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self._complete(temporary / name, run / name)
            shutil.rmtree(temporary)
            if keep is not None:
                rotate_checkpoints(
                    output_dir=str(run), save_total_limit=keep, best_model_checkpoint=self.state.best_model_checkpoint
                )
        self.accelerator.wait_for_everyone()

    def _complete(self, folder: Path, final: Path) -> None:
        """Adds the objective, the stage's state and the manifest, and gives the checkpoint its name."""
        if self.state.best_global_step:
            best = final.with_name(f"checkpoint-{self.state.best_global_step}")
            if best == final or best.is_dir():
                self.state.best_model_checkpoint = str(best)
                self.state.save_to_json(str(folder / "trainer_state.json"))
        self._add_own(folder)
        for path in [*folder.rglob("*"), folder]:
            sync(path)
        if final.exists():
            shutil.rmtree(final)
        os.rename(folder, final)
        sync(final.parent)

    def _add_own(self, folder: Path) -> None:
        state = {key: value.detach().cpu() for key, value in self.objective.state_dict().items()}
        extra = self.objective.extra_state()
        torch.save({"state": state, "extra": extra, **self.more_state()}, folder / OBJECTIVE_FILE)
        found = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MANIFEST]
        files = {path.relative_to(folder).as_posix(): sha256(path) for path in found}
        (folder / MANIFEST).write_text(json.dumps({"step": self.state.global_step, "files": files}, indent=2))

    def more_state(self) -> dict[str, Any]:
        """Further tensors and plain values for `objective.pt`; `load_more_state` gets them back."""
        return {}

    def load_more_state(self, state: Mapping[str, Any]) -> None:
        """The counterpart of `more_state`."""

    def _check_weights(self) -> None:
        """A finite loss can have a NaN gradient; the next loss would tell, but a checkpoint may come before it."""
        if not all(bool(torch.isfinite(p).all()) for p in self._trained(self.model) if p.requires_grad):
            message = f"step {self.state.global_step}: non-finite weights after a finite loss"
            raise RunFailed(message, self.last_good())

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        check_checkpoint(Path(resume_from_checkpoint))
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        path = None if checkpoint is None else Path(checkpoint, OBJECTIVE_FILE)
        if path is None or not path.is_file():
            if checkpoint is not None and len(self.objective.state_dict()):
                raise InputError(f"checkpoint {checkpoint}: has no {OBJECTIVE_FILE}, the state of the objective")
            return
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            self.objective.load_state_dict(saved.pop("state"))
            self.objective.load_extra_state(saved.pop("extra"))
        except (pickle.UnpicklingError, RuntimeError, KeyError, EOFError) as error:
            raise InputError(f"checkpoint {path}: of another objective ({error})") from error
        self.load_more_state(saved)


class _AfterStep(TrainerCallback):
    """The optimiser's step is done: `Trainer` has cleared the gradients of its model alone."""

    def __init__(self, trainer: DistillTrainer):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.objective.auxiliary.zero_grad()
        self.trainer.objective.on_step_end(self.trainer)


def check_checkpoint(path: Path) -> None:
    """Raises InputError that names what is wrong with a checkpoint; one without a manifest is plain Trainer's."""
    if not path.is_dir():
        raise InputError(f"checkpoint {path}: no such folder")
    if (path / MANIFEST).is_file():
        numbers = {other: _number(other) for other in trainer_checkpoints(path.parent)}
        older = [other for other in numbers if 0 <= numbers[other] < _number(path)]
        check(path, sorted(older, key=_number))


def _number(path: Path) -> int:
    """The step of a folder `checkpoint-N`; -1 for other names."""
    number = path.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1


def __getattr__(name: str) -> Any:
    if name in ("LMSetup", "TransformersStage", "training_arguments"):  # the stage imports no transformers by itself
        from kd_llm.integrations import stage

        return getattr(stage, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
