"""The typed configs as the dataclasses that nerfstudio's command line and config.yml want, with one source for both."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, TypeVar

import tyro
from pydantic import BaseModel

from kd_nerf.engine.fields import FieldConfig
from kd_nerf.methods.pvd import PVDConfig
from kdcore.config import Config, parse

C = TypeVar("C", bound=Config)


def as_dataclass(name: str, config: type[BaseModel], **defaults: Any) -> Any:
    """A dataclass with the fields, defaults and descriptions of a config class; `defaults` replace some."""
    members: list[Any] = []
    for key, info in config.model_fields.items():
        kind = Annotated[info.annotation, tyro.conf.arg(help=info.description)]  # type: ignore[name-defined]
        members.append((key, kind, dataclasses.field(default=defaults.get(key, info.default))))
    # config.yml names the class by its module, where it has to be found again
    namespace = {"__doc__": config.__doc__, "__module__": __name__}
    return dataclasses.make_dataclass(name, members, namespace=namespace)


FieldSettings = as_dataclass("FieldSettings", FieldConfig)
PVDSettings = as_dataclass("PVDSettings", PVDConfig)


def typed(config: type[C], settings: Any, source: str) -> C:
    """The validated config of such a dataclass; InputError names what is wrong with it."""
    return parse(config, dataclasses.asdict(settings), source=source)


def untyped(settings: Any, config: BaseModel) -> Any:
    """The dataclass `settings` (a class) with the values of a config, those it knows."""
    known = {member.name for member in dataclasses.fields(settings)}
    return settings(**{key: value for key, value in config.model_dump().items() if key in known})
