"""`kd list` and `kd show`."""

from __future__ import annotations

import importlib
import inspect
import sys
from importlib.metadata import EntryPoint
from typing import Any

from rich.table import Table
from rich.text import Text

from kdcore.cli.console import wide_console
from kdcore.errors import InputError, did_you_mean
from kdcore.method import Card, Method, card, get, installed, shipped_configs


def list_methods(domain: str | None) -> None:
    """Every installed method by domain. What cannot be read is said on stderr and left out."""
    cards: dict[str, list[Card]] = {}
    for point in installed().values():
        cards.setdefault(_domain(point), [])
        try:
            found = card(point)
        except (InputError, SyntaxError) as error:
            print(f"note: {error}", file=sys.stderr)
        else:
            cards[found.domain].append(found)
    if domain is not None and domain not in cards:
        raise InputError(f"domain '{domain}': no installed method{did_you_mean(domain, cards)}")
    console = wide_console()
    if not cards:
        console.print("No method is installed; install a package such as kd-classification.")
    for name, found in cards.items():
        if found and domain in (None, name):
            console.print(_table(name, found))


def _domain(point: EntryPoint) -> str:
    return point.module.split(".")[0].removeprefix("kd_")


def _table(domain: str, cards: list[Card]) -> Table:
    table = Table("key", "title", "paper", "configs", title=domain, title_justify="left", title_style="bold", box=None)
    for item in cards:
        table.add_row(item.key, item.title, item.paper, " ".join(shipped(item.key)))
    return table


def shipped(key: str) -> list[str]:
    """Names of the configs that come with a method."""
    return [path.stem for path in shipped_configs(key)]


# ---------------------------------------------------------------- one method


def show(key: str) -> None:
    """What a method is, from its docstring, its roles, and every field of its config."""
    from kdcore.cli.fields import rows

    method = get(key)
    console = wide_console()
    console.print(f"{key}  ({method.card.package})\n{method.card.doc}\n", soft_wrap=True)
    for name, text in _roles(method):
        console.print(f"{name}: {text}" if text else name, soft_wrap=True)
    console.print()
    table = Table("field", "default", "allowed", "meaning", box=None)
    for row in rows(method.config, first="method_args"):
        name = Text(row.name, style="bold") if row.section else Text(_indented(row.name))
        name.no_wrap = True
        table.add_row(name, row.default, row.allowed, row.meaning)
    console.print(table)
    names = shipped(key)
    console.print("configs: " + (", ".join(f"{key}/{name}" for name in names) or "none"))


def _indented(name: str) -> str:
    """`  lr` for `train.optimizer.lr`: its section is the line above."""
    section, _, last = name.rpartition(".")
    return f"  {last}" if section else last


def _roles(method: Method[Any]) -> list[tuple[str, str]]:
    """The networks that a run names, and the distillers of the method's module with what they are made of."""
    from kdcore.cli.fields import models_in, summary
    from kdcore.config import RunConfig
    from kdcore.distiller import Distiller

    roles = []
    for name, field in method.config.model_fields.items():
        models = models_in(field.annotation)
        if models and name not in RunConfig.model_fields and name not in ("data", "method_args"):
            roles.append((name, summary(models[0])))
    module = importlib.import_module(installed()[method.key].module)
    for value in vars(module).values():
        if inspect.isclass(value) and issubclass(value, Distiller) and value.__module__ == module.__name__:
            roles.append((f"class {value.__name__}{_parameters(value)}", summary(value)))
    return roles


def _parameters(distiller: type) -> inspect.Signature:
    """The constructor without its annotations."""
    signature = inspect.signature(distiller)
    plain = [parameter.replace(annotation=parameter.empty) for parameter in signature.parameters.values()]
    return signature.replace(parameters=plain, return_annotation=signature.empty)
