"""The fields of a config class as rows of a table: dotted name, default, what is allowed, meaning."""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import annotated_types as limits
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from kdcore.config import Config, MethodConfig, RunConfig, models_in
from kdcore.distiller import Distiller

__all__ = ["Row", "allowed", "models_in", "rows", "summary"]


@dataclass(frozen=True)
class Row:
    """A field, or a section (`section` true) whose fields follow. `name` is the dotted name that overrides use."""

    name: str
    default: str
    allowed: str
    meaning: str
    section: bool = False


def rows(config: type[BaseModel], *, first: str | None = None) -> list[Row]:
    """Every field; a section's plain fields come before its sections, and the section `first` before all.

    A section that comes twice is listed once; its other names refer to it.
    """
    shown = [name for name, field in config.model_fields.items() if not field.exclude]
    names = sorted(shown, key=lambda name: name != first)
    homes: dict[type[BaseModel], str] = {}
    level = [(name, config.model_fields[name]) for name in names]
    while level:  # breadth first, so that a section's home is its shortest name
        deeper = []
        for name, field in level:
            for model in models_in(field.annotation):
                if homes.setdefault(model, name) == name:
                    deeper += [(f"{name}.{inner}", item) for inner, item in model.model_fields.items()]
        level = deeper
    names.sort(key=lambda name: (name != first, bool(models_in(config.model_fields[name].annotation))))
    return [row for name in names for row in _rows(name, config.model_fields[name], _default(config, name), homes)]


def _rows(name: str, field: FieldInfo, default: Any, homes: Mapping[type[BaseModel], str]) -> list[Row]:
    models = models_in(field.annotation)
    if not models:
        return [Row(name, _text(default), allowed(field), field.description or "")]
    model, container = models[0], typing.get_origin(field.annotation)
    kind = "list of sections" if container is list else "mapping of sections" if container is dict else "section"
    kind += " or null" if type(None) in typing.get_args(field.annotation) else ""
    kind += "" if homes[model] == name else f", fields as in {homes[model]}"
    result = [Row(name, "null" if default is None else "", kind, field.description or summary(model), section=True)]
    if homes[model] == name:
        inside = sorted(model.model_fields, key=lambda inner: bool(models_in(model.model_fields[inner].annotation)))
        for inner in inside:
            value = getattr(default, inner) if isinstance(default, model) else _default(model, inner)
            result += _rows(f"{name}.{inner}", model.model_fields[inner], value, homes)
    return result


def _default(config: type[BaseModel], name: str) -> Any:
    field = config.model_fields[name]
    return field.get_default(call_default_factory=True) if not field.is_required() else PydanticUndefined


def _text(value: Any) -> str:
    if value is PydanticUndefined:
        return "required"
    return value if isinstance(value, str) else json.dumps(value, default=str)


def allowed(field: FieldInfo) -> str:
    """Type and range of a field: `number, >= 0, <= 1`."""
    bounds = []
    for limit in field.metadata:
        for kind, sign in ((limits.Ge, ">="), (limits.Gt, ">"), (limits.Le, "<="), (limits.Lt, "<")):
            if isinstance(limit, kind):
                bounds.append(f"{sign} {getattr(limit, kind.__name__.lower())}")
        if isinstance(limit, limits.MinLen):
            bounds.append(f"at least {limit.min_length}")
    return ", ".join([_kind(field.annotation), *bounds])


_KINDS = {int: "integer", float: "number", str: "text", bool: "true or false", type(None): "null", Any: "any value"}


def _kind(annotation: Any) -> str:
    if annotation in _KINDS:
        return _KINDS[annotation]
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_kind(part) for part in arguments)
    if origin is list:
        return f"list of {_kind(arguments[0])}"
    if origin is tuple:
        return f"[{', '.join(_kind(part) for part in arguments)}]"
    if origin is dict or annotation is dict:
        return "mapping"
    if origin is typing.Annotated:
        return _kind(arguments[0])
    return getattr(annotation, "__name__", str(annotation))


def summary(documented: type) -> str:
    """First paragraph of a class's docstring, or of the class it refines; the general bases say nothing of it."""
    for base in documented.__mro__:
        if base in (Config, MethodConfig, RunConfig, BaseModel, Distiller):
            return ""
        if doc := vars(base).get("__doc__"):
            return " ".join(doc.strip().split("\n\n")[0].split())
    return ""
