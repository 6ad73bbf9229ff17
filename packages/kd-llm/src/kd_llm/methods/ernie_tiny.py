"""ERNIE-Tiny: A Progressive Distillation Framework for Pretrained Transformer Compression (arXiv 2106.02241, 2021).

From general to task-specific one ingredient at a time: of teacher, data and loss exactly one changes at a stage's end.

    GD   General Distillation           pretrained teacher   general text   L_lat
    GED  General-Enhanced Distillation  finetuned teacher    general text   L_lat
    TAD  Task-Adaptive Distillation     finetuned teacher    task text      L_lat
    TSD  Task-Specific Distillation     finetuned teacher    task text      L_lat + L_soft + L_hard

With g the layer map, A attention scores before softmax, H hidden states, E embeddings, z logits, T a temperature:

    L_lat  = sum_m MSE(A_S^m, A_T^{g(m)}) + sum_m MSE(H_S^m W_h, H_T^{g(m)}) + MSE(E_S W_e, E_T)                     (1)
    L_soft = -T^2 mean_b sum_c softmax(z_T / T)_c log softmax(z_S / T)_c                                            (2)
    L_hard = mean_b -log softmax(z_S)_y                                                                             (3)

The stages are the paper's; inside a stage the losses have the form of TinyBERT (arXiv 1909.10351), on which the paper
builds (`kd_llm.engine.encoder`). The numbers of the equations are this file's. For regression (one output) (2) and (3)
are squared errors. Student and W go from stage to stage, each with an optimiser and a schedule of its own; the W are
dropped at the end, and the student ships as a stock sequence classifier. GD depends on no task and is cached.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from kd_llm import evaluation as ev
from kd_llm import runs
from kd_llm.collate import Collator
from kd_llm.data import DataConfig, load_data
from kd_llm.engine.classification import ClassificationObjective
from kd_llm.engine.encoder import Attention, EncoderLayers, LatentLoss, MapRule, layer_map
from kd_llm.engine.encoder_objective import EncoderObjective
from kd_llm.engine.objective import TokenObjective
from kd_llm.general import TaskAndGeneral, general_rows
from kd_llm.integrations.stage import LMSetup, TransformersStage
from kd_llm.metrics import evaluation_batches
from kd_llm.models import from_config, layers_and_heads, load_model
from kd_llm.runs import LLMRun, Prepared, Run
from kdcore.config import Config, MethodConfig, TrainConfig
from kdcore.errors import InputError
from kdcore.method import Method
from kdcore.stages import Artefacts, CachedStage, Procedure, RunContext, Stage

StageName = Literal["GD", "GED", "TAD", "TSD"]
TABLE: dict[StageName, tuple[str, str, tuple[str, ...]]] = {
    "GD": ("pretrained", "general", ("latent",)),
    "GED": ("finetuned", "general", ("latent",)),
    "TAD": ("finetuned", "task", ("latent",)),
    "TSD": ("finetuned", "task", ("latent", "soft", "hard")),
}
"""Stage -> teacher, data, losses."""


class StageBudget(Config):
    """What a stage changes in `train`; its learning-rate schedule starts anew."""

    steps: int | None = Field(None, ge=1, description="optimiser steps; goes before epochs")
    epochs: int | None = Field(None, ge=1, description="passes over the stage's data")
    lr: float | None = Field(None, gt=0, description="learning rate; None: that of train.optimizer")
    batch_size: int | None = Field(None, ge=1, description="None: train.batch_size")

    def of(self, train: TrainConfig, *, last: bool) -> TrainConfig:
        """`train` with these values; only the last stage is validated by the metrics of the labels."""
        values = train.model_dump()
        if self.steps is not None or self.epochs is not None:
            values |= {"steps": self.steps, "epochs": self.epochs}
        if self.lr is not None:
            values["optimizer"]["lr"] = self.lr
        if self.batch_size is not None:
            values["batch_size"] = self.batch_size
        if not last:
            values |= {"monitor": None, "patience": None, "restore_best": False}
        return TrainConfig.model_validate(values)


class LatentConfig(Config):
    """What (1) compares."""

    attention: Attention = Field("scores", description="scores before softmax, probabilities after it, or none")
    embeddings: bool = Field(True, description="with the embeddings' term")
    last_layer_only: bool = Field(False, description="attention and hidden states of the last layer alone")
    layer_map: MapRule = Field("uniform", description="the teacher's layer for each of the student's")


class ErnieTinyConfig(MethodConfig):
    """The stages are the paper's; a stage that `stages` leaves out is not run, which is how its use is measured."""

    stages: dict[StageName, StageBudget] = Field(
        default_factory=lambda: {name: StageBudget.model_validate({}) for name in TABLE},
        description="the stages in their order, each with its budget; TSD is the last",
    )
    general: list[DataConfig] = Field(
        default_factory=lambda: [DataConfig.model_validate({})], min_length=1, description="sources of general text"
    )
    finetune: TrainConfig | None = Field(None, description="training of the pretrained teacher on the task")
    finetuned: str | None = Field(None, description="hub name or folder of the finetuned teacher, instead of finetune")
    latent: LatentConfig = Field(default_factory=lambda: LatentConfig.model_validate({}), description="what L_lat is")
    latent_weight: float = Field(1.0, ge=0, description="weight of (1)")
    soft_weight: float = Field(1.0, ge=0, description="weight of (2), in TSD")
    hard_weight: float = Field(1.0, ge=0, description="weight of (3), in TSD")
    temperature: float = Field(1.0, gt=0, description="T of (2)")

    @model_validator(mode="after")
    def _stages_in_order(self) -> ErnieTinyConfig:
        order = [name for name in TABLE if name in self.stages]
        if list(self.stages) != order or "TSD" not in self.stages:
            raise ValueError(f"stages = {', '.join(self.stages) or 'none'}: allowed: a part of GD, GED, TAD, TSD in "
                             "this order that ends with TSD")  # fmt: skip
        if len(self.stages) > 1 and self.latent_weight == 0:
            raise ValueError("latent_weight = 0: leaves the stages before TSD without a loss; give TSD alone")
        if self.latent_weight == self.soft_weight == self.hard_weight == 0:
            raise ValueError("latent_weight, soft_weight and hard_weight are all 0: at least one must be above")
        if (self.finetune is None) == (self.finetuned is None):
            raise ValueError("needs a finetuned teacher: give one of finetune and finetuned")
        return self


# ---------------------------------------------------------------- the stage table


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Which of teacher, data and loss differ between two rows of the table."""
    return [name for name in ("teacher", "data", "loss") if before[name] != after[name]]


def check_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Raises InputError unless exactly one of teacher, data and loss changes from each row to the next."""
    for before, after in pairwise(rows):
        found = changes(before, after)
        if len(found) != 1:
            said = f"{', '.join(found)} change" if found else "nothing changes"
            raise InputError(f"method_args.stages: from {before['stage']} to {after['stage']} {said}; allowed: exactly "
                             "one of teacher, data and loss")  # fmt: skip


def table(args: ErnieTinyConfig, data: Mapping[str, str], teachers: Mapping[str, str]) -> list[dict[str, Any]]:
    """A row per stage with the identities of its teacher and its data, and its losses."""
    weight = {"latent": args.latent_weight, "soft": args.soft_weight, "hard": args.hard_weight}
    rows = []
    for stage in args.stages:
        teacher, source, losses = TABLE[stage]
        used = [name for name in losses if weight[name]]
        rows.append({"stage": stage, "teacher": teachers[teacher], "data": data[source], "loss": used})
    return rows


# ---------------------------------------------------------------- stages


@dataclass
class Progressive:
    """What the stages of a run share: the data, and the rows of general text, made when first asked for."""

    config: Run
    prepared: Prepared
    data: TaskAndGeneral
    _general: dict[str, Any] = field(default_factory=dict)

    @property
    def args(self) -> ErnieTinyConfig:
        return self.config.method_args

    @property
    def names(self) -> list[StageName]:
        return list(self.args.stages)

    def general(self, artefacts: Artefacts, split: str = "train") -> Any:
        if split not in self._general:
            tokenizer = self.prepared.tokenizer(artefacts)
            self._general[split] = general_rows(self.data, tokenizer, self.config.data.length, split)
        return self._general[split]

    def rows(self, stage: StageName, artefacts: Artefacts, split: str = "train") -> Any:
        task = TABLE[stage][1] == "task"
        return self.prepared.tokens(artefacts).split(split) if task else self.general(artefacts, split)

    def teacher(self, stage: StageName, artefacts: Artefacts) -> nn.Module:
        """The stage's teacher, in evaluation mode."""
        settings = self.config.teacher
        more: dict[str, Any] = {"dtype": settings.dtype, "attention": settings.attn_implementation}
        if TABLE[stage][0] == "pretrained":
            source = artefacts.get("pretrained") or settings.pretrained
            revision = None if "pretrained" in artefacts else settings.revision
            return load_model(source, "masked", revision=revision, field="teacher.pretrained", **more).eval()
        source = artefacts.get("teacher") or self.args.finetuned
        labels = self.data.num_labels
        return load_model(source, "classification", labels, field="method_args.finetuned", **more).eval()

    def objective(self, stage: StageName, student: nn.Module, artefacts: Artefacts) -> EncoderObjective:
        """The stage's losses, with the maps of the stage before where there was one."""
        args, teacher, latent = self.args, self.teacher(stage, artefacts), None
        if args.latent_weight:
            attention = args.latent.attention != "none"
            latent = LatentLoss(
                EncoderLayers.of(student, attention=attention, field="student"),
                EncoderLayers.of(teacher, attention=attention, field="teacher"),
                rule=args.latent.layer_map,
                **args.latent.model_dump(exclude={"layer_map"}),
            )
            before = self.before(stage)
            if before is not None:
                latent.load(artefacts[f"{before.lower()}_maps"])
        return EncoderObjective(
            teacher,
            latent,
            losses=TABLE[stage][2],
            latent_weight=args.latent_weight,
            soft_weight=args.soft_weight,
            hard_weight=args.hard_weight,
            temperature=args.temperature,
        )

    def before(self, stage: StageName) -> StageName | None:
        place = self.names.index(stage)
        return self.names[place - 1] if place else None

    def student(self, stage: StageName, artefacts: Artefacts) -> nn.Module:
        """The student at the end of a stage."""
        folder = artefacts["student" if stage == "TSD" else stage.lower()]
        return load_model(folder, "classification", self.data.num_labels, field="student")

    def stage(self, name: StageName) -> Stage:
        """Trains a stage: artefacts `student` or, before TSD, the stage's name in small letters and `<name>_maps`."""
        last = name == "TSD"
        made: list[EncoderObjective] = []

        def build(context: RunContext) -> LMSetup:
            artefacts, before = dict(context.artefacts), self.before(name)
            student = runs.open_student(self.config, self.prepared, artefacts) if before is None else self.student(
                before, artefacts
            )  # fmt: skip
            made.append(self.objective(name, student, artefacts))
            rows, tokenizer = self.rows(name, artefacts), self.prepared.tokenizer(artefacts)
            if last:
                return runs.make_setup(self.config, self.prepared, context, student, made[0], dataset=rows)
            return LMSetup(student, tokenizer, made[0], rows, Collator(tokenizer, task="classification"))

        budget = self.args.stages[name].of(self.config.train, last=last)
        inner = TransformersStage(name, budget, build, artefact="student" if last else name.lower())

        def run(context: RunContext) -> Artefacts:
            artefacts = inner.run(context)
            if not made[0].compares:
                return artefacts
            path = context.folder / f"{name.lower()}_maps.safetensors"
            if context.is_main:
                made[0].auxiliary["latent"].save(path)
            context.accelerator.wait_for_everyone()
            return {**artefacts, f"{name.lower()}_maps": path}

        return Procedure(name, run)

    def boundaries(self, context: RunContext) -> Artefacts:
        """`stages_table`: the table with identities, and L_lat on held-out text at the end of every stage."""
        from kdcore.gpu import module_fingerprint

        artefacts, path = dict(context.artefacts), context.folder / "stages_table.json"
        if context.is_main:
            used = {TABLE[name][0]: name for name in self.names}
            teachers = {kind: module_fingerprint(self.teacher(name, artefacts)) for kind, name in used.items()}
            rows = table(self.args, self.data.names(), teachers)
            if len(rows) == len(TABLE):
                check_table(rows)
            for row, before in zip(rows, [None, *rows]):
                row["changes"] = [] if before is None else changes(before, row)
                if self.args.latent_weight:
                    row |= self.measured(row["stage"], artefacts)
            path.write_text(json.dumps(rows, indent=2))
        context.accelerator.wait_for_everyone()
        return {"stages_table": path}

    def measured(self, stage: StageName, artefacts: Artefacts) -> dict[str, float]:
        """L_lat of the stage's student: against the finetuned teacher on task text, and as its own and next stage."""
        student = self.student(stage, artefacts).to(ev.run_device()).eval()
        following = self.names[self.names.index(stage) + 1 :][:1]
        maps = artefacts[f"{stage.lower()}_maps"]
        settings = {TABLE[name][:2]: name for name in ("TSD", stage, *following)}  # some stages share teacher and data
        values = {key: self.latent_loss(name, student, maps, artefacts) for key, name in settings.items()}
        found = {"latent_task": values[TABLE["TSD"][:2]], "latent": values[TABLE[stage][:2]]}
        if following:
            found["jump"] = values[TABLE[following[0]][:2]] - found["latent"]
        return found

    def latent_loss(self, stage: StageName, student: nn.Module, maps: Path, artefacts: Artefacts) -> float:
        """Mean of (1) over held-out text of a stage with its teacher, for any student and maps."""
        objective = self.objective(stage, student, artefacts)
        objective.auxiliary["latent"].load(maps)  # type: ignore[operator]
        rows = ev.spaced(self.rows(stage, artefacts, "validation"), 256)
        collate = Collator(self.prepared.tokenizer(artefacts), task="classification")
        return objective.mean_latent(student, evaluation_batches(rows, collate, 32))


# ---------------------------------------------------------------- the method


def check(config: Run, data: TaskAndGeneral) -> None:
    """Raises InputError for what would fail in a later stage."""
    args = config.method_args
    if config.task != "classification":
        raise InputError(f"task = '{config.task}': ernie_tiny is for encoders; give task: classification")
    if config.student.adapters is not None or config.teacher.adapters is not None:
        raise InputError("adapters: ernie_tiny trains all weights of an encoder; leave them out")
    if config.teacher.cache is not None or config.teacher.served is not None:
        raise InputError("teacher.cache, teacher.served: the losses need the teacher's layers; leave them out")
    if len(args.stages) == len(TABLE):
        check_table(table(args, data.names(), {"pretrained": "pretrained", "finetuned": "finetuned"}))
    shapes = [layers_and_heads(model) for model in (config.student, config.teacher)]
    if args.latent_weight and all(shapes):
        (layers, heads), (teacher_layers, teacher_heads) = shapes  # type: ignore[misc]
        layer_map(layers, teacher_layers, args.latent.layer_map)
        if args.latent.attention != "none" and heads != teacher_heads:
            raise InputError(
                f"student.config.num_attention_heads = {heads}: the teacher has {teacher_heads}, and attention is "
                "compared head by head; give the same number, or method_args.latent.attention: none"
            )


def stages(config: Run, context: RunContext) -> list[Stage]:
    """Tokenizer, the two teachers, the stages of `method_args.stages`, and the measures at their boundaries."""
    plain = runs.prepare(config)
    general = [load_data(source, config.seed) for source in config.method_args.general]
    data = TaskAndGeneral(**vars(plain.data), general=general)
    check(config, data)
    prepared = Prepared(config, data)
    run = Progressive(config, prepared, data)
    found: list[Stage] = [runs.tokenizer_stage(config, prepared), *teachers(run)]
    for name in run.names:
        stage = run.stage(name)
        if name == "GD":
            stage = CachedStage(stage, general_identity(run))
        found.append(stage)
    return [*found, Procedure("boundaries", run.boundaries)]


def teachers(run: Progressive) -> list[Stage]:
    """The pretrained teacher, by masked language modelling on general text, and the finetuned one, both cached."""
    config, args = run.config, run.args

    def pretrain(context: RunContext) -> LMSetup:
        tokenizer = run.prepared.tokenizer(context.artefacts)
        network = from_config(config.teacher, "masked", tokenizer, None, field="teacher")
        rows = run.general(dict(context.artefacts)).remove_columns("labels")
        return LMSetup(network, tokenizer, TokenObjective(None), rows, Collator(tokenizer, task="masked"))

    def finetune(context: RunContext) -> LMSetup:
        source = context.artefacts.get("pretrained") or config.teacher.pretrained
        network = load_model(source, "classification", run.data.num_labels, field="teacher.pretrained")
        return runs.make_setup(config, run.prepared, context, network, ClassificationObjective())

    before = {"pretraining": None if config.teacher.train is None else config.teacher.train.model_dump(mode="json")}
    tuned = config.teacher.model_copy(update={"train": args.finetune})
    return [
        *runs.teacher_stage(config, run.prepared, name="pretrained", build=pretrain, fingerprint=run.data.sources()),
        *runs.teacher_stage(
            config, run.prepared, model=tuned, build=finetune, fingerprint={**before, **run.data.sources()}
        ),
    ]


def general_identity(run: Progressive) -> dict[str, Any]:
    """What the result of GD depends on: no finetuning, no labels, no later stage."""
    import transformers

    from kd_llm import __version__

    config, args = run.config, run.args
    return {
        "version": [__version__, torch.__version__, transformers.__version__],
        **{name: getattr(config, name).model_dump(mode="json") for name in ("teacher", "student", "tokenizer")},
        # A tokenizer that is trained has seen the task's text; the head, which GD leaves alone, has its classes.
        "contents": run.data.digest() if runs.tokenizer_source(config) is None else run.data.general_digest(),
        "classes": run.data.num_labels,
        "length": config.data.length,
        "train": args.stages["GD"].of(config.train, last=False).model_dump(mode="json"),
        "latent": [args.latent.model_dump(mode="json"), args.latent_weight],
        "seed": config.seed,
        **run.data.sources(),
    }


def evaluate(config: Run, artefacts: Artefacts) -> dict[str, Any]:
    """Metrics of student and teacher on the task's test split, and of the boundaries:

    latent_task/<stage>: L_lat against the finetuned teacher on held-out task text, at the stage's end; jump/<stage>:
    how L_lat rises with the next stage's teacher and data; jumps: their sum.
    """
    result = ev.evaluate(config, artefacts)
    rows = json.loads(artefacts["stages_table"].read_text())
    for row in rows:
        for name in ("latent_task", "jump"):
            if name in row:
                result[f"{name}/{row['stage']}"] = row[name]
    if any("jump" in row for row in rows):
        result["jumps"] = sum(row.get("jump", 0.0) for row in rows)
    return result


METHOD = Method("ernie_tiny", __doc__, LLMRun[ErnieTinyConfig], stages, evaluate, ev.predict)
