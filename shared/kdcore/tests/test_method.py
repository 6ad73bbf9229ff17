"""Method discovery by entry points, cards from docstrings, config names."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest

from kdcore import method as m
from kdcore.errors import InputError
from kdcore.method import Card


def test_card_from_docstring():
    doc = "A Title (of parts):\nsubtitle (arXiv 1503.02531, 2015).\n\nL = CE\n"
    card = Card.from_doc("key", doc, "kd_toy")
    assert (card.key, card.title, card.paper) == ("key", "A Title (of parts): subtitle", "arXiv 1503.02531, 2015")
    assert (card.domain, card.package) == ("toy", "kd_toy")
    assert card.doc == doc.strip()


@pytest.mark.parametrize("doc", ["No paper here.", "No paper here"])
def test_card_without_paper(doc):
    assert (Card.from_doc("key", doc, "kd_toy").title, Card.from_doc("key", doc, "kd_toy").paper) == (
        "No paper here",
        "",
    )


def test_installed_methods_are_found(toy):
    points = m.installed()
    assert {"toy", "plain", "ghost"} <= points.keys()
    assert points["toy"].value == "kd_toy.methods.toy:METHOD"


def test_cards_are_read_without_importing_the_method(toy):
    code = (
        "import sys; from kdcore.method import card, installed; point = installed()['toy']; "
        "print(card(point).title, card(point).paper); print([n for n in ('torch', point.module) if n in sys.modules])"
    )
    env = {"PYTHONPATH": str(sys.path[0])}
    output = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    assert output.splitlines() == ["Toy Distillation arXiv 0000.00000, 2000", "[]"]


def test_card_of_a_missing_module_or_package(toy):
    with pytest.raises(InputError, match=r"'ghost': its module kd_toy\.methods\.ghost is missing from package kd_toy"):
        m.card(m.installed()["ghost"])
    with pytest.raises(InputError, match="package kd_absent cannot be found"):
        m.card(EntryPoint("x", "kd_absent.methods.x:METHOD", m.GROUP))


def test_get_loads_the_method(toy):
    method = m.get("toy")
    assert method.key == "toy"
    assert method.card == m.card(m.installed()["toy"])


def test_unknown_method_has_a_suggestion(toy):
    with pytest.raises(InputError, match=r"method 'toi' is not installed; did you mean 'toy'\?"):
        m.get("toi")


def test_find_config(toy):
    assert m.find_config("toy/small").name == "small.yaml"
    (toy / "mine.yaml").write_text("method: toy\n")
    assert m.find_config("mine.yaml").name == "mine.yaml"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("toy/smal", "method 'toy' has no config 'smal'; did you mean 'small'?"),
        ("toi/small", "method 'toi' is not installed; did you mean 'toy'?"),
        ("toy", "expected key/name"),
        ("toy/", "expected key/name"),
        ("toy/../small", "expected key/name"),
        ("absent.yaml", "no such file"),
        ("plain/small", "method 'plain' has no config 'small'"),
    ],
)
def test_config_that_is_not_there(toy, name, message):
    with pytest.raises(InputError) as error:
        m.find_config(name)
    assert message in str(error.value)


def test_load_config_applies_overrides(toy):
    method, config = m.load_config("toy/small", ["train.steps=3", "method_args.alpha=1", "seed=7"])
    assert (method.key, config.train.steps, config.method_args.alpha, config.seed) == ("toy", 3, 1.0, 7)


def test_load_config_names_the_config_in_its_message(toy):
    with pytest.raises(InputError, match=r"toy/small: unknown key 'method_args\.alfa'; did you mean 'alpha'\?"):
        m.load_config("toy/small", ["method_args.alfa=1"])


def test_shipped_config_cannot_turn_into_another_method(toy):
    with pytest.raises(InputError, match="it is a config of method 'plain', not of 'toy'"):
        m.load_config("toy/small", ["method=plain"])


def test_config_file_without_method(toy):
    (toy / "none.yaml").write_text("seed: 1\n")
    with pytest.raises(InputError, match=r"'method' is required; installed: .*toy"):
        m.load_config("none.yaml")


def test_arm_of_another_method_starts_from_its_defaults(toy):
    values = {"method": "toy", "seed": 4, "method_args": {"alpha": 0.9}, "compare": {"x": {}}}
    method, config = m.arm_config(values, {"method": "plain", "method_args.smoothing": 0.2})
    assert (method.key, config.seed, config.compare) == ("plain", 4, {})
    assert config.method_args.model_dump() == {"smoothing": 0.2}
    method, config = m.arm_config(values, {"method_args.nan_at": 3})
    assert (method.key, config.method_args.alpha, config.method_args.nan_at) == ("toy", 0.9, 3)


# ---------------------------------------------------------------- Python configs


def _reading(monkeypatch, read):
    toy = m.get("toy")
    monkeypatch.setattr(m, "get", lambda key: dataclasses.replace(toy, read=read) if key == "toy" else toy)


def test_python_config_is_read_by_the_method_that_it_names(toy, monkeypatch):
    (toy / "mine.py").write_text("method = 'toy'\nraise SystemExit('not to be run by kdcore')\n")
    seen = []

    def read(path):
        seen.append(path.name)
        return {"method": "toy", "train": {"steps": 2}}

    _reading(monkeypatch, read)
    method, config = m.load_config("mine.py", ["train.steps=3", "seed=5"])
    assert (method.key, config.train.steps, config.seed, seen) == ("toy", 3, 5, ["mine.py"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed = 1\n", "needs a line method = 'key'; installed: "),
        ("method = 3\n", "needs a line method = 'key'; installed: "),
        ("method = 'toy'\n", "configs of method 'toy' are YAML files"),
        ("method = (\n", "cannot be read as Python"),
    ],
)
def test_python_config_that_cannot_be_read(toy, text, message):
    (toy / "mine.py").write_text(text)
    with pytest.raises(InputError) as error:
        m.load_config("mine.py")
    assert message in str(error.value)
