"""The run config of language-model distillation and the stages that its methods share.

`language_model_method` registers a method with the usual stages: a tokenizer (stock, or trained on the run's text), a
teacher (by name, or trained on the spot and cached) and a student. Methods with other stages build their list from
`prepare`, `tokenizer_stage`, `teacher_stage` and `student_stage`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from pydantic import Field, model_validator
from torch import nn

from kd_llm import __version__
from kd_llm import evaluation as ev
from kd_llm.collate import Collator, Task, Tokenised, tokenise
from kd_llm.data import DataConfig, TextData, load_data
from kd_llm.integrations.stage import LMSetup, TransformersStage
from kd_llm.models import ModelConfig, StudentConfig, load_model, open_model
from kd_llm.tokenizers import TokenizerConfig, open_tokenizer, train_tokenizer
from kdcore.config import Config, MethodConfig, MethodRunConfig, TrainConfig
from kdcore.errors import InputError, did_you_mean
from kdcore.method import Method
from kdcore.stages import Artefacts, CachedStage, Procedure, RunContext, Stage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from kd_llm.engine.objective import Objective
    from kd_llm.engine.teachers import TeacherSource

A = TypeVar("A", bound=MethodConfig)


class ServedConfig(Config):
    """A teacher behind an OpenAI-style server that gives the log-probabilities of a prompt (vLLM)."""

    url: str = Field(description="address of the server, such as http://localhost:8000/v1")
    model: str = Field(description="the model's name there")
    k: int = Field(20, ge=1, description="most probable tokens of each position; the server has a limit of its own")


class TeacherConfig(ModelConfig):
    train: TrainConfig | None = Field(None, description="how to train it on the spot; None: it comes with weights")
    cache: str | None = Field(None, description="folder of `kd cache`: its top-k replaces the teacher in training")
    served: ServedConfig | None = Field(None, description="a server that replaces the teacher in training")

    @model_validator(mode="after")
    def _has_weights(self) -> TeacherConfig:
        if self.pretrained is None and self.config is None:
            raise ValueError("has no source: give pretrained, or config with train")
        if self.config is not None and self.train is None:
            raise ValueError("has no weights: give pretrained, or train beside config")
        if self.cache is not None and self.served is not None:
            raise ValueError("has two replacements: give cache or served")
        return self


class LLMRun(MethodRunConfig[A], Generic[A]):
    """The config of a run: tokenizer, two networks, the data, the method's arguments and the budget."""

    task: Task = Field(
        "causal", description="what the networks are: decoders, masked encoders, encoder-decoders, classifiers"
    )
    tokenizer: TokenizerConfig = Field(default_factory=lambda: TokenizerConfig.model_validate({}))
    teacher: TeacherConfig
    student: StudentConfig
    data: DataConfig = Field(default_factory=lambda: DataConfig.model_validate({}))
    evaluation: ev.EvaluationConfig = Field(default_factory=lambda: ev.EvaluationConfig.model_validate({}))


Run = LLMRun[Any]


@dataclass
class Prepared:
    """The data of a run, and what the tokenizer makes of it (computed when first asked for)."""

    config: Run
    data: TextData
    _tokenizer: Any = None
    _tokens: Tokenised | None = None

    def tokenizer(self, artefacts: Artefacts) -> PreTrainedTokenizerBase:
        """The run's tokenizer, from its artefact."""
        if self._tokenizer is None:
            self._tokenizer = open_tokenizer(artefacts["tokenizer"])
        return self._tokenizer

    def tokens(self, artefacts: Artefacts) -> Tokenised:
        """The three splits as rows of tokens; see `kd_llm.collate`."""
        if self._tokens is None:
            self._tokens = tokenise(self.data, self.tokenizer(artefacts), task=self.config.task)
        return self._tokens

    def collator(self, artefacts: Artefacts) -> Collator:
        return Collator(self.tokenizer(artefacts), task=self.config.task)


@dataclass
class Networks:
    """What a method's `build` gets: a fresh student, the tokenizer, the rows; the teacher is opened when asked for."""

    student: nn.Module
    tokenizer: PreTrainedTokenizerBase
    tokens: Tokenised
    prepared: Prepared
    context: RunContext
    _teacher: nn.Module | None = field(default=None, repr=False)

    @property
    def teacher_model(self) -> nn.Module:
        """The teacher beside the student, whatever `teacher.cache` and `teacher.served` say."""
        if self._teacher is None:
            config = self.prepared.config
            found = open_teacher(config, self.prepared, self.context.artefacts)
            if found is None:
                raise InputError("teacher: this method needs its weights; give teacher.pretrained, or config and train")
            self._teacher = found
        return self._teacher

    @property
    def teacher(self) -> TeacherSource:
        """Where the signal comes from: the cache or the server of the config, else the teacher itself."""
        return teacher_source(self.prepared.config, self)


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


def tokenizer_source(config: Run) -> str | None:
    """Name or folder of the run's stock tokenizer; None: it is trained. The student's goes before the teacher's."""
    return config.tokenizer.pretrained or config.student.pretrained or config.teacher.pretrained


def tokenizer_stage(config: Run, prepared: Prepared) -> Stage:
    """Gives the artefact `tokenizer`, a folder that AutoTokenizer opens: stock, or trained and cached."""
    source = tokenizer_source(config)

    def run(context: RunContext) -> Artefacts:
        folder = context.folder / "tokenizer"
        if context.is_main:
            for note in prepared.data.notes:
                context.say(note)
            if source is not None:
                made: Any = open_tokenizer(source, revision=config.tokenizer.revision)
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


# ---------------------------------------------------------------- networks


def open_student(config: Run, prepared: Prepared, artefacts: Artefacts) -> nn.Module:
    """A fresh student: by name, from its config, or cut out of the teacher."""
    teacher = None
    if config.student.cut is not None:
        teacher = open_teacher(config, prepared, artefacts)
    return open_model(
        config.student,
        config.task,
        prepared.tokenizer(artefacts),
        prepared.data.num_labels or None,
        teacher=teacher,
        field="student",
    )


def open_teacher(config: Run, prepared: Prepared, artefacts: Artefacts, *, name: str = "teacher") -> nn.Module | None:
    """The teacher from its folder in the run, or by its name; None for a teacher that a server alone has."""
    teacher = config.teacher
    labels = prepared.data.num_labels or None
    source = artefacts.get(name) or teacher.pretrained
    if source is None:
        return None
    return load_model(
        source,
        config.task,
        labels,
        revision=None if name in artefacts else teacher.revision,
        dtype=teacher.dtype,
        attention=teacher.attn_implementation,
        field=f"{name}.pretrained",
    )


def teacher_source(config: Run, networks: Networks) -> TeacherSource:
    """`teacher.cache`, checked against this teacher and this data; `teacher.served`; or the teacher in memory."""
    from kd_llm.engine.teachers import CachedTeacher, LocalTeacher, data_identity

    teacher = config.teacher
    if teacher.served is not None:
        from kd_llm.integrations.served import ServedTeacher

        return ServedTeacher(
            teacher.served.url, teacher.served.model, k=teacher.served.k, num_outputs=len(networks.tokenizer)
        )
    if teacher.cache is not None:
        batches = training_batches(networks.tokens, Collator(networks.tokenizer), config.train.batch_size)
        return CachedTeacher(teacher.cache, teacher=networks.teacher_model, data=data_identity(batches))
    return LocalTeacher(networks.teacher_model)


def tokenizer_pair(config: Run, networks: Networks) -> tuple[Any, Any] | None:
    """(student's, teacher's) tokenizer, where both come by name: their vocabularies are compared."""
    if config.teacher.pretrained is None or tokenizer_source(config) in (None, config.teacher.pretrained):
        return None
    return networks.tokenizer, open_tokenizer(config.teacher.pretrained, field="teacher.pretrained")


def training_batches(tokens: Tokenised, collate: Collator, batch_size: int) -> Any:
    """Every training row once, in order."""
    rows = tokens.train
    for start in range(0, len(rows), batch_size):
        yield collate([rows[place] for place in range(start, min(start + batch_size, len(rows)))])


def write_cache(config: Run, folder: Path, *, k: int = 64) -> dict[str, Any]:
    """`kd cache`: the teacher's top-k log-probabilities on the training rows, for `teacher.cache`."""
    from kd_llm.engine import teachers

    prepared = prepare(config)
    if config.teacher.pretrained is None:
        raise InputError("teacher.train: `kd cache` needs a teacher with weights; give teacher.pretrained")
    if config.task == "classification":
        raise InputError("task = 'classification': `kd cache` keeps distributions of tokens")
    source = tokenizer_source(config)
    assert source is not None  # a pretrained teacher is one
    prepared._tokenizer = tokenizer = open_tokenizer(source, revision=config.tokenizer.revision)
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
