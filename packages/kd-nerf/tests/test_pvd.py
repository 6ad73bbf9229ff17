"""PVD: the losses against numbers, the stages, what is inherited, and conversions between architectures."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from kd_nerf.engine.fields import FieldConfig, Points, density_of, inherit, make_field
from kd_nerf.engine.rendering import OccupancyGrid, RayPoints, Rays, composite, march
from kd_nerf.methods.pvd import METHOD, PVD, PVDConfig, distance, feature_weight, mean_size, stage_of
from kdcore.config import parse
from kdcore.errors import InputError
from kdcore.method import load_config

BOX = torch.tensor([[-1.5] * 3, [1.5] * 3])
SIZES = {
    "hash": {"levels": 4, "log2_size": 11, "base_resolution": 4, "finest_resolution": 32, "implementation": "torch"},
    "mlp": {"frequencies": 4, "layers": 4, "width": 32, "skip": 1, "encoding_width": 8},
    "vm": {"density_rank": 4, "colour_rank": 6, "resolution": 24},
    "cp": {"density_rank": 12, "colour_rank": 18, "resolution": 24},
    "dense": {"resolution": 20},
    "sparse": {"resolution": 20},
}


def tiny(architecture: str, seed: int = 0, dtype: torch.dtype = torch.float64, **changes):
    torch.manual_seed(seed)
    config = FieldConfig(architecture=architecture, **{**SIZES[architecture], **changes})
    return make_field(config, BOX).to(dtype)


def points(rays: int = 6, samples: int = 8, dtype: torch.dtype = torch.float64, seed: int = 0) -> RayPoints:
    generator = torch.Generator().manual_seed(seed)
    origins = torch.nn.functional.normalize(torch.randn(rays, 3, generator=generator), dim=-1) * 4
    aim = torch.rand(rays, 3, generator=generator) - 0.5
    directions = torch.nn.functional.normalize(aim - origins, dim=-1)
    limit = torch.ones(rays)
    every = OccupancyGrid(8)
    marched = march(
        Rays(origins, directions, 0.1 * limit, 100 * limit),
        tiny("dense", dtype=torch.float32),
        every,
        samples,
        jitter=False,
    )
    return RayPoints(*(part.to(dtype) if part.is_floating_point() else part for part in marched))


def at_step(distiller: PVD, n: int) -> PVD:
    distiller.progress.step = n - 1
    return distiller


# ---------------------------------------------------------------- exact checks


def test_equal_fields_have_no_loss_and_a_gradient_of_exactly_zero():
    teacher, student = tiny("hash"), tiny("hash", seed=1)
    student.load_state_dict(teacher.state_dict())
    distiller = at_step(PVD(teacher, student), 5000)
    terms = distiller.loss(points())
    assert list(terms) == ["feature", "colour", "density", "rgb"]
    assert all(value.item() == 0 for _, value in terms.values())
    terms.total().backward()
    assert all(p.grad is None or bool((p.grad == 0).all()) for p in student.parameters())


def test_norm_and_its_gradient():
    d = torch.tensor([[0.0, 0.0], [3.0, 4.0]], dtype=torch.float64, requires_grad=True)
    value = distance(d, torch.zeros_like(d))
    value.backward()
    assert value.item() == 5
    torch.testing.assert_close(d.grad, torch.tensor([[0.0, 0.0], [0.6, 0.8]], dtype=torch.float64))
    assert distance(d, torch.zeros_like(d), "mse").item() == 6.25
    assert distance(d, torch.zeros_like(d), "l1").item() == 1.75


@given(m=st.integers(1, 300), seed=st.integers(0, 99))
def test_gradient_of_a_point_term_has_the_size_of_its_weight(m, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, 3, dtype=torch.float64, generator=generator).requires_grad_()
    (0.002 * distance(x, torch.randn(m, 3, dtype=torch.float64, generator=generator))).backward()
    assert x.grad.norm().item() == pytest.approx(0.002, rel=1e-12)


def test_clipped_logits_are_equal_and_have_no_gradient():
    field = tiny("dense")
    raw = torch.tensor([9.0, 12.0, -5.0, -2.0], dtype=torch.float64, requires_grad=True)
    q = field.clipped(raw)
    assert q.tolist() == [7, 7, -2, -2]
    distance(q[0], q[1]).backward(retain_graph=True)
    distance(q[2:3], q[3:]).backward()
    assert bool((raw.grad == 0).all())
    limits = density_of(torch.tensor([-2.0, 7.0], dtype=torch.float64))
    assert limits.tolist() == pytest.approx([0.1353352832, 1096.6331584], rel=1e-9)


def test_the_exponential_has_its_gradient_at_the_truncated_logit():
    q = torch.tensor([15.0, 1.0, -20.0], dtype=torch.float64, requires_grad=True)
    density_of(q).sum().backward()
    assert q.grad.tolist() == pytest.approx([math.exp(12), math.e, math.exp(-12)])


def test_composite_against_the_sum_by_hand():
    lengths = torch.tensor([[0.1, 0.2]], dtype=torch.float64)
    at = torch.zeros(2, 3, dtype=torch.float64)
    batch = RayPoints(at, at, torch.arange(2), lengths, lengths.cumsum(1))
    colour = torch.tensor([[1.0, 0, 0], [0, 1.0, 0]], dtype=torch.float64)
    drawn = composite(torch.tensor([0.5, 2.0], dtype=torch.float64), colour, batch)
    assert drawn.colour[0].tolist() == pytest.approx([0.6863987271, 0.9512294245, 0.6376281516], abs=1e-10)
    assert drawn.opacity.item() == pytest.approx(0.3623718484, abs=1e-10)


def test_a_dropped_point_is_empty_space():
    lengths = torch.full((2, 3), 0.3, dtype=torch.float64)
    at = torch.zeros(4, 3, dtype=torch.float64)
    place = torch.tensor([0, 2, 3, 5])
    density, colour = torch.rand(4, dtype=torch.float64), torch.rand(4, 3, dtype=torch.float64)
    sparse = composite(density, colour, RayPoints(at, at, place, lengths, lengths))
    full = torch.zeros(6, dtype=torch.float64).index_put((place,), density)
    painted = torch.zeros(6, 3, dtype=torch.float64).index_put((place,), colour)
    whole = composite(full, painted, RayPoints(torch.zeros(6, 3), torch.zeros(6, 3), torch.arange(6), lengths, lengths))
    torch.testing.assert_close(sparse.colour, whole.colour)


def test_feature_weight_decays_from_the_first_step():
    assert feature_weight(1) == pytest.approx(0.00199)
    assert feature_weight(2000) == pytest.approx(8.855e-8, rel=1e-3)


def test_stages_change_at_the_steps_of_the_paper():
    ends = (2000, 5000)
    assert [stage_of(n, ends) for n in (1, 1999, 2000, 4999, 5000)] == [1, 1, 2, 2, 3]
    assert [stage_of(n, ends, has_features=False) for n in (1, 4999, 5000)] == [2, 2, 3]
    assert stage_of(1, (0, 0)) == 3


def test_regularisation_is_the_sum_of_the_means():
    factors = [torch.tensor([1.0, -3.0]), torch.tensor([[2.0, 2.0, -5.0]])]
    assert mean_size(factors).item() == 5
    assert len(tiny("vm").regularised()) == 6


@pytest.mark.parametrize("architecture", ["hash", "vm"])
def test_first_stage_trains_no_colour_net_and_the_second_trains_everything(architecture):
    teacher, student = tiny("hash", 3), tiny(architecture, 4)
    distiller = PVD(teacher, student, inherit=False)
    terms = at_step(distiller, 1).loss(points())
    assert list(terms) == ["feature"]
    terms.total().backward()
    assert all(p.grad is None for p in student.colour_net.parameters())
    if architecture == "vm":
        assert student.basis.weight.grad.abs().sum() > 0
    terms = at_step(distiller, 2000).loss(points())
    assert list(terms) == ["feature", "colour", "density"]
    terms.total().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in student.parameters())
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize(("teacher", "student"), [("dense", "mlp"), ("hash", "sparse")])
def test_a_grid_on_either_side_has_no_feature_loss(teacher, student):
    distiller = at_step(PVD(tiny(teacher), tiny(student)), 1)
    assert distiller.stage == 2
    assert list(distiller.loss(points())) == ["colour", "density"]


def test_permuting_points_with_their_rays_changes_no_loss():
    distiller = at_step(PVD(tiny("hash"), tiny("vm")), 5000)
    batch = points()
    order = torch.randperm(len(batch.place), generator=torch.Generator().manual_seed(0))
    mixed = RayPoints(batch.positions[order], batch.directions[order], batch.place[order], batch.lengths, batch.middles)
    for (_, a), (_, b) in zip(distiller.loss(batch).values(), distiller.loss(mixed).values()):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("student", "names"),
    [
        ("mlp", ["colour_net", "density_net"]),
        ("vm", ["colour_net"]),
        ("cp", ["colour_net"]),
        ("dense", []),
        ("sparse", []),
    ],
)
def test_what_a_student_inherits_from_a_hash_grid(student, names):
    teacher = tiny("hash")
    made = tiny(student, 7)
    assert inherit(made, teacher) == names
    for name in names:
        torch.testing.assert_close(getattr(made, name).state_dict(), getattr(teacher, name).state_dict())


def test_nets_of_another_shape_are_not_inherited():
    assert inherit(tiny("mlp", encoding_width=9), tiny("hash")) == ["colour_net"]
    assert PVD(tiny("hash"), tiny("mlp"), inherit=False).inherited == []


def test_frozen_inherited_nets_stay():
    student = tiny("mlp")
    distiller = PVD(tiny("hash"), student, freeze_inherited=True)
    at_step(distiller, 5000).loss(points()).total().backward()
    assert student.colour_net[0].weight.grad is None
    assert student.mlp[0].weight.grad is not None


def test_features_of_another_width_are_compared_through_a_map_of_the_student():
    teacher, student = tiny("hash", geometry=7), tiny("mlp", geometry=15)
    distiller = at_step(PVD(teacher, student), 1).double()
    distiller.loss(points()).total().backward()
    assert distiller.feature_map.weight.shape == (7, 15)
    assert distiller.feature_map.weight.grad.abs().sum() > 0
    assert distiller.deployed() is student


def test_loss_gradient_against_finite_differences():
    distiller = at_step(PVD(tiny("hash"), tiny("vm", resolution=4, density_rank=1, colour_rank=2), inherit=False), 5000)
    student = distiller.student
    with torch.no_grad():  # away from the clip, where the loss has kinks
        student.density_factors.planes.abs_().add_(0.5)
        student.density_factors.lines.abs_().add_(0.5)
    batch = points(rays=2, samples=4)
    weight = student.basis.weight
    loss = lambda value: torch.func.functional_call(distiller, {"student.basis.weight": value}, (batch,))  # noqa: E731
    total = lambda value: sum(w * term for w, term in loss(value).values())  # noqa: E731
    assert torch.autograd.gradcheck(total, (weight.detach().clone().requires_grad_(),))


# ---------------------------------------------------------------- a stock student


def half_empty() -> OccupancyGrid:
    grid = OccupancyGrid(8)
    grid.fill(lambda unit: 100.0 * (unit[:, 0] < 0.5))
    return grid


def nerfacto():
    torch.manual_seed(0)
    sizes = {"levels": 3, "log2_size": 9, "base_resolution": 4, "finest_resolution": 12, "hidden": 16}
    return make_field(FieldConfig(architecture="nerfacto", **sizes), BOX)


def test_a_nerfacto_student_becomes_empty_where_the_grid_is():
    student, grid = nerfacto(), half_empty()
    outside = grid.empty_points(200)
    assert bool((outside[:, 0] >= 0.5).all())
    assert not bool(grid(outside).any())
    distiller = at_step(PVD(Ball(), student, occupancy=grid), 1)
    assert list(distiller.loss(points(4, 4, torch.float32))) == ["colour", "density", "empty"]
    assert distiller.empty == 0.002
    flat = (student.stored(outside)[:, 0].mean().item() + 10) * 64**0.5
    assert distiller.emptiness(64).item() == pytest.approx(flat, rel=0.01)  # before training it is flat
    tables = student.encoding_parameters()
    nets = [p for p in student.parameters() if all(p is not table for table in tables)]
    optimizer = torch.optim.AdamW([{"params": tables, "lr": 0.1}, {"params": nets, "lr": 5e-3}])
    for _ in range(120):
        loss = distiller.loss(points(32, 8, torch.float32)).total()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        assert student.stored(outside)[:, 0].mean() < -4  # a teacher's emptiest points are at -2
    grid.fill(lambda unit: torch.ones(len(unit)))
    assert distiller.emptiness(8).item() == 0


def test_emptiness_needs_a_grid_and_is_not_the_papers():
    with pytest.raises(InputError, match="occupancy: is required where empty"):
        PVD(Ball(), nerfacto())
    assert PVD(Ball(), nerfacto(), empty=0.0).empty == 0
    assert PVD(tiny("hash"), tiny("mlp")).empty == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"geometry": 7}, "a nerfacto field has 15"),
        ({"implementation": "tcnn"}, "allowed for nerfacto"),
        ({"contraction": True}, "contracts around"),
    ],
)
def test_what_a_stock_field_cannot_be_is_named(changes, message):
    with pytest.raises(InputError, match=message):
        make_field(FieldConfig(architecture="nerfacto", **changes), BOX)


# ---------------------------------------------------------------- conversions


class Ball(nn.Module):
    """A teacher by formulas: a soft ball whose colour follows the position and, weakly, the direction."""

    feature_dim = None

    def forward(self, positions, directions, *, colour=True) -> Points:
        logit = (5 - 8 * positions.norm(dim=-1)).clamp(-2, 7)
        return Points(None, logit, torch.sigmoid(2 * positions + 0.3 * directions) if colour else None)


def gap(student, teacher) -> float:
    """Mean difference of logits (in units of 9, their range) and colours at points that no training step saw."""
    held_out = points(40, 16, torch.float32, seed=999)
    with torch.no_grad():
        a, b = (field(held_out.positions, held_out.directions) for field in (student, teacher))
    return ((a.logit - b.logit).abs().mean() / 9 + (a.colour - b.colour).abs().mean()).item()


def fit(student, teacher, steps: int = 150):
    torch.manual_seed(0)
    distiller = PVD(teacher, student, stage_ends=(30, 60))
    stores = {id(parameter) for parameter in student.encoding_parameters()}
    groups = [[p for p in student.parameters() if (id(p) in stores) == stored] for stored in (True, False)]
    rated = [{"params": group, "lr": rate} for group, rate in zip(groups, (3e-2, 5e-3)) if group]
    optimizer = torch.optim.AdamW(rated, betas=(0.9, 0.99), eps=1e-15)
    for step in range(steps):
        distiller.progress.step = step
        loss = distiller.loss(points(64, 12, torch.float32, seed=step)).total()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return student


@cache
def ball_of(architecture: str):
    return fit(tiny(architecture, 1, torch.float32), Ball())


PAIRS = [
    *[("hash", "mlp"), ("mlp", "hash"), ("hash", "vm"), ("vm", "dense"), ("dense", "cp"), ("cp", "sparse")],
    ("sparse", "hash"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("teacher", "student"), PAIRS)
def test_any_field_becomes_any_other(teacher, student):
    source, target = ball_of(teacher), tiny(student, 2, torch.float32)
    assert gap(source, Ball()) < 0.7 * gap(tiny(teacher, 1, torch.float32), Ball())
    before = gap(target, source)
    assert gap(fit(target, source), source) < 0.7 * before


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stage_ends": [5, 2]}, "stage_ends"),
        ({"rgb": 0, "colour": 0, "density": 0}, "nothing is left"),
        ({"norm": "L3"}, "frobenius"),
        ({"raidus": 3}, "did you mean 'radius'"),
    ],
)
def test_bad_arguments_are_named(values, message):
    with pytest.raises(InputError, match=message):
        parse(PVDConfig, values)


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(InputError, match="shapes"):
        distance(torch.zeros(2, 3), torch.zeros(3, 2))


@pytest.mark.parametrize("name", ["small", "paper", "fox"])
def test_configs_load(name):
    method, config = load_config(f"pvd/{name}")
    assert method is METHOD
    assert config.student.architecture == "mlp"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("student.clip=[7, -2]", "clip"),
        ("train.steps=null", "steps"),
        ("teacher.train=null", "checkpoint"),
        ("data.name=blender", "root"),
        ("train.optimizer.name=sgd", "adamw"),
        ("student.architecture=nerf", "architecture"),
        ("export=[nerfacto]", "no field of nerfstudio's"),
    ],
)
def test_bad_configs_are_named(override, message):
    with pytest.raises(InputError, match=message):
        load_config("pvd/small", [override])
