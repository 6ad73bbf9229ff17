"""Gradient checkpointing: blocks are computed again under the adapters and processors that the first pass had."""

import pytest
import torch
from torch import nn

from kd_diffusion import runs
from kd_diffusion.engine.adversarial import Discriminator
from kd_diffusion.engine.recompute import enable_checkpointing, recomputed
from kd_diffusion.integrations.pipelines import open_pipeline
from kd_diffusion.methods import snoopi, swiftbrush
from kdcore.config import parse
from kdcore.errors import InputError

F64 = torch.float64
LORA = {"rank": 2, "alpha": 4, "targets": ["to_q", "to_v"]}


def distiller_of(folder, module, **args):
    """In float64, with adapters that do something; the same weights and noise each time."""
    values = {
        "method": module.METHOD.key,
        "teacher": {"pretrained": str(folder)},
        "data": {"name": "digits", "image_size": 16},
        "method_args": {"lora": LORA, **args},
        "train": {"steps": 1, "batch_size": 2},
    }
    config, opened = parse(module.METHOD.config, values), open_pipeline(folder)
    networks = runs.adapter_networks(config, opened, {}, None)
    for part in (networks.generator, networks.fake, networks.conditioner):
        part.double()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in networks.fake.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=F64))
    torch.manual_seed(0)  # of a discriminator's head
    distiller = module.build(config, networks)
    if distiller.discriminator is not None:
        distiller.discriminator.double()
    return distiller


def batch(distiller):
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1), dtype=F64)
    return {**distiller.conditioner.tokens(["a bold seven", "a thin three"]), "x": x}


def gradients(distiller, player):
    """As the loop takes them: the others' parameters need none."""
    own = {id(p) for found in distiller.players() if found.name == player for p in found.module.parameters()}
    others = [p for p in distiller.parameters() if p.requires_grad and id(p) not in own]
    for parameter in others:
        parameter.requires_grad_(False)
    distiller.train()
    distiller.loss(batch(distiller), player).total().backward()
    return {name: p.grad for name, p in distiller.named_parameters() if p.grad is not None}


def recomputations(monkeypatch):
    """Counts the blocks that are run for a second time."""
    calls = []
    original = recomputed.__globals__["checkpoint"]

    def counted(run, *args, **options):
        return original(lambda *a: (calls.append(torch.is_grad_enabled()), run(*a))[1], *args, **options)

    monkeypatch.setitem(recomputed.__globals__, "checkpoint", counted)
    return calls


@pytest.fixture
def double_noise(monkeypatch):
    from kd_diffusion.engine.draws import Turn

    plain = Turn.normal
    monkeypatch.setattr(Turn, "normal", lambda self, shape, dtype=F64: plain(self, shape, F64))


NEGATIVES = {"negatives": {"terms": ["bold", "tilted left", "three"], "count": 20, "alpha_low": 0.5}}


@pytest.mark.parametrize("player", ["generator", "fake"])
@pytest.mark.parametrize(("module", "args"), [(swiftbrush, {"gan": {"host": "teacher_features"}}), (snoopi, NEGATIVES)])
def test_gradients_are_those_without_recomputation(tiny_text_folder, double_noise, monkeypatch, module, args, player):
    plain = gradients(distiller_of(tiny_text_folder, module, **args), player)
    calls = recomputations(monkeypatch)
    again = gradients(distiller_of(tiny_text_folder, module, gradient_checkpointing=True, **args), player)
    assert len(calls) > 4
    assert plain.keys() == again.keys()
    assert any(bool(value.abs().max() > 1e-9) for value in plain.values())
    for name, value in plain.items():
        torch.testing.assert_close(again[name], value, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("last", [None, "default"])
def test_the_other_view_may_run_before_the_backward_pass(tiny_text_folder, last):
    """Teacher and fake score share a network: a pass of one with the other's adapters would be another function."""
    found = []
    for checkpointing in (False, True):
        distiller = distiller_of(tiny_text_folder, swiftbrush, gradient_checkpointing=checkpointing)
        views = {None: distiller.real_score, "default": distiller.fake}
        other = views.pop(last)
        (view,) = views.values()
        condition = distiller.condition(batch(distiller))
        x_t = batch(distiller)["x"].requires_grad_()
        t = torch.tensor([300, 700])
        loss = view.network.train() and view(x_t, t, condition).square().sum()
        with torch.no_grad():
            other(x_t, t, condition)
        loss.backward()
        layer = view._layers[0]
        assert layer._disable_adapters == (last is None)  # as the other view left it
        found.append([x_t.grad, *(p.grad for p in view.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1]) > (1 if last is None else 0)
    for first, second in zip(*found, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-9, atol=1e-12)


def test_a_discriminators_own_trunk_is_recomputed_too(tiny_text_folder):
    distiller = distiller_of(tiny_text_folder, swiftbrush, gan={"host": "own_trunk"}, gradient_checkpointing=True)
    assert isinstance(distiller.discriminator, Discriminator)
    assert distiller.discriminator.trunk.network.is_gradient_checkpointing


def test_networks_that_cannot_are_named():
    with pytest.raises(InputError, match=r"method_args\.gradient_checkpointing: Linear cannot"):
        enable_checkpointing(nn.Linear(1, 1))


def test_an_adversarial_term_trains_its_discriminator(tiny_text_folder, double_noise):
    """With the fake score where it has no optimiser of its own."""
    distiller = distiller_of(tiny_text_folder, swiftbrush, gan={"host": "teacher_features"})
    terms = distiller.loss(batch(distiller), "fake")
    assert set(terms) == {"denoising", "discriminator"}
    found = gradients(distiller_of(tiny_text_folder, swiftbrush, gan={"host": "teacher_features"}), "fake")
    assert any(name.startswith("discriminator.head.") and bool(grad.any()) for name, grad in found.items())
