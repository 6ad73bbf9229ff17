"""The run config of language-model distillation and the stages that its methods share.

`language_model_method` registers a method with the usual stages: a tokenizer (stock, or trained on the run's text), a
teacher (by name, or trained on the spot and cached) and a student. Methods with other stages build their list from
`prepare`, `tokenizer_stage`, `teacher_stage` and `student_stage`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from kd_llm import __version__
from kd_llm import evaluation as ev
from kd_llm.collate import Collator
from kd_llm.data import TextData, load_data
from kd_llm.integrations.stage import LMSetup, TransformersStage
from kd_llm.models import open_model
from kd_llm.networks import (
    LLMRun,
    Networks,
    Prepared,
    Run,
    ServedConfig,
    TeacherConfig,
    open_student,
    open_teacher,
    student_rollouts,
    teacher_source,
    tokenizer_pair,
    tokenizer_revision,
    tokenizer_source,
    training_batches,
)
from kd_llm.tokenizers import open_tokenizer, train_tokenizer
from kdcore.config import MethodConfig, TrainConfig
from kdcore.errors import InputError, did_you_mean
from kdcore.method import Method
from kdcore.stages import Artefacts, CachedStage, Procedure, RunContext, Stage

if TYPE_CHECKING:
    from kd_llm.engine.objective import Objective

__all__ = [
    "LLMRun",
    "Networks",
    "Prepared",
    "Run",
    "ServedConfig",
    "TeacherConfig",
    "language_model_method",
    "make_setup",
    "open_student",
    "open_teacher",
    "prepare",
    "student_rollouts",
    "student_stage",
    "supervised",
    "teacher_identity",
    "teacher_source",
    "teacher_stage",
    "tokenizer_pair",
    "tokenizer_source",
    "tokenizer_stage",
    "training_batches",
    "write_cache",
]

A = TypeVar("A", bound=MethodConfig)
Build = Callable[[Any, Networks], "Objective"]
Rows = Callable[[Networks], Any]


# ---------------------------------------------------------------- stages


def prepare(config: Run) -> Prepared:
    """Reads the data and says what is wrong with the config before anything trains. Raises InputError."""
    data = load_data(config.data, config.seed)
    if config.task == "classification" and not data.num_labels:
        raise InputError(f"task = 'classification': data.name = '{config.data.name}' has no labels")
    if config.data.packing and config.task != "causal":
        raise InputError(f"data.packing: only for decoders; task = '{config.task}'")
    if config.data.packing and config.teacher.cache is not None:
        raise InputError("teacher.cache: its entries are single texts; set data.packing to false")
    if config.task == "masked" and config.teacher.cache is not None:
        raise InputError("teacher.cache: the masked tokens are drawn anew in every batch; leave it out")
    for name, train in (("teacher.train", config.teacher.train), ("train", config.train)):
        _check_monitor(train, config, data, name)
    return Prepared(config, data)


def _check_monitor(train: TrainConfig | None, config: Run, data: TextData, field: str) -> None:
    if train is None or train.monitor is None:
        return
    known = ["accuracy", "macro_f1", "nll"]
    if config.task != "classification":
        known = ["perplexity", "token_accuracy", *(f"perplexity/{d}" for d in data.domains if len(data.domains) > 1)]
    if train.monitor not in known:
        raise InputError(f"{field}.monitor = '{train.monitor}': not a metric{did_you_mean(train.monitor, known)}")


def tokenizer_stage(config: Run, prepared: Prepared) -> Stage:
    """Gives the artefact `tokenizer`, a folder that AutoTokenizer opens: stock, or trained and cached."""
    source = tokenizer_source(config)

    def run(context: RunContext) -> Artefacts:
        folder = context.folder / "tokenizer"
        if context.is_main:
            for note in prepared.data.notes:
                context.say(note)
            if source is not None:
                made: Any = open_tokenizer(source, revision=tokenizer_revision(config))
            else:
                settings = config.tokenizer
                made = train_tokenizer(
                    prepared.data.texts(),
                    settings.vocab_size,
                    settings.kind,
                    config.data.length,
                    lowercase=settings.lowercase,
                    split_digits=settings.split_digits,
                )
            made.save_pretrained(str(folder))
        context.accelerator.wait_for_everyone()
        return {"tokenizer": folder}

    stage = Procedure("tokenizer", run)
    if source is not None:
        return stage
    import tokenizers

    identity = {
        "version": __version__,
        "tokenizers": tokenizers.__version__,
        "settings": config.tokenizer.model_dump(mode="json"),
        "length": config.data.length,
        "data": prepared.data.digest(),
    }
    return CachedStage(stage, identity)


def teacher_stage(
    config: Run,
    prepared: Prepared,
    *,
    name: str = "teacher",
    model: TeacherConfig | None = None,
    fingerprint: Mapping[str, Any] | None = None,
    build: Callable[[RunContext], LMSetup] | None = None,
) -> list[Stage]:
    """The stages that give the artefact `name`, a model folder: one that trains and is cached, or none where the
    teacher comes with weights.

    `build` replaces training on the labels; a method that changes it, or the data, adds what it changed to
    `fingerprint`.
    """
    teacher = model or config.teacher
    if teacher.train is None:
        return []
    train = teacher.train

    def setup(context: RunContext) -> LMSetup:
        tokenizer = prepared.tokenizer(context.artefacts)
        labels = prepared.data.num_labels or None
        network = open_model(teacher, config.task, tokenizer, labels, field=name)
        return make_setup(config, prepared, context, network, supervised(config))

    stage = TransformersStage(name, train, build or setup, artefact=name)
    return [CachedStage(stage, {**teacher_identity(config, prepared, teacher), **(fingerprint or {})})]


def teacher_identity(config: Run, prepared: Prepared, teacher: TeacherConfig | None = None) -> dict[str, Any]:
    """What the weights of a teacher that is trained on the spot depend on."""
    import transformers

    return {
        "version": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "task": config.task,
        "model": (teacher or config.teacher).model_dump(mode="json", exclude={"cache", "served"}),
        "tokenizer": [tokenizer_source(config), config.tokenizer.model_dump(mode="json")],
        "data": config.data.model_dump(mode="json"),
        "contents": prepared.data.digest(),
        "seed": config.seed,
    }


def supervised(config: Run) -> Objective:
    """Cross-entropy on the labels alone."""
    from kd_llm.engine.classification import ClassificationObjective
    from kd_llm.engine.objective import TokenObjective

    return ClassificationObjective() if config.task == "classification" else TokenObjective(None)


def make_setup(
    config: Run,
    prepared: Prepared,
    context: RunContext,
    network: nn.Module,
    objective: Objective,
    *,
    dataset: Any = None,
    **more: Any,
) -> LMSetup:
    """A training on the rows of the run (or `dataset`), validated by the metrics of the labels."""
    artefacts = dict(context.artefacts)
    tokens = prepared.tokens(artefacts)
    for note in tokens.notes:
        context.say(note)
    tokens.notes.clear()  # once a run

    def validate(model: nn.Module) -> dict[str, float]:
        return ev.measure(config, prepared, artefacts, model, "validation")

    return LMSetup(
        model=network,
        tokenizer=prepared.tokenizer(artefacts),
        objective=objective,
        dataset=tokens.train if dataset is None else dataset,
        collate=prepared.collator(artefacts),
        eval=validate,
        **more,
    )


def student_stage(
    config: Run,
    prepared: Prepared,
    build: Build,
    *,
    dataset: Rows | None = None,
    model: Callable[[RunContext], nn.Module] | None = None,
    train: TrainConfig | None = None,
    name: str = "student",
    artefact: str = "student",
    window_hook: Callable[[Networks], Any] | None = None,
    optimizer: Callable[[Networks], Any] | None = None,
    callbacks: Callable[[Networks], list[Any]] | None = None,
) -> TransformersStage:
    """Trains what `build(config, networks)` says; gives the artefact `student`, a stock model folder.

    `dataset(networks)` replaces the rows, `model(context)` the student of the config, `window_hook(networks)` may
    replace batches (on-policy text), `optimizer(networks)` gives parameter groups.
    """

    def setup(context: RunContext) -> LMSetup:
        network = open_student(config, prepared, context.artefacts) if model is None else model(context)
        networks = Networks(
            network, prepared.tokenizer(context.artefacts), prepared.tokens(context.artefacts), prepared, context
        )
        return make_setup(
            config,
            prepared,
            context,
            network,
            build(config, networks),
            dataset=None if dataset is None else dataset(networks),
            window_hook=None if window_hook is None else window_hook(networks),
            optimizer=None if optimizer is None else optimizer(networks),
            callbacks=[] if callbacks is None else callbacks(networks),
        )

    return TransformersStage(name, train or config.train, setup, artefact=artefact)


# ---------------------------------------------------------------- the teacher's outputs


def write_cache(config: Run, folder: Path, *, k: int = 64) -> dict[str, Any]:
    """`kd cache`: the teacher's top-k log-probabilities on the training rows, for `teacher.cache`."""
    from kd_llm.engine import teachers

    prepared = prepare(config)
    if config.teacher.pretrained is None:
        raise InputError("teacher.train: `kd cache` needs a teacher with weights; give teacher.pretrained")
    if config.task in ("classification", "masked"):
        raise InputError(f"task = '{config.task}': `kd cache` keeps distributions of the same tokens in every epoch")
    source = tokenizer_source(config)
    assert source is not None  # a pretrained teacher is one
    prepared._tokenizer = tokenizer = open_tokenizer(source, revision=tokenizer_revision(config))
    tokens, collate = prepared.tokens({}), Collator(tokenizer, task=config.task)
    teacher = open_teacher(config, prepared, {})
    assert teacher is not None
    teacher = teacher.to(ev.run_device()).eval()
    size = min(k, teachers.LocalTeacher(teacher).num_outputs)
    return teachers.write_cache(
        folder, teacher, lambda: training_batches(tokens, collate, config.train.batch_size), k=size
    )


# ---------------------------------------------------------------- registration


def language_model_method(
    key: str,
    doc: str | None,
    arguments: type[A],
    build: Build,
    *,
    window_hook: Callable[[Networks], Any] | None = None,
    check: Callable[[Any, Prepared], None] | None = None,
) -> Method[Any]:
    """A method of the usual stages (tokenizer, teacher, student) with the shared evaluation, samples and cache.

    `check(config, prepared)` may raise InputError before anything trains.
    """

    def stages(config: Run, context: RunContext) -> list[Stage]:
        prepared = prepare(config)
        if check is not None:
            check(config, prepared)
        return [
            tokenizer_stage(config, prepared),
            *teacher_stage(config, prepared),
            student_stage(config, prepared, build, window_hook=window_hook),
        ]

    return Method(key, doc or "", LLMRun[arguments], stages, ev.evaluate, ev.predict, write_cache)
