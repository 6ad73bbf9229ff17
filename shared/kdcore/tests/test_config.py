"""Configs: what is read, overridden and said about mistakes."""

from __future__ import annotations

from typing import Literal

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field

from kdcore.config import (
    Config,
    MethodConfig,
    RunConfig,
    TrainConfig,
    config_difference,
    override,
    parse,
    parse_override,
    read_yaml,
    to_yaml,
)
from kdcore.errors import InputError


class Arguments(MethodConfig):
    alpha: float = Field(0.5, ge=0, le=1, description="weight")
    kind: Literal["soft", "hard"] = Field("soft", description="which targets")


class ToyRun(RunConfig):
    method_args: Arguments = Field(default_factory=Arguments)
    heads: list[Arguments] = Field(default_factory=list)


def parse_toy(**values) -> ToyRun:
    return parse(ToyRun, {"method": "toy", **values}, source="toy.yaml")


# ---------------------------------------------------------------- messages


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"method_args": {"alfa": 1}}, ["unknown key 'method_args.alfa'", "did you mean 'alpha'?"]),
        ({"trian": {}}, ["unknown key 'trian'", "did you mean 'train'?"]),
        ({"train": {"epochs": 1, "optimizer": {"lrr": 1}}}, ["'train.optimizer.lrr'", "did you mean 'lr'?"]),
        ({"train": {"epochs": 1, "ema": {"decoy": 1}}}, ["'train.ema.decoy'", "did you mean 'decay'?"]),
        ({"heads": [{}, {"zzz": 1}]}, ["'heads.1.zzz'", "allowed: alpha, kind"]),
        ({"method_args": {"alpha": 1.5}}, ["'method_args.alpha' = 1.5", "less than or equal to 1"]),
        ({"method_args": {"alpha": "much"}}, ["'method_args.alpha' = 'much'", "valid number"]),
        ({"method_args": {"kind": "softer"}}, ["'method_args.kind' = 'softer'", "allowed: 'soft' or 'hard'"]),
        ({"seed": -1}, ["'seed' = -1", "greater than or equal to 0"]),
        ({"train": {"epochs": 0}}, ["'train.epochs' = 0", "greater than or equal to 1"]),
        ({"train": {"batch_size": 8}}, ["'train' needs a budget: give epochs or steps"]),
        ({"train": {"epochs": 1, "patience": 2}}, ["'train'", "need monitor"]),
    ],
)
def test_message_names_field_value_and_what_is_allowed(values, parts):
    with pytest.raises(InputError) as error:
        parse_toy(**values)
    message = str(error.value)
    assert message.startswith("toy.yaml: ")
    for part in parts:
        assert part in message


def test_every_mistake_is_named_in_one_message():
    with pytest.raises(InputError) as error:
        parse_toy(seed=-1, method_args={"alpha": 2, "kind": "no"}, unknown=1)
    for field in ("'seed'", "'method_args.alpha'", "'method_args.kind'", "'unknown'"):
        assert field in str(error.value)


def test_missing_field_is_named():
    with pytest.raises(InputError, match="'method' is required"):
        parse(ToyRun, {})


def test_assignment_is_validated():
    config = parse_toy()
    with pytest.raises(ValueError, match="less than or equal to 1"):
        config.method_args.alpha = 3


# ---------------------------------------------------------------- YAML


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("method: toy\nmethod: other\n", "key 'method' is given twice"),
        ("train:\n  epochs: 1\n  epochs: 2\n", "key 'epochs' is given twice"),
        ("- method\n", "expected a mapping with a 'method:' key, got list"),
        ("", "got NoneType"),
        ("method: [toy\n", "not valid YAML"),
        ("method: !!python/object/apply:os.system ['true']\n", "not valid YAML"),
    ],
)
def test_broken_yaml(tmp_path, text, message):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        read_yaml(path)
    assert message in str(error.value)
    assert str(path) in str(error.value)


def test_unreadable_yaml(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        read_yaml(tmp_path / "absent.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"method: \xff\xfe")
    with pytest.raises(InputError, match="cannot be read"):
        read_yaml(tmp_path / "bytes.yaml")


def test_resolved_config_reads_back_equal():
    config = parse_toy(
        seed=3,
        method_args={"alpha": 0.125},
        heads=[{"kind": "hard"}],
        train={"steps": 5, "ema": {"kind": "power"}, "optimizer": {"lr": 1e-7, "betas": [0.5, 0.9]}},
        compare={"ce": {"method_args.alpha": 0.0}},
    )
    assert parse(ToyRun, yaml.safe_load(to_yaml(config))) == config


@settings(deadline=None)
@given(
    alpha=st.floats(0, 1),
    lr=st.floats(1e-300, 1e300),
    seed=st.integers(0, 2**31 - 1),
    arm=st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=8),
)
def test_any_config_reads_back_equal(alpha, lr, seed, arm):
    train = {"epochs": 2, "optimizer": {"lr": lr}}
    config = parse_toy(seed=seed, method_args={"alpha": alpha}, train=train, compare={arm: {"seed": 1}})
    assert parse(ToyRun, yaml.safe_load(to_yaml(config))) == config


# ---------------------------------------------------------------- overrides


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train.epochs=3", ("train.epochs", 3)),
        ("a=1e-3", ("a", 0.001)),  # YAML 1.1 wants a point, people do not
        ("a=-2E5", ("a", -2e5)),
        ("a=1.0e-3", ("a", 0.001)),
        ("a='1e-3'", ("a", "1e-3")),
        ("a=1e-3x", ("a", "1e-3x")),
        ("a=[1, 2]", ("a", [1, 2])),
        ("a=null", ("a", None)),
        ("a=", ("a", None)),
        ("a={b: c=d}", ("a", {"b": "c=d"})),
        (" a =x=y", ("a", "x=y")),
    ],
)
def test_override_values_are_yaml(text, expected):
    assert parse_override(text) == expected


def test_number_without_a_point_is_a_number():
    assert parse_toy(train={"epochs": 1, "optimizer": {"lr": "1e-3"}}).train.optimizer.lr == 0.001


def test_number_without_a_point_is_one_without_a_schema_too(tmp_path):
    """And text that looks like a number, such as the name of an arm, stays text in the config of a run."""
    path = tmp_path / "a.yaml"
    path.write_text("anything: {eta_min: 1e-5}")
    assert read_yaml(path) == {"anything": {"eta_min": 1e-5}}
    config = parse_toy(compare={"12e4567": {"seed": 1}})
    path.write_text(to_yaml(config))
    assert parse(ToyRun, read_yaml(path)) == config


@pytest.mark.parametrize("text", ["epochs", "=3", "train..epochs=3", ".a=1", "a=[1"])
def test_override_that_is_none(text):
    with pytest.raises(InputError, match="override"):
        parse_override(text)


def test_override_into_a_value():
    with pytest.raises(InputError, match=r"override 'train\.epochs\.x': 'train\.epochs' is a value, not a section"):
        override({"train": {"epochs": 1}}, {"train.epochs.x": 2})


def test_override_makes_sections_and_leaves_its_input_alone():
    values = {"train": None, "list": [{"a": 1}]}
    result = override(values, {"train.optimizer.lr": 0.1, "teacher.name": "x"})
    assert result == {"train": {"optimizer": {"lr": 0.1}}, "list": [{"a": 1}], "teacher": {"name": "x"}}
    result["list"][0]["a"] = 2
    assert values == {"train": None, "list": [{"a": 1}]}


# ---------------------------------------------------------------- differences


def test_config_difference_names_the_first_field():
    before = parse_toy(train={"epochs": 3})
    assert config_difference(before, parse_toy(train={"epochs": 3})) is None
    after = parse_toy(train={"epochs": 3, "optimizer": {"lr": 0.5}}, method_args={"alpha": 0.25})
    assert config_difference(before, after) == ("train.optimizer.lr", 0.05, 0.5)
    assert config_difference(before, parse_toy(train={"epochs": 3, "ema": {}}))[:2] == ("train.ema", None)


def test_config_difference_can_ignore_top_level_fields():
    arms = parse_toy(compare={"ce": {"method_args.alpha": 0.0}})
    assert config_difference(parse_toy(), arms, ignore=("compare",)) is None
    assert config_difference(parse_toy(), arms) == ("compare.ce", None, {"method_args.alpha": 0.0})


def test_sections_of_every_config_class_are_described():
    for model in (RunConfig, TrainConfig):
        for name, field in model.model_fields.items():
            described = field.description or (
                isinstance(field.annotation, type) and issubclass(field.annotation, Config)
            )
            assert described, f"{model.__name__}.{name} has no description"
