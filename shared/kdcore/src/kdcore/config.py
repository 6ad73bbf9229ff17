"""Typed configs: YAML in, pydantic models out, `key=value` overrides, and messages that name the field.

Every config class derives from `Config`, which forbids unknown keys. `parse` is the one way from a mapping to a
config: whatever is wrong with it comes back as one `InputError` that names each field, the value given and what is
allowed, with a suggestion for a misspelt key.
"""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from kdcore.errors import InputError, did_you_mean


class Config(BaseModel):
    """Base of every config class: unknown keys are refused, defaults are validated too."""

    model_config = ConfigDict(extra="forbid", validate_default=True, validate_assignment=True)


C = TypeVar("C", bound=Config)


class MethodConfig(Config):
    """Base of a method's `method_args`: its defaults are the paper's."""


class OptimizerConfig(Config):
    name: Literal["sgd", "adam", "adamw", "rmsprop"] = Field("sgd", description="optimiser of torch.optim")
    lr: float = Field(0.05, gt=0, description="base learning rate")
    momentum: float = Field(0.9, ge=0, lt=1, description="momentum of sgd and rmsprop")
    nesterov: bool = Field(False, description="Nesterov momentum (sgd)")
    betas: tuple[float, float] = Field((0.9, 0.999), description="moment decays of adam and adamw")
    eps: float = Field(1e-8, gt=0, description="denominator constant of adam, adamw and rmsprop")
    weight_decay: float = Field(0.0, ge=0, description="L2 penalty (sgd, adam, rmsprop) or decay (adamw)")


class ScheduleConfig(Config):
    name: Literal["constant", "cosine", "multistep", "linear"] = Field("constant", description="shape after warm-up")
    warmup_epochs: float = Field(0.0, ge=0, description="linear warm-up, in epochs")
    milestones: list[float] = Field(default_factory=list, description="epochs at which multistep multiplies by gamma")
    gamma: float = Field(0.1, gt=0, le=1, description="factor of multistep")
    min_ratio: float = Field(0.0, ge=0, le=1, description="final lr / base lr of cosine and linear")
    unit: Literal["step", "epoch"] = Field("step", description="whether the rate changes every step or every epoch")
    hold_epoch: float | None = Field(None, ge=0, description="epoch from which every rate is hold_lr (averaging)")
    hold_lr: float | None = Field(None, gt=0, description="the rate from hold_epoch on, the same for all groups")

    @model_validator(mode="after")
    def _holds_a_rate(self) -> ScheduleConfig:
        if (self.hold_epoch is None) != (self.hold_lr is None):
            raise ValueError("hold_epoch and hold_lr go together: give both or neither")
        return self


class EMAConfig(Config):
    kind: Literal["constant", "power", "halflife"] = Field(
        "constant",
        description="constant decay, the power law (1 - 1/t)^(gamma+1) of EDM2 (arXiv 2312.02696), or EDM's half-life",
    )
    decay: float = Field(0.999, gt=0, lt=1, description="decay of kind=constant")
    gamma: float = Field(6.94, gt=0, description="exponent of kind=power; 6.94 is a relative width of 0.10")
    warmup: bool = Field(True, description="kind=constant: decay is min(decay, (1 + t) / (10 + t))")
    halflife: float = Field(500_000, gt=0, description="half-life of kind=halflife, in training samples")
    ramp: float | None = Field(
        0.05, gt=0, description="kind=halflife: the half-life is at most this share of the samples seen; None: no ramp"
    )


class TrainConfig(Config):
    """The budget and the mechanics of one training stage. Either `epochs` or `steps` is the budget."""

    epochs: int | None = Field(None, ge=1, description="passes over the training set")
    steps: int | None = Field(None, ge=1, description="optimiser steps; takes precedence over epochs")
    batch_size: int = Field(64, ge=1, description="samples per micro-batch, over all processes together")
    accumulation: int = Field(1, ge=1, description="micro-batches per optimiser step")
    optimizer: OptimizerConfig = Field(default_factory=lambda: OptimizerConfig.model_validate({}))
    schedule: ScheduleConfig = Field(default_factory=lambda: ScheduleConfig.model_validate({}))
    clip: float | None = Field(None, gt=0, description="maximum norm of a player's gradient")
    ema: EMAConfig | None = Field(None, description="moving average of the weights; it is what ships when set")
    precision: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="autocast type of the forward passes")
    compile: bool = Field(False, description="torch.compile of the distiller")
    num_workers: int = Field(0, ge=0, description="processes that load data")
    log_every: int = Field(10, ge=1, description="steps between two lines of metrics.jsonl")
    eval_every: int = Field(1, ge=1, description="epochs between two validations, where the stage has one")
    monitor: str | None = Field(None, description="validation metric that early stopping and `best` look at")
    mode: Literal["max", "min"] = Field("max", description="whether a larger or a smaller monitor is better")
    patience: int | None = Field(None, ge=1, description="validations without improvement before the stage stops")
    restore_best: bool = Field(False, description="end with the weights of the best monitor instead of the last")
    checkpoint_every: int = Field(500, ge=1, description="optimiser steps between two checkpoints")
    keep_checkpoints: int = Field(2, ge=1, description="checkpoints kept per stage")
    trackers: list[Literal["tensorboard", "wandb", "mlflow"]] = Field(
        default_factory=list, description="experiment trackers, through accelerate"
    )

    @model_validator(mode="after")
    def _has_a_budget(self) -> TrainConfig:
        if self.epochs is None and self.steps is None:
            raise ValueError("needs a budget: give epochs or steps")
        if (self.patience is not None or self.restore_best) and self.monitor is None:
            raise ValueError("patience and restore_best need monitor, the name of a validation metric")
        return self


class RunConfig(Config):
    """What every domain's run config has; a domain adds `teacher`, `student`, `data` and `method_args`."""

    method: str = Field(description="key of the method, as `kd list` shows it")
    seed: int = Field(0, ge=0, lt=2**31, description="seed of data split, initialisation and data order")
    train: TrainConfig = Field(
        default_factory=lambda: TrainConfig.model_validate({"epochs": 1}), description="training of the student"
    )
    compare: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="arms of `kd compare`: name -> overrides (dotted key: value)"
    )


A = TypeVar("A", bound=MethodConfig)


class MethodRunConfig(RunConfig, Generic[A]):
    """The run config of a domain whose methods have arguments; without `method_args` they have their defaults."""

    method_args: A

    @model_validator(mode="before")
    @classmethod
    def _default_arguments(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("method_args") is None:
            return {**values, "method_args": {}}
        return values


# ---------------------------------------------------------------- reading and overriding


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice (plain YAML keeps the last silently) and takes 1e-3 for a number."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key '{key}' is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes text that `_Loader` would take for a number."""


# Text in PyYAML, as YAML 1.1 has it; where a field may hold anything, no schema would turn it into a number.
_NUMBER = ("tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789"))
_Loader.add_implicit_resolver(*_NUMBER)
_Dumper.add_implicit_resolver(*_NUMBER)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises InputError that names the file when it is missing, broken or no mapping."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"config {path}: cannot be read ({error})") from None
    try:
        values = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise InputError(f"config {path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise InputError(f"config {path}: expected a mapping with a 'method:' key, got {type(values).__name__}")
    return values


def parse_override(text: str) -> tuple[str, Any]:
    """`"train.epochs=3"` -> `("train.epochs", 3)`; the value is read as YAML.

    >>> parse_override("train.optimizer.lr=0.1")
    ('train.optimizer.lr', 0.1)
    """
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals or not key or any(not part for part in key.split(".")):
        raise InputError(f"override '{text}': expected key=value, for example train.epochs=3")
    try:
        return key, yaml.load(value, Loader=_Loader)
    except yaml.YAMLError:
        raise InputError(f"override '{text}': the value is not valid YAML") from None


def override(values: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A deep copy of `values` with dotted keys set; intermediate mappings are made where they are missing or null.

    >>> override({"train": {"epochs": 1}}, {"train.epochs": 3, "method_args.alpha": 0.5})
    {'train': {'epochs': 3}, 'method_args': {'alpha': 0.5}}
    """
    result = _deep_copy(values)
    for key, value in overrides.items():
        *parents, last = key.split(".")
        target = result
        for depth, parent in enumerate(parents):
            if target.get(parent) is None:
                target[parent] = {}
            target = target[parent]
            if not isinstance(target, dict):
                raise InputError(f"override '{key}': '{'.'.join(parents[: depth + 1])}' is a value, not a section")
        target[last] = _deep_copy(value)
    return result


def _deep_copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _deep_copy(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_deep_copy(item) for item in value]
    return value


def to_yaml(config: Config) -> str:
    """The resolved config as YAML; `parse(type(config), read_yaml(...))` gives an equal config back."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def config_difference(before: Config, after: Config, *, ignore: Sequence[str] = ()) -> tuple[str, Any, Any] | None:
    """Dotted name and both values of the first field that differs, or None. `ignore` names top-level fields."""
    values = [{k: v for k, v in c.model_dump(mode="json").items() if k not in ignore} for c in (before, after)]
    return _difference(values[0], values[1], "")


def _difference(before: Any, after: Any, name: str) -> tuple[str, Any, Any] | None:
    if not (isinstance(before, dict) and isinstance(after, dict)):
        return None if before == after else (name, before, after)
    for key in {**after, **before}:
        found = _difference(before.get(key), after.get(key), f"{name}.{key}" if name else str(key))
        if found is not None:
            return found
    return None


# ---------------------------------------------------------------- validation messages


def parse(config_class: type[C], values: Mapping[str, Any], *, source: str = "config") -> C:
    """`values` as a `config_class`. Raises one InputError with a line for each thing that is wrong."""
    try:
        return config_class.model_validate(values)
    except ValidationError as error:
        lines = [_explain(config_class, item) for item in error.errors(include_url=False)]
        raise InputError(f"{source}: " + "; ".join(lines)) from None


def _explain(config_class: type[BaseModel], error: Mapping[str, Any]) -> str:
    location = [part for part in error["loc"] if not str(part).startswith(("function-", "tagged-union"))]
    field = ".".join(map(str, location)) or "config"
    kind, given = error["type"], error.get("input")
    if kind == "extra_forbidden":
        allowed = _fields_at(config_class, location[:-1])
        return f"unknown key '{field}'{did_you_mean(str(location[-1]), allowed)}"
    if kind == "missing":
        return f"'{field}' is required"
    message = error["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if kind == "value_error" and isinstance(given, Mapping | BaseModel):
        return f"'{field}' {message}"
    if kind == "literal_error":
        message = f"allowed: {error['ctx']['expected']}"
    return f"'{field}' = {given!r}: {message}"


def _fields_at(config_class: type[BaseModel], location: Sequence[Any]) -> list[str]:
    """Names of the fields of the section at `location`, for the suggestion of a misspelt key."""
    models: list[type[BaseModel]] = [config_class]
    for part in location:
        found = [
            model
            for parent in models
            if part in parent.model_fields
            for model in models_in(parent.model_fields[part].annotation)
        ]
        models = found or models
    return [name for model in models for name in model.model_fields]


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """The config classes in a field's type: of `X | None`, `list[X]` and so on, X."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, list, dict, tuple):
        return [model for part in typing.get_args(annotation) for model in models_in(part)]
    return []
