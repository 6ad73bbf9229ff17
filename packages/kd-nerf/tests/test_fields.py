"""Fields, grids, cameras and the embedded scene: shapes, formulas, and what comes back."""

from __future__ import annotations

import json
import math

import pytest
import torch

from kd_nerf.data import DataConfig, existing_root
from kd_nerf.engine.cameras import Intrinsics, RandomViews, all_pixels, orbit, pixel_rays, random_poses
from kd_nerf.engine.encodings import HashGrid, SparseGrid, contract, expand, frequency_encoding, spherical_harmonics
from kd_nerf.engine.fields import FieldConfig, config_from_state, make_field
from kd_nerf.engine.rendering import OccupancyGrid, Rays, box_limits, march, padded
from kd_nerf.scene import SceneConfig, cameras, provide_scene, render
from kdcore.errors import InputError

BOX = torch.tensor([[-1.5, -1.0, -1.0], [1.5, 1.0, 1.0]])
SMALL = {"levels": 3, "log2_size": 8, "base_resolution": 4, "finest_resolution": 16, "implementation": "torch"}
SMALL |= {"layers": 3, "width": 8, "skip": 0, "frequencies": 2, "encoding_width": 5, "resolution": 9}
SMALL |= {"density_rank": 2, "colour_rank": 3}


@pytest.mark.parametrize("architecture", ["hash", "mlp", "vm", "cp", "dense", "sparse"])
def test_a_field_is_rebuilt_from_its_weights(architecture):
    field = make_field(FieldConfig(architecture=architecture, **SMALL), BOX)
    state = field.state_dict()
    again = make_field(config_from_state(state["_extra_state"]), state["box"])
    again.load_state_dict(state)
    x, d = torch.rand(20, 3) - 0.5, torch.nn.functional.normalize(torch.randn(20, 3), dim=-1)
    for a, b in zip(field(x, d), again(x, d)):
        assert (a is None and b is None) or torch.equal(a, b)
    found = field(x, d)
    assert found.logit.shape == (20,)
    assert found.colour.shape == (20, 3)
    assert (found.features is None) == (architecture in ("dense", "sparse"))
    assert field(x, d, colour=False).colour is None


def test_sizes_of_the_paper():
    count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    field = make_field(FieldConfig(architecture="mlp"), BOX)
    assert [tuple(layer.weight.shape) for layer in field.mlp] == [
        (256, 63),
        *[(256, 256)] * 3,
        (256, 319),
        *[(256, 256)] * 2,
        (28, 256),
    ]
    assert count(field.density_net) == 28 * 64 + 64 * 16
    assert count(field.colour_net) == 31 * 64 + 64 * 64 + 64 * 3


def test_spherical_harmonics_are_orthonormal():
    nodes = torch.linspace(-1, 1, 401, dtype=torch.float64)
    z = (nodes[1:] + nodes[:-1]) / 2
    angle = torch.arange(64, dtype=torch.float64) * 2 * math.pi / 64
    flat = (1 - z[:, None] ** 2).sqrt()
    d = torch.stack([flat * angle.cos(), flat * angle.sin(), z[:, None].expand(-1, 64)], dim=-1).view(-1, 3)
    basis = spherical_harmonics(d, 4)
    gram = basis.T @ basis * 4 * math.pi / len(d)
    torch.testing.assert_close(gram, torch.eye(16, dtype=torch.float64), atol=1e-3, rtol=0)


def test_frequencies():
    x = torch.tensor([[0.75, 0.5, 0.25]])
    encoded = frequency_encoding(x, 2)
    assert encoded.shape == (1, 15)
    expected = [0.5, 0, -0.5, math.sin(0.5), 0, math.sin(-0.5), math.sin(1), 0, math.sin(-1)]
    torch.testing.assert_close(encoded[0, :9], torch.tensor(expected))


def test_hash_grid_is_trilinear_where_it_has_no_collision():
    grid = HashGrid(1, 1, 12, 4, 4).double()
    with torch.no_grad():  # a linear function of the vertices is reproduced everywhere
        vertices = torch.cartesian_prod(*[torch.arange(5, dtype=torch.float64)] * 3) / 4
        grid.table.copy_((vertices @ torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64))[:, None])
    x = torch.rand(50, 3, dtype=torch.float64)
    torch.testing.assert_close(grid(x)[:, 0], x @ torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64))


def test_a_sparse_grid_keeps_values_and_forgets_the_rest():
    grid = SparseGrid(2, 9)
    x = torch.rand(30, 3) * 0.2 + 0.4
    before = grid(x)
    cells = torch.zeros(8, 8, 8, dtype=torch.bool)
    cells[3:5, 3:5, 3:5] = True
    grid.keep(cells)
    torch.testing.assert_close(grid(x), before)
    assert len(grid.values) < 9**3 / 2
    far = grid(torch.tensor([[0.02, 0.02, 0.02]]))
    torch.testing.assert_close(far[0], torch.tensor([-10.0, 0.0]))
    fresh = SparseGrid(2, 9)
    fresh.load_state_dict(grid.state_dict())
    torch.testing.assert_close(fresh(x), before)


def test_contraction_and_its_inverse():
    x = torch.randn(100, 3, dtype=torch.float64) * 3
    inside = contract(x)
    assert inside.abs().max() < 2
    torch.testing.assert_close(expand(inside), x)
    field = make_field(FieldConfig(architecture="dense", contraction=True, **SMALL), BOX)
    unit, kept = field.unit(x.float())
    assert bool(kept.all())
    torch.testing.assert_close(field.world(unit), x.float(), rtol=1e-3, atol=1e-4)


def test_occupancy_keeps_what_is_dense():
    grid = OccupancyGrid(8, threshold=10.0)
    assert bool(grid(torch.rand(10, 3)).all())
    grid.fill(lambda unit: 100.0 * (unit[:, 0] < 0.5))
    assert grid(torch.tensor([[0.2, 0.5, 0.5], [0.9, 0.5, 0.5]])).tolist() == [True, False]
    grid.fill(lambda unit: torch.zeros(len(unit)))
    assert bool(grid.occupied.all())  # never nothing


def test_marching_stays_in_the_box_and_in_kept_cells():
    field = make_field(FieldConfig(architecture="dense", **SMALL), BOX)
    grid = OccupancyGrid(4)
    grid.fill(lambda unit: 100.0 * (unit[:, 2] < 0.5))
    pose = orbit(torch.tensor([30.0]), torch.tensor([20.0]), 4.0)[0]
    camera = Intrinsics(20.0, 20.0, 8.0, 8.0, 16, 16)
    origins, directions = pixel_rays(pose, camera, all_pixels(camera))
    limit = torch.ones(256)
    marched = march(Rays(origins, directions, 0.1 * limit, 100 * limit), field, grid, 32, jitter=True)
    assert bool(((marched.positions >= BOX[0] - 1e-5) & (marched.positions <= BOX[1] + 1e-5)).all())
    assert marched.positions[:, 2].max() <= 1e-5
    near, far = box_limits(origins, directions, BOX)
    torch.testing.assert_close(marched.lengths.sum(1), far - near, atol=0.2, rtol=0)


def test_marching_past_everything_gives_one_empty_point():
    field = make_field(FieldConfig(architecture="dense", **SMALL), BOX)
    rays = Rays(torch.tensor([[5.0, 5.0, 5.0]]), torch.tensor([[1.0, 0.0, 0.0]]), torch.zeros(1), torch.full((1,), 9.0))
    marched = march(rays, field, OccupancyGrid(4), 8, jitter=False)
    assert len(marched.place) == 1
    assert marched.lengths.sum() == 0


def test_packed_samples_become_a_grid():
    rays = Rays(torch.zeros(3, 3), torch.eye(3), torch.zeros(3), torch.ones(3))
    ray, start = torch.tensor([0, 0, 2]), torch.tensor([0.1, 0.4, 0.2])
    made = padded(rays, ray, start, start + 0.1)
    assert made.place.tolist() == [0, 1, 4]
    torch.testing.assert_close(made.lengths, torch.tensor([[0.1, 0.1], [0.0, 0.0], [0.1, 0.0]]))
    torch.testing.assert_close(made.positions[2], torch.tensor([0.0, 0.0, 0.25]))


def test_random_cameras_of_the_release():
    train = orbit(torch.tensor([0.0, 90.0]), torch.tensor([10.0, 40.0]), 3.0)
    generator = torch.Generator().manual_seed(0)
    poses = random_poses("synthetic", train, generator, radius=4.0)
    assert len(poses) == sum((90 - a) // 15 + 1 for a in range(80)) == 311
    torch.testing.assert_close(poses[:, :, 3].norm(dim=-1), torch.full((311,), 4.0))
    # every camera looks at the origin, along its own -z
    torch.testing.assert_close(poses[:, :, 2] * 4, poses[:, :, 3])
    assert poses[:, 2, 3].min() >= -1e-5
    torch.testing.assert_close(torch.linalg.det(poses[:, :, :3]), torch.ones(311))
    assert len(random_poses("llff", train, generator)) == 30
    band = random_poses("tanks", train, generator, radius=4.0)[:, :, 3].norm(dim=-1)
    assert 3 <= band.min() <= band.max() <= 4
    with pytest.raises(InputError, match="poses"):
        random_poses("dome", train, generator)
    views = RandomViews("train", train, Intrinsics(10, 10, 4, 4, 8, 8), seed=1)
    assert {tuple(views.rays(3)[0][0].tolist()) for _ in range(2)} == {tuple(pose[:, 3].tolist()) for pose in train}


def test_the_scene_is_written_once_in_blenders_format(tmp_path):
    config = SceneConfig(size=12, train_views=3, test_views=2, supersample=2)
    folder = provide_scene(tmp_path / "scene", config)
    meta = json.loads((folder / "transforms_train.json").read_text())
    assert len(meta["frames"]) == 3
    assert (folder / "train/r_2.png").is_file()
    stamp = (folder / "transforms_train.json").stat().st_mtime_ns
    provide_scene(folder, config)
    assert (folder / "transforms_train.json").stat().st_mtime_ns == stamp
    provide_scene(folder, SceneConfig(size=12, train_views=2, test_views=2))
    assert not (folder / "train/r_2.png").exists()


def test_the_scene_is_in_the_middle_and_empty_around():
    config = SceneConfig(size=24)
    picture = render(cameras(config)["test"][0], config)
    assert picture[0, 0, 3] == 0
    assert picture[12, 12, 3] == 1
    assert bool(((picture >= 0) & (picture <= 1)).all())
    assert 0.1 < picture[..., 3].mean() < 0.6


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "blender", "root": "$NO_SUCH_VARIABLE/lego"}, "not set"),
        ({"name": "blender", "root": "/nowhere"}, "no such folder"),
        ({"name": "nerfstudio", "root": "."}, r"transforms\.json"),
    ],
)
def test_missing_photographs_are_named(values, message):
    with pytest.raises(InputError, match=message):
        existing_root(DataConfig(**values))


def test_a_box_upside_down_is_named():
    with pytest.raises(InputError, match="box"):
        make_field(FieldConfig(), BOX.flip(0))
