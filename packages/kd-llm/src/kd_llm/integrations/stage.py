"""TransformersStage: a stage of a `kd` run whose training is a `DistillTrainer`.

It keeps the contract of `kdcore.training.TrainStage`: total batch sizes, optimiser and schedule of the config, the same
records in metrics.jsonl, one artefact folder, and a run that is a function of config and seed. Data order and the
randomness of a sample are functions of (seed, epoch, index); a resumed run has bit-identical weights.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from kdcore.config import TrainConfig
from kdcore.errors import InputError
from kdcore.monitor import Monitor
from kdcore.stages import Artefacts, RunContext, stage_seed

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from kd_llm.engine.objective import Objective


@dataclass
class LMSetup:
    """What a TransformersStage trains.

    model: PreTrainedModel or PeftModel. dataset: map-style (also a Hugging Face one) or iterable; collate: examples ->
    batch. eval: the student in evaluation mode -> validation metrics. optimizer: parameter groups in the place of one
    with all trainable parameters, with `lr_scale` as in `kdcore.distiller.Player`. merge: adapters are merged into the
    saved model; False saves the adapters alone.
    """

    model: nn.Module
    tokenizer: Any
    objective: Objective
    dataset: Any
    collate: Callable[[Any], Mapping[str, Any]] | None = None
    eval: Callable[[nn.Module], Mapping[str, float]] | None = None
    callbacks: list[Any] = field(default_factory=list)
    optimizer: Sequence[dict[str, Any]] | None = None
    window_hook: Callable[..., Any] | None = None
    merge: bool = True


def training_arguments(
    train: TrainConfig, folder: str | Path, *, seed: int = 0, cpu: bool = False, processes: int = 1, **overrides: Any
) -> TrainingArguments:
    """The TrainingArguments of a TrainConfig: `folder` gets the checkpoints, nothing is printed, nothing reported.

    Optimiser and schedule of the config are not among them (`StageTrainer` makes them by `kdcore.optim`); a
    `DistillTrainer` of your own gets them by `optimizers=(...)` or `overrides`, which win over what is here.
    Raises: InputError for a batch size that the processes cannot share.
    """
    from transformers import TrainingArguments

    if train.batch_size % processes:
        raise InputError(f"train.batch_size = {train.batch_size}: not divisible by the {processes} processes")
    values: dict[str, Any] = {
        "output_dir": str(folder),
        "seed": seed,
        "data_seed": seed,
        "max_steps": train.steps or -1,
        "num_train_epochs": float(train.epochs or 1),
        "per_device_train_batch_size": train.batch_size // processes,
        "gradient_accumulation_steps": train.accumulation,
        "learning_rate": train.optimizer.lr,
        "max_grad_norm": train.clip or 0.0,
        "bf16": train.precision == "bf16",
        "fp16": train.precision == "fp16",
        "use_cpu": cpu,
        "dataloader_num_workers": train.num_workers,
        "dataloader_pin_memory": not cpu,
        "logging_steps": train.log_every,
        "logging_nan_inf_filter": False,  # the terms are watched, without waiting for each step
        "save_strategy": "steps",
        "save_steps": train.checkpoint_every,
        "save_total_limit": train.keep_checkpoints,
        "report_to": "none",
        "disable_tqdm": True,
        "log_level": "error",
        "log_level_replica": "error",
        "remove_unused_columns": False,
    }
    return TrainingArguments(**{**values, **overrides})


@dataclass
class TransformersStage:
    """Trains an LMSetup and saves the student as `<run>/<artefact>/`, with its tokenizer, by `save_pretrained`.

    `build` is called with the generators seeded by (run seed, stage name). Multi-process through `accelerate launch`.
    """

    name: str
    train: TrainConfig
    build: Callable[[RunContext], LMSetup]
    artefact: str = "student"

    def run(self, context: RunContext) -> Artefacts:
        from accelerate.utils import set_seed

        seed = stage_seed(context, self.name)
        set_seed(seed)
        with _silent_transformers(), ExitStack() as stack:
            setup = self.build(context)
            args = self._arguments(context, setup, seed)
            stack.enter_context(_own_accelerator())
            from kd_llm.integrations.stage_trainer import StageTrainer

            trainer = StageTrainer(args, setup, self.name, self.train, context)
            trainer.fit()
            target = context.folder / self.artefact
            trainer.save_student(target)
            trainer.accelerator.wait_for_everyone()
        return {self.artefact: target}

    def _arguments(self, context: RunContext, setup: LMSetup, seed: int) -> TrainingArguments:
        Monitor(self.train).check(self.name, has_validation=setup.eval is not None)
        if self.train.steps is None and not hasattr(setup.dataset, "__len__"):
            raise InputError("train.epochs: the data set has no length; give train.steps as the budget")
        if setup.merge:
            _check_merge(setup.model)
        if self.train.compile:
            _compile_body(setup.model)
        return training_arguments(
            self.train,
            context.folder / "checkpoints" / self.name,
            seed=seed,
            cpu=context.accelerator.device.type == "cpu",
            processes=context.accelerator.num_processes,
            accelerator_config={"use_configured_state": True},
        )


def _check_merge(model: nn.Module) -> None:
    """Merging an adapter of a head into a weight that is the embedding too would change the embedding."""
    from kd_llm.engine.heads import base_model, head_of

    base = base_model(model)
    if base is model or not hasattr(base, "get_output_embeddings") or base.get_output_embeddings() is None:
        return
    weight = base.get_input_embeddings().weight
    if head_of(model).adapters and any(p is weight for p in base.get_output_embeddings().parameters()):
        raise InputError(
            "adapters: LoRA on a head that is tied to the embedding cannot be merged; leave the head out of "
            "target_modules, or untie it (tie_word_embeddings: false)"
        )


def _compile_body(model: nn.Module) -> None:
    """The body alone: the head runs inside the loss."""
    from kd_llm.engine.heads import base_model

    base = base_model(model)
    getattr(base, base.base_model_prefix, base).compile()


@contextmanager
def _own_accelerator() -> Iterator[None]:
    """The Trainer makes an accelerator of its own, whose precision may differ, in the same process group.

    Accelerators share their state in the class: that of the run is put back at the end.
    """
    from accelerate.state import AcceleratorState, GradientState

    kept = [(state, dict(state._shared_state)) for state in (AcceleratorState, GradientState)]
    try:
        for state, _ in kept:
            state._shared_state.clear()
        yield
    finally:
        for state, values in kept:
            state._shared_state.clear()
            state._shared_state.update(values)


@contextmanager
def _silent_transformers() -> Iterator[None]:
    """Inside, transformers logs errors alone and shows no progress bars of its own."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            for library in ("transformers", "peft", "accelerate"):
                warnings.filterwarnings("ignore", category=FutureWarning, module=rf"{library}\.")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
