"""Choosing from pools: top-k per predicted class, duplicates, files and leftovers, layer-wise rates."""

import numpy as np
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from kd_classification.data import DataConfig, load_data
from kd_classification.engine.param_groups import stage_param_groups
from kd_classification.engine.pool import UNLABELLED, PoolConfig, distorted, load_pool, union, unlabelled
from kd_classification.engine.selection import (
    Selection,
    average_hash,
    choose,
    difference_hash,
    find_duplicates,
    read_selection,
    score_images,
    select_top_k,
    within_distance,
    write_selection,
)
from kd_classification.sources import Split
from kdcore.errors import InputError

# ---------------------------------------------------------------- top-k


def test_top_k_per_predicted_class():
    scores, classes = torch.tensor([0.9, 0.5, 0.7, 0.6, 0.8]), torch.tensor([0, 0, 0, 1, 1])
    assert select_top_k(scores, classes, 2).tolist() == [0, 2, 3, 4]
    assert select_top_k(scores, classes, 1).tolist() == [0, 4]
    assert select_top_k(scores, classes, 99).tolist() == [0, 1, 2, 3, 4]
    assert select_top_k(scores[:0], classes[:0], 1).tolist() == []


def test_of_equal_scores_the_lower_index_wins():
    assert select_top_k(torch.ones(6), torch.tensor([1, 0, 1, 0, 1, 0]), 2).tolist() == [0, 1, 2, 3]


@given(
    st.lists(st.tuples(st.integers(0, 4), st.sampled_from([0.1, 0.25, 0.5, 0.9])), max_size=40),
    st.integers(1, 6),
)
def test_top_k_against_its_definition(items, k):
    classes = torch.tensor([c for c, _ in items], dtype=torch.int64)
    scores = torch.tensor([s for _, s in items])
    expected = []
    for c in range(5):
        members = sorted((i for i, item in enumerate(items) if item[0] == c), key=lambda i: (-items[i][1], i))
        expected += members[:k]
    chosen = select_top_k(scores, classes, k).tolist()
    assert chosen == sorted(expected)
    assert len(chosen) <= 5 * k


def test_top_k_refuses_what_it_cannot_rank():
    with pytest.raises(InputError, match="k = 0: must be at least 1"):
        select_top_k(torch.ones(2), torch.zeros(2).long(), 0)
    with pytest.raises(InputError, match="1 of 2 are not finite"):
        select_top_k(torch.tensor([1.0, float("nan")]), torch.zeros(2).long(), 1)
    with pytest.raises(InputError, match=r"scores \(2,\) and classes \(3,\)"):
        select_top_k(torch.ones(2), torch.zeros(3).long(), 1)


def test_scores_are_the_largest_probability_in_eval_mode():
    data = load_data(DataConfig(image_size=16, per_class=3))
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=10, in_chans=1, channels=[4, 4, 4, 8], stem_width=4).train()
    scores, classes = score_images(model, data.train, batch_size=7)
    assert model.training
    model.eval()
    with torch.no_grad():
        probabilities = model(data.train._batch(range(30)).images).softmax(1)
    torch.testing.assert_close(scores, probabilities.amax(1), atol=1e-6, rtol=1e-5)
    assert torch.equal(classes, probabilities.argmax(1))


def test_random_selection_is_as_large_as_top_k_and_seeded():
    scores, classes = torch.rand(50, generator=torch.Generator().manual_seed(0)), torch.arange(50) % 7
    index = torch.arange(50) * 2
    top, random, again, other = (
        choose(index, scores, classes, 3, rule=rule, seed=seed)
        for rule, seed in (("top_k", 0), ("random", 0), ("random", 0), ("random", 1))
    )
    assert len(top.index) == len(random.index) == 21
    assert torch.equal(random.index, again.index)
    assert not torch.equal(random.index, other.index)
    assert len(set(random.index.tolist())) == 21
    assert len(choose(index, scores, classes, 3, rule="all").index) == 50
    assert torch.equal(top.scores, scores[top.index // 2])
    with pytest.raises(InputError, match="no image is left"):
        choose(index[:0], scores[:0], classes[:0], 3)


# ---------------------------------------------------------------- the file


def test_selection_file_round_trip_and_its_errors(tmp_path):
    path = tmp_path / "selection.csv"
    chosen = Selection(
        torch.tensor([3, 8]), torch.tensor([1, 0]), torch.tensor([0.5, 0.25]), torch.tensor([True, False])
    )
    write_selection(path, chosen, ["a, b/ü.png", "c.png"])
    again = read_selection(path, size=9)
    assert torch.equal(again.index, chosen.index)
    assert torch.equal(again.classes, chosen.classes)
    assert torch.equal(again.scores, chosen.scores)
    assert torch.equal(again.out_of_domain, chosen.out_of_domain)
    write_selection(path, Selection(chosen.index, chosen.classes, chosen.scores), ["", ""])
    assert read_selection(path).out_of_domain is None
    with pytest.raises(InputError, match="line 3: index 8 is outside the pool of 8 images"):
        read_selection(path, size=8)
    path.write_text("index,class\n1,x\n")
    with pytest.raises(InputError, match="line 2: expected the columns index, path, class, score"):
        read_selection(path)
    with pytest.raises(InputError, match="cannot be read"):
        read_selection(tmp_path / "none.csv")


# ---------------------------------------------------------------- duplicates


def photograph(seed=0, size=64):
    """A smooth random grey image, uint8 (1, size, size)."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 1, 6, 6, generator=generator)
    image = torch.nn.functional.interpolate(coarse, (size, size), mode="bicubic", align_corners=True)
    return (image[0].clamp(0, 1) * 255).round().byte()


@pytest.mark.parametrize("hash_of", [average_hash, difference_hash])
def test_perceptual_hashes_survive_resizing_and_contrast_and_tell_images_apart(hash_of):
    image = photograph()
    bits = hash_of(image.unsqueeze(0))
    assert bits.shape == (1, 64)
    assert bits.dtype == torch.bool
    resized = torch.nn.functional.interpolate(image.unsqueeze(0).float(), (96, 96), mode="bilinear", antialias=True)
    darker = image.unsqueeze(0).double() * 0.6 + 20
    for same in (resized, darker, image.expand(3, -1, -1).unsqueeze(0)):
        assert int((hash_of(same) != bits).sum()) <= 4
    others = hash_of(torch.stack([photograph(seed) for seed in range(1, 30)]))
    assert not within_distance(others, bits, 4).any()


@given(st.integers(0, 1000), st.integers(0, 20))
def test_within_distance_counts_bits(seed, distance):
    generator = torch.Generator().manual_seed(seed)
    pool, other = (torch.rand(n, 64, generator=generator) < 0.5 for n in (7, 5))
    pool[0] = other[2]
    pool[0, : distance + 1] ^= True
    pool[1] = other[3]
    pool[1, :distance] ^= True
    bits = (pool[:, None] != other[None]).sum(-1)
    assert torch.equal(within_distance(pool, other, distance), (bits <= distance).any(1))
    assert not within_distance(pool, other[:0], distance).any()


def folder_of_images(root, count=12, classes=("a", "b"), size=24):
    for part, seed in (("train", 0), ("val", 100)):
        for index in range(count):
            path = root / part / classes[index % len(classes)] / f"{index:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = photograph(seed + index, size)[0].numpy()
            Image.fromarray(np.stack([pixels] * 3, axis=2)).save(path)


def extra_pool(root, size=24):
    """Six images at different depths: two new, one copy of a test image, one of it resized and darker, two new."""
    test = Image.open(root / "val" / "a" / "00.png")
    pictures = {
        "x/1.png": photograph(200, size),
        "x/y/z/2.png": photograph(201, size),
        "3.png": None,
        "x/4.png": None,
        "q/5.png": photograph(202, size),
        "q/6.png": photograph(203, size),
    }
    pool = root / "pool"
    for name, pixels in pictures.items():
        path = pool / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name == "3.png":
            test.save(path)
        elif name == "x/4.png":
            test.resize((36, 36), Image.Resampling.BILINEAR).point(lambda v: int(v * 0.7) + 10).save(path)
        else:
            Image.fromarray(np.stack([pixels[0].numpy()] * 3, axis=2)).save(path)
    (pool / "notes.txt").write_text("not an image")
    return pool


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("none", []), ("exact", ["3.png"]), ("average", ["3.png", "x/4.png"]), ("difference", ["3.png", "x/4.png"])],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_pool_of_files_and_its_duplicates(tmp_path, kind, expected, workers):
    folder_of_images(tmp_path)
    root = extra_pool(tmp_path)
    data = load_data(DataConfig(name="image_folder", root=str(tmp_path), image_size=24))
    pool = load_pool(PoolConfig(name="image_folder", root=str(root)), data)
    assert pool.names(torch.arange(6)) == ["3.png", "q/5.png", "q/6.png", "x/1.png", "x/4.png", "x/y/z/2.png"]
    found = find_duplicates(pool.images, [data.test], kind, distance=4, num_workers=workers)
    assert pool.names(torch.nonzero(found).flatten()) == expected
    assert pool.out_of_domain is None

    merged = union(data.train, pool.images.split)
    assert len(merged) == 18
    assert set(merged.labels.tolist()) == {UNLABELLED}
    assert merged[17][0].shape == (3, 24, 24)


def test_file_list_is_relative_to_itself_and_names_what_is_missing(tmp_path):
    folder_of_images(tmp_path)
    root = extra_pool(tmp_path)
    data = load_data(DataConfig(name="image_folder", root=str(tmp_path), image_size=24))
    listing = root / "list.txt"
    listing.write_text("x/4.png\n\n3.png\n")
    pool = load_pool(PoolConfig(name="file_list", root=str(listing)), data)
    assert pool.names(torch.arange(2)) == ["x/4.png", "3.png"]
    listing.write_text("x/none.png\n")
    with pytest.raises(InputError, match=r"x/none\.png: cannot be read"):
        load_pool(PoolConfig(name="file_list", root=str(listing)), data)
    listing.write_text("\n")
    with pytest.raises(InputError, match="the list is empty"):
        load_pool(PoolConfig(name="file_list", root=str(listing)), data)


def test_files_beside_data_in_memory_are_read_into_memory(tmp_path):
    folder_of_images(tmp_path)
    data = load_data(DataConfig(image_size=16, per_class=3))
    pool = load_pool(PoolConfig(name="image_folder", root=str(extra_pool(tmp_path))), data)
    assert pool.images.split.images.shape == (6, 1, 16, 16)
    assert len(union(data.train, pool.images.split)) == 36


def test_union_of_files_and_memory_is_refused(tmp_path):
    folder_of_images(tmp_path)
    files = load_data(DataConfig(name="image_folder", root=str(tmp_path), image_size=16))
    digits = load_data(DataConfig(image_size=16, per_class=3))
    with pytest.raises(InputError, match="in memory and those of the data in files"):
        union(files.train, digits.train.split)


# ---------------------------------------------------------------- leftovers


def test_rest_is_what_nobody_was_given_and_knows_its_foreign_images():
    few, more = (load_data(DataConfig(image_size=16, per_class=n), seed=3) for n in (4, 9))
    assert find_duplicates(few.train, [more.train], "exact").all(), "the smaller share is part of the larger one"
    everything = load_data(DataConfig(image_size=16), seed=3)
    pool = load_pool(PoolConfig(name="rest", out_of_domain=0.75), few, seed=3, used=(few.train, more.train))
    own = int((~pool.out_of_domain).sum())
    assert own == len(everything.train) - 90
    assert len(pool.images) == 4 * own
    assert set(pool.images.labels.tolist()) == {UNLABELLED}
    assert not find_duplicates(pool.images, [few.train, more.train, few.test], "exact").any()
    inside = pool.images.subset(torch.nonzero(~pool.out_of_domain).flatten())
    outside = pool.images.subset(torch.nonzero(pool.out_of_domain).flatten())
    assert find_duplicates(inside, [everything.train], "exact").all()
    assert not find_duplicates(outside, [everything.train], "exact").any()


def test_distorted_images_are_seeded():
    images = load_data(DataConfig(per_class=2)).train.split.images
    first, again = (distorted(images, 7, np.random.default_rng(5)) for _ in range(2))
    assert torch.equal(first, again)
    assert first.shape == (7, *images.shape[1:])
    assert first.dtype == torch.uint8


def test_reading_a_missing_label_fails():
    data = load_data(DataConfig(image_size=16, per_class=2))
    images = unlabelled(Split(data.train.split.labels, data.train.split.images, [], 1), data.train)
    batch = next(iter(images.loader(4)))
    with pytest.raises(IndexError):
        torch.nn.functional.cross_entropy(torch.zeros(4, 10), batch.labels)


# ---------------------------------------------------------------- layer-wise rates


def rates(model, scales):
    names = {id(p): name for name, p in model.named_parameters()}
    groups = stage_param_groups(model, scales)
    found = {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}
    assert len(found) == len(names), "every parameter is in one group"
    return found


def test_resnet_has_a_factor_for_stem_and_stages():
    found = rates(timm.create_model("resnet18"), [0.1, 0.2, 0.3, 0.4, 0.5])
    for name, scale in {"conv1": 0.1, "bn1": 0.1, "layer1": 0.2, "layer2": 0.3, "layer4": 0.5, "fc": 1.0}.items():
        assert {s for n, s in found.items() if n.split(".")[0] == name} == {scale}


def test_mobilenet_v3_shares_a_factor_among_three_blocks():
    found = rates(timm.create_model("mobilenetv3_large_100"), [0.1, 0.2, 0.3, 0.4, 0.5])
    blocks = sorted({tuple(map(int, n.split(".")[1:3])) for n in found if n.startswith("blocks") and n[7] < "6"})
    assert len(blocks) == 15
    scales = [{s for n, s in found.items() if n.startswith(f"blocks.{i}.{j}.")} for i, j in blocks]
    assert scales == [{0.1 * (1 + b // 3)} if b // 3 != 2 else {0.3} for b in range(15)]
    assert found["conv_stem.weight"] == 0.1
    assert found["classifier.weight"] == found["conv_head.weight"] == 1.0


def test_frozen_parameters_are_left_out_and_bad_factors_refused():
    model = timm.create_model("resnet18")
    model.layer1.requires_grad_(False)
    groups = stage_param_groups(model, [0.1, 0.2, 0.3, 0.4, 0.5])
    assert [group["lr_scale"] for group in groups] == [0.1, 0.3, 0.4, 0.5, 1.0]
    for scales, message in (([], "one or more"), ([-1.0], "none below 0"), ([0.1] * 40, "40 factors for 8 blocks")):
        with pytest.raises(InputError, match=message):
            stage_param_groups(model, scales)
    with pytest.raises(InputError, match="Linear has no group_matcher"):
        stage_param_groups(torch.nn.Linear(2, 2), [1.0])
