"""The run config of language-model distillation, its data and its networks: what stages and methods are given."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from pydantic import Field, model_validator
from torch import Tensor, nn

from kd_llm.collate import Collator, Task, Tokenised, tokenise
from kd_llm.data import DataConfig, TextData
from kd_llm.evaluation import EvaluationConfig
from kd_llm.models import ModelConfig, StudentConfig, load_model, open_model
from kd_llm.tokenizers import TokenizerConfig, open_tokenizer
from kdcore.config import Config, MethodConfig, MethodRunConfig, TrainConfig
from kdcore.errors import InputError
from kdcore.stages import Artefacts, RunContext

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from kd_llm.engine.rollouts import Rollouts, SamplerName
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
    evaluation: EvaluationConfig = Field(default_factory=lambda: EvaluationConfig.model_validate({}))


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

    def teacher_fingerprint(self) -> str:
        """Of the teacher's weights, which are read for it and let go: a training from a cache holds no teacher."""
        from kdcore.gpu import module_fingerprint

        if self._teacher is not None:
            return module_fingerprint(self._teacher)
        found = open_teacher(self.prepared.config, self.prepared, self.context.artefacts)
        if found is None:
            raise InputError("teacher.cache: its weights are needed to check the cache; give teacher.pretrained")
        return module_fingerprint(found)

    @property
    def teacher(self) -> TeacherSource:
        """Where the signal comes from: the cache or the server of the config, else the teacher itself."""
        return teacher_source(self.prepared.config, self)


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
        return CachedTeacher(teacher.cache, teacher=networks.teacher_fingerprint(), data=data_identity(batches))
    return LocalTeacher(networks.teacher_model)


def student_rollouts(kind: SamplerName, engine: Mapping[str, Any], networks: Networks) -> Rollouts:
    """What samples from the student: transformers' generate, or a vLLM engine that starts from a copy of its weights
    in the run's folder; `engine` are the arguments of its `LLM`."""
    from kd_llm.engine.heads import base_model
    from kd_llm.engine.rollouts import HFRollouts, VLLMRollouts, plain_weights

    if kind == "transformers":
        return HFRollouts(networks.tokenizer)
    context, folder = networks.context, networks.context.folder / "rollouts"
    if context.is_main:
        weights = plain_weights(networks.student)
        base_model(networks.student).save_pretrained(folder, state_dict=weights)  # type: ignore[operator]
        networks.tokenizer.save_pretrained(str(folder))
    context.accelerator.wait_for_everyone()
    return VLLMRollouts(str(folder), **engine)


def tokenizer_pair(config: Run, tokenizer: Any) -> tuple[Any, Any]:
    """(student's, teacher's) tokenizer, whose vocabularies are compared: `tokenizer` is the run's, and the teacher's
    too unless that one comes by another name."""
    theirs = config.teacher.pretrained
    if theirs is None or tokenizer_source(config) == theirs:
        return tokenizer, tokenizer
    return tokenizer, open_tokenizer(theirs, revision=config.teacher.revision, field="teacher.pretrained")


def training_batches(tokens: Tokenised, collate: Collator, batch_size: int) -> Iterator[dict[str, Tensor]]:
    """Every training row once, in order."""
    rows = tokens.train
    for start in range(0, len(rows), batch_size):
        yield collate([rows[place] for place in range(start, min(start + batch_size, len(rows)))])


def tokenizer_source(config: Run) -> str | None:
    """Name or folder of the run's stock tokenizer; None: it is trained. The student's goes before the teacher's."""
    return next((part.pretrained for part in _named(config) if part.pretrained is not None), None)


def tokenizer_revision(config: Run) -> str | None:
    """The revision that goes with `tokenizer_source`."""
    return next((part.revision for part in _named(config) if part.pretrained is not None), None)


def _named(config: Run) -> list[TokenizerConfig | ModelConfig]:
    return [config.tokenizer, config.student, config.teacher]
