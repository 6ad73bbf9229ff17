"""The losses package as a whole: docstring examples, exports, and what importing it costs."""

import ast
import doctest
import importlib
import inspect
import pkgutil
from pathlib import Path

import pytest
import torch

from kdcore import losses

MODULES = sorted(m.name for m in pkgutil.iter_modules(losses.__path__))
TEXTBOOK = {"cosine_distance", "normalised_mse", "feature_norm", "pearson_correlation"}
FAMILIES = [m for m in MODULES if not m.startswith("_")]


@pytest.mark.parametrize("name", FAMILIES)
def test_docstring_examples(name):
    result = doctest.testmod(importlib.import_module(f"kdcore.losses.{name}"), optionflags=doctest.ELLIPSIS)
    assert result.attempted > 0
    assert result.failed == 0


def test_all_exports_every_public_function():
    public = {
        name
        for family in FAMILIES
        for name, value in vars(importlib.import_module(f"kdcore.losses.{family}")).items()
        if inspect.isfunction(value) and value.__module__ == f"kdcore.losses.{family}" and not name.startswith("_")
    }
    assert set(losses.__all__) == public
    assert list(losses.__all__) == sorted(losses.__all__)


def test_every_docstring_names_its_paper_and_shapes():
    for name in set(losses.__all__) - TEXTBOOK:
        assert "arXiv" in getattr(losses, name).__doc__, name
    for name in losses.__all__:
        doc = getattr(losses, name).__doc__
        assert "ValueError" in doc, name
        assert "->" in doc, name


@pytest.mark.parametrize("name", MODULES)
def test_losses_import_torch_and_the_standard_library_only(name):
    """Read from the source, so that nothing another module imported can hide a dependency."""
    allowed = {"torch", "math", "collections", "typing", "__future__", "kdcore"}
    tree = ast.parse((Path(losses.__path__[0]) / f"{name}.py").read_text())
    for node in ast.walk(tree):
        modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            modules = [node.module]
        for module in modules:
            assert module.split(".")[0] in allowed, module
            assert module.startswith("kdcore.losses") or not module.startswith("kdcore"), module


def test_losses_trace_without_graph_breaks():
    """torch.compile(fullgraph=True) refuses a function that would synchronise or leave the graph."""
    z, t = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([0, 1, 4, 2])

    def everything(z, t, y):
        return (
            losses.soft_target_kl(z, t, 4.0)
            + losses.jensen_shannon(z, t)
            + losses.dkd(z, t, y)
            + losses.dist(z, t)
            + losses.focal_distillation(z, t, y)
            + losses.cosine_distance(z, t)
            + losses.rkd_distance(z, t)
            + losses.rkd_angle(z, t)
            + losses.cka_linear(z, t)
            + losses.cka_unbiased(z, t)
            + losses.mmd(z, t, "rbf")
            + losses.attention_transfer(z[:, :, None, None], t[:, :, None, None])
            + losses.hinge_generator(z)
        )

    compiled = torch.compile(everything, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(z, t, y), everything(z, t, y), atol=1e-6, rtol=1e-6)
