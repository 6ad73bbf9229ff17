"""MMANet: losses in numbers, masks, mining, who learns from what, modalities from views and folders, whole runs."""

from __future__ import annotations

import json

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from kd_classification.data import AugmentConfig, DataConfig
from kd_classification.engine.multimodal import (
    ModalityConfig,
    MultiBatch,
    MultiModalNet,
    codes_of,
    combinations,
    draw_masks,
    load_modalities,
    load_multimodal,
    mask_name,
    predict_masked,
    save_multimodal,
)
from kd_classification.methods.mmanet import (
    MMANet,
    histogram_distance,
    margin_aware,
    masked_cross_entropy,
    relations,
    uncertainty_weights,
    weak_combinations,
)
from kd_classification.testing import run_without_kd
from kdcore.config import read_yaml
from kdcore.errors import InputError
from kdcore.losses import similarity_preserving
from kdcore.method import arm_config, find_config, load_config
from kdcore.run import load_run, train

SMALL = {"layers": (1, 1, 1, 1), "channels": (4, 4, 8, 8), "stem_width": 4}
TINY = ["train.epochs=3", "teacher.train.epochs=1", "data.per_class=6", "method_args.warmup_epochs=1"]
TINY += ["method_args.mining_start=0", "student.args.channels=[4,4,8,8]", "teacher.args.channels=[4,4,8,8]"]
ROWS = [ModalityConfig(name="a", view="rows", part=(0, 0.5)), ModalityConfig(name="b", view="rows", part=(0.5, 1))]


def double(values, **options) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, **options)


F_S = [[1.0, 0.0], [1.0, 1.0], [0.0, 2.0]]
F_T = [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]
Z_T = [[4.0, 0.0], [0.0, 0.0], [1.0, 0.0]]


def net(channels=("a", "b", "c"), classes: int = 3, seed: int = 0, **options) -> MultiModalNet:
    torch.manual_seed(seed)
    return MultiModalNet("resnet18", dict.fromkeys(channels, 1), classes, args=SMALL, **options)


def batch(size: int = 4, names=("a", "b", "c")) -> MultiBatch:
    generator = torch.Generator().manual_seed(0)
    images = {name: torch.randn(size, 1, 16, 16, generator=generator) for name in names}
    return MultiBatch(images, torch.arange(size) % 3, torch.arange(size))


# ---------------------------------------------------------------- losses


def test_margin_aware_distillation_by_hand():
    weights = uncertainty_weights(double(Z_T))
    assert weights.tolist() == pytest.approx([0.0659820, 0.5076346, 0.4263834], abs=1e-7)
    s, t = double(F_S), double(F_T)
    rows = (relations(s) - relations(t)).square().sum(1)
    assert rows.tolist() == pytest.approx([1.0, 0.1143819, 0.1742582], abs=1e-7)
    assert margin_aware(s, t, weights).item() == pytest.approx(0.1983469795, abs=1e-9)
    assert margin_aware(s, t, weights, relation="column").item() == pytest.approx(0.4902250759, abs=1e-9)
    assert margin_aware(s, t, weights, relation="uniform").item() == pytest.approx(0.4295466862, abs=1e-9)
    assert margin_aware(s, t).item() == pytest.approx(3 * float(similarity_preserving(s, t)), abs=1e-12)


@given(seed=st.integers(0, 300), scale=st.floats(0.01, 100))
def test_same_relations_cost_nothing(seed, scale):
    generator = torch.Generator().manual_seed(seed)
    t = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(5, 5, generator=generator, dtype=torch.float64))[0]
    weights = uncertainty_weights(torch.randn(6, 3, generator=generator, dtype=torch.float64))
    s = (scale * t @ rotation).requires_grad_()
    loss = margin_aware(s, t, weights)
    loss.backward()
    assert loss.item() < 1e-20
    assert s.grad.abs().max() * scale < 1e-9
    other = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    order = torch.randperm(6, generator=generator)
    for relation in ("row", "column", "uniform"):
        before = margin_aware(other, t, weights, relation=relation)
        after = margin_aware(other[order], t[order], weights[order], relation=relation)
        assert torch.allclose(before, after)


def test_weights_of_uncertainty():
    uniform = uncertainty_weights(torch.zeros(5, 3).double())
    assert torch.allclose(uniform, torch.full((5,), 0.2).double())
    s, t = torch.randn(5, 4).double(), torch.randn(5, 4).double()
    for relation in ("row", "column"):
        assert torch.allclose(margin_aware(s, t, uniform, relation=relation), margin_aware(s, t))
    weights = uncertainty_weights(double([[50.0, 0.0], [0.1, 0.0], [1.0, 0.0]]))
    assert weights.sum().item() == pytest.approx(1.0)
    assert 0 <= weights[0] < 1e-15
    certain = uncertainty_weights(double([[5000.0, 0.0], [0.0, 5000.0]]))
    assert torch.equal(certain, torch.full((2,), 0.5).double())


def test_gradients_are_the_numerical_ones_and_none_is_the_teachers():
    s, t = torch.randn(4, 6).double().requires_grad_(), torch.randn(4, 5).double().requires_grad_()
    logits = torch.randn(4, 3).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: margin_aware(x, t.detach(), uncertainty_weights(logits)), s)
    margin_aware(s, t, uncertainty_weights(logits)).backward()
    assert t.grad is None
    assert logits.grad is None
    dead = torch.cat([torch.zeros(1, 6).double(), s[1:].detach()]).requires_grad_()
    margin_aware(dead, t).backward()
    assert bool(torch.isfinite(dead.grad).all())
    with pytest.raises(InputError, match="the same batch"):
        margin_aware(s[:3], t)


def test_regularisation_counts_matches_and_divides_by_all():
    logits, labels = torch.randn(4, 3).double(), torch.tensor([0, 1, 2, 0])
    masks = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [0, 0, 1]]).bool()
    weak = torch.zeros(7, dtype=torch.bool)
    weak[codes_of(torch.tensor([[1, 1, 0], [1, 0, 0], [0, 1, 0]]).bool())] = True
    rows = F.cross_entropy(logits, labels, reduction="none")
    counted = weak[codes_of(masks)]
    assert counted.tolist() == [True, True, False, False]
    assert torch.allclose(masked_cross_entropy(logits, labels, counted), rows[:2].sum() / 4)
    assert torch.allclose(masked_cross_entropy(logits, labels, counted, "matches"), rows[:2].mean())
    none = torch.zeros(4, dtype=torch.bool)
    assert all(masked_cross_entropy(logits, labels, none, how) == 0 for how in ("batch", "matches", "product"))
    # the release multiplies losses (B,) by matches (B, 1, 1, 1): every loss with every match
    broadcast = (rows * counted.view(4, 1, 1, 1)).sum() / 4
    assert torch.allclose(masked_cross_entropy(logits, labels, counted, "product"), broadcast)


# ---------------------------------------------------------------- masks and mining


def test_masks_are_every_combination_alike():
    every = combinations(3)
    assert len(every) == 7
    assert every[-1].all()
    assert codes_of(every).tolist() == list(range(7))
    assert [mask_name(mask) for mask in every[:3]] == ["100", "010", "110"]
    torch.manual_seed(0)
    counts = torch.bincount(codes_of(draw_masks(7000, 3, "cpu")), minlength=7).double()
    assert float(((counts - 1000) ** 2 / 1000).sum()) < 22.46, "chi-square, 6 degrees of freedom, 0.1 %"


def test_histograms_and_the_weak_set():
    full = double([0.5, 0.5])
    assert histogram_distance(double([0.8, 0.2]), full).item() == pytest.approx(0.0430530138, abs=1e-9)
    assert histogram_distance(double([0.6, 0.4]), full).item() == pytest.approx(0.0049751106, abs=1e-9)
    tested = torch.tensor([[1, 1, 0], [1, 0, 1], [0, 1, 1]]).bool()
    weak = weak_combinations(torch.tensor([0.1, 0.3, 0.2]), tested)
    assert {mask_name(mask) for mask in combinations(3)[weak]} == {"101", "100", "001"}
    two = weak_combinations(torch.tensor([0.1, 0.3]), torch.tensor([[1, 0], [0, 1]]).bool())
    assert {mask_name(mask) for mask in combinations(2)[two]} == {"01"}


def test_mining_runs_in_its_epochs_and_chooses_once():
    data = load_modalities(DataConfig(image_size=16, per_class=3, validation=0.05), ROWS, 0)
    student = net(("a", "b"), classes=10)
    distiller = MMANet(None, student, held_out=data.validation, mad_weight=0.0, warmup_epochs=3, mining_start=1)
    seen = []
    for epoch in range(5):
        distiller.progress.epoch = epoch
        distiller.epoch_end()
        seen.append((float(distiller.distances.sum()), int(distiller.weak.sum())))
    once = distiller.mined().sum().item()
    assert [round(d, 6) for d, _ in seen] == [round(k * once, 6) for k in (0, 1, 2, 2, 2)]
    assert [w for _, w in seen] == [0, 0, 0, 1, 1]
    assert {"distances", "weak"} <= set(distiller.checkpoint_state())


# ---------------------------------------------------------------- networks


def test_a_dropped_modality_is_a_missing_one_and_teaches_nothing():
    network, given = net().eval(), batch()
    mask = torch.tensor([True, False, True])
    without = {name: values for name, values in given.images.items() if name != "b"}
    torch.testing.assert_close(network(given.images, mask), network(without, torch.ones(3).bool()))
    masks = torch.tensor([[1, 0, 1]] * 4).bool()
    network.train()
    network(given.images, masks).sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in network.encoders["b"].parameters())
    assert any(p.grad.any() for p in network.encoders["a"].parameters())
    network.eval()  # batch statistics would couple the samples
    images = {name: values.clone().requires_grad_() for name, values in given.images.items()}
    network(images, torch.tensor([[1, 0, 1], [1, 1, 1], [0, 0, 1], [0, 1, 0]]).bool()).square().sum().backward()
    heard = {name: values.grad.flatten(1).abs().sum(1).bool().tolist() for name, values in images.items()}
    assert heard == {"a": [True, True, False, False], "b": [False, True, False, True], "c": [True, True, True, False]}
    with pytest.raises(InputError, match="some of"):
        network({"x": given.images["a"]})


@pytest.mark.parametrize("fusion", ["concat", "add"])
@pytest.mark.parametrize("names", [("a", "b"), ("a", "b", "c", "d")])
def test_any_number_of_modalities(fusion, names, tmp_path):
    network = net(names, fusion=fusion).eval()
    images = batch(2, names).images
    out = network.outputs(images)
    assert out.logits.shape == (2, 3)
    assert out.fused.shape[1] == 4 * (len(names) if fusion == "concat" else 1)
    save_multimodal(network, tmp_path, ["x", "y", "z"])
    torch.testing.assert_close(load_multimodal(tmp_path).eval()(images), out.logits)
    encoder = timm.create_model("resnet18", features_only=True, out_indices=(2,), in_chans=1, **SMALL).eval()
    encoder.load_state_dict(load_file(tmp_path / "encoders/b.safetensors"))
    torch.testing.assert_close(encoder(images["b"])[0], network.encoders["b"](images["b"])[0])


def test_what_is_no_resnet_or_no_folder_is_named(tmp_path):
    with pytest.raises(InputError, match="not a timm ResNet"):
        MultiModalNet("vit_tiny_patch16_224", {"a": 1, "b": 1}, 3)
    with pytest.raises(InputError, match="not a multimodal network"):
        load_multimodal(tmp_path)


# ---------------------------------------------------------------- who learns from what


def test_before_e0_it_is_training_with_modalities_dropped():
    data = load_modalities(DataConfig(image_size=16, per_class=3, validation=0.05), ROWS, 0)
    student, teacher = net(("a", "b"), classes=10), net(("a", "b"), classes=10, seed=1)
    helped = MMANet(teacher, student, held_out=data.validation, warmup_epochs=5).train()
    plain = MMANet(None, student, mad_weight=0.0, mar_weight=0.0).train()
    given = next(iter(data.train.loader(8)))
    masks = draw_masks(8, 2, "cpu")
    before = helped.masked_loss(given, masks)
    assert "mad" not in before
    assert before["mar"][0] == 0
    torch.testing.assert_close(before.total(), plain.masked_loss(given, masks).total())
    before.total().backward()
    assert all(p.grad is None for p in helped.auxiliary.parameters())
    helped.progress.epoch = 6
    terms = helped.masked_loss(given, masks)
    assert {name: weight for name, (weight, _) in terms.items()} == {"ce": 1.0, "mad": 30.0, "mar": 0.5}
    terms.total().backward()
    assert not helped.teacher.training
    assert all(p.grad is None for p in teacher.parameters())


def test_regularisation_reaches_the_encoders_and_not_the_trunk():
    data = load_modalities(DataConfig(image_size=16, per_class=3, validation=0.05), ROWS, 0)
    student = net(("a", "b"), classes=10)
    distiller = MMANet(None, student, held_out=data.validation, mad_weight=0.0, warmup_epochs=0).train()
    distiller.progress.epoch, distiller.weak[:] = 1, True
    distiller.masked_loss(next(iter(data.train.loader(8))), torch.ones(8, 2).bool())["mar"][1].backward()
    assert all(p.grad is None for p in student.trunk.parameters())
    assert any(p.grad is not None and p.grad.any() for p in student.encoders["a"].parameters())
    assert any(p.grad is not None and p.grad.any() for p in distiller.auxiliary.parameters())


def test_what_the_distiller_needs_is_named():
    with pytest.raises(InputError, match="needs a teacher"):
        MMANet(None, net(), mar_weight=0.0)
    with pytest.raises(InputError, match="needs held_out"):
        MMANet(net(), net(seed=1))


# ---------------------------------------------------------------- modalities


def test_views_of_digits():
    modalities = [
        *(ModalityConfig(name=f"r{i}", view="rows", part=part) for i, part in enumerate([(0, 0.375), (0.375, 1)])),
        ModalityConfig(name="columns", view="columns", part=(0.5, 1)),
        ModalityConfig(name="edges", view="gradient"),
        ModalityConfig(name="soft", view="blur"),
        ModalityConfig(name="whole"),
    ]
    data = load_modalities(DataConfig(per_class=2, image_size=8), modalities, 0)
    pixels = {name: images.split.images for name, images in data.train.parts.items()}
    assert {tuple(values.shape) for values in pixels.values()} == {(20, 1, 8, 8)}
    whole = pixels["whole"].float()
    half = F.interpolate(whole[:, :, :, 4:], (8, 8), mode="bilinear", antialias=True).round().clamp(0, 255).byte()
    assert torch.equal(pixels["columns"], half)
    assert pixels["soft"].float().std() < whole.std()
    assert not torch.equal(pixels["r0"], pixels["r1"])
    one, many = data.train[3], data.train._batch([3])
    for name in pixels:
        torch.testing.assert_close(one[0][name], many.images[name][0])
    with pytest.raises(InputError, match="from < to"):
        load_modalities(DataConfig(), [modalities[0], ModalityConfig(name="x", view="rows", part=(0.5, 0.5))], 0)
    with pytest.raises(InputError, match="two or more"):
        load_modalities(DataConfig(), [ModalityConfig(name="x"), ModalityConfig(name="x")], 0)


def write_folders(root, drop: str | None = None) -> None:
    generator = np.random.default_rng(0)
    for modality, mode in (("color", (12, 12, 3)), ("depth", (12, 12))):
        for label in ("fake", "live"):
            folder = root / modality / label
            folder.mkdir(parents=True)
            for number in range(8):
                if drop != f"{modality}/{label}/{number}":
                    Image.fromarray(generator.integers(0, 255, mode, dtype=np.uint8)).save(folder / f"{number}.png")


def test_a_folder_a_modality(tmp_path):
    write_folders(tmp_path / "good")
    config = DataConfig(name="image_folder", root=str(tmp_path / "good/color"), image_size=16)
    modalities = [
        ModalityConfig(name="color"),
        ModalityConfig(name="depth", root=str(tmp_path / "good/depth"), channels=1),
    ]
    data = load_modalities(config, modalities, 0)
    assert data.channels == {"color": 3, "depth": 1}
    given = next(iter(data.train.loader(4, train=True)))
    assert {name: tuple(x.shape[1:]) for name, x in given.images.items()} == {
        "color": (3, 16, 16),
        "depth": (1, 16, 16),
    }
    torch.manual_seed(0)
    network = MultiModalNet("resnet18", data.channels, 2, args=SMALL)
    assert predict_masked(network, data.test, torch.tensor([True, False])).shape == (len(data.test), 2)
    augmented = config.model_copy(update={"augment": AugmentConfig(crop="margin", rotation=30, hflip=0.5)})
    same = [ModalityConfig(name="one"), ModalityConfig(name="two")]
    given = next(iter(load_modalities(augmented, same, 0).train.loader(6, train=True)))
    assert torch.equal(given.images["one"], given.images["two"]), "one crop and one rotation for a sample"
    write_folders(tmp_path / "bad", drop="depth/live/3")
    bad = [modalities[0], ModalityConfig(name="depth", root=str(tmp_path / "bad/depth"), channels=1)]
    with pytest.raises(InputError, match="'depth' does not hold the train samples of 'color'"):
        load_modalities(config, bad, 0)
    with pytest.raises(InputError, match="only for images in memory"):
        load_modalities(config, [modalities[0], ModalityConfig(name="edges", view="gradient")], 0)


# ---------------------------------------------------------------- runs


def run(folder, *overrides):
    method, config = load_config("mmanet/small", [*TINY, *overrides])
    return method, config, train(method, config, folder, quiet=True, cpu=True)


def test_a_run_works_with_every_combination(tmp_path):
    method, config, metrics = run(tmp_path / "run")
    names = [f"accuracy/{mask_name(mask)}" for mask in combinations(3)]
    assert metrics["student/accuracy"] == pytest.approx(np.mean([metrics[name] for name in names]))
    assert metrics["accuracy/111"] == metrics["full/accuracy"]
    assert {"teacher/accuracy", "relation_gap", "weakest_rank"} <= set(metrics)
    record = json.loads((tmp_path / "run/student/config.json").read_text())
    assert list(record["channels"]) == ["top", "middle", "bottom"]
    assert not any("auxiliary" in name for name in load_file(tmp_path / "run/student/model.safetensors"))
    assert len(method.predict(config, load_run(tmp_path / "run")[2], 4)) == 4
    lines = (tmp_path / "run/metrics.jsonl").read_text()
    assert '"mad"' in lines
    assert '"mar"' in lines


@pytest.mark.slow
def test_an_encoder_loads_where_kd_cannot_be_imported(tmp_path):
    run(tmp_path / "run", "method_args.mad_weight=0", "method_args.mar_weight=0")
    code = (
        "import timm, torch\nfrom safetensors.torch import load_file\n"
        "args = dict(layers=(1, 1, 1, 1), channels=(4, 4, 8, 8), stem_width=8)\n"
        "m = timm.create_model('resnet18', features_only=True, out_indices=(2,), in_chans=1, **args)\n"
        "m.load_state_dict(load_file(sys.argv[1]))\nprint(tuple(m(torch.zeros(2, 1, 16, 16))[0].shape))"
    )
    said = run_without_kd(code, str(tmp_path / "run/student/encoders/top.safetensors"))
    assert said == "(2, 4, 2, 2)"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.validation=0", "data.validation"),
        ("method_args.warmup_epochs=5", "leaves nothing"),
        ("student.name=vit_tiny_patch16_224", "student.name"),
        ("method_args.relation=rows", "method_args.relation"),
        ("modalities=[{name: top}]", "modalities"),
        ("data.augment.cutmix=1.0", "cutmix"),
        ("teacher.cache=x", "teacher.cache"),
    ],
)
def test_bad_input_is_named_before_anything_trains(tmp_path, override, message):
    with pytest.raises(InputError, match=message):
        run(tmp_path / "run", override)
    assert not (tmp_path / "run").exists()


def test_configs_say_what_they_are():
    for name in ("small", "paper"):
        values = read_yaml(find_config(f"mmanet/{name}"))
        release = {"release"} if name == "paper" else set()
        assert {"ce", "sp", "mad", "mad_column", "mar"} | release == set(values["compare"])
        for overrides in ({}, *values["compare"].values()):
            arm_config(values, overrides)
    _, paper = load_config("mmanet/paper")
    assert (paper.student.name, paper.method_args.mad_weight, len(paper.modalities)) == ("seresnet18", 30.0, 3)
    network = MultiModalNet(paper.student.name, {"color": 3, "depth": 3, "ir": 3}, 2)
    assert network.width * 3 == 384, "three encoders of 128 channels, as in the release"
