"""MSD: the partition and its router, who learns from which conditions, bundles, and whole runs."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from kd_diffusion.engine.adversarial import GANConfig
from kd_diffusion.engine.denoising import DenoisingDistiller
from kd_diffusion.engine.distillation import Networks
from kd_diffusion.integrations.pipelines import open_pipeline, opened
from kd_diffusion.integrations.routed import (
    RoutedPipeline,
    Router,
    join_bundles,
    pooled,
    routed_function,
    write_bundle,
)
from kd_diffusion.methods import dmd2
from kd_diffusion.methods.msd import METHOD, MSD, MSDConfig, small_network
from kd_diffusion.pairs import Pairs, RegressionConfig, distance_of, drawn_pairs, perceptual, read_pairs, write_pairs
from kd_diffusion.partition import pooled_prompts, prompt_router, split_classes, split_embeddings
from kd_diffusion.runs import Sampling, load_data, save_pipeline
from kd_diffusion.testing import tiny_unet, unet_pipeline
from kdcore import run
from kdcore.compare import load_arms
from kdcore.config import override, read_yaml
from kdcore.errors import InputError
from kdcore.method import config_folder, config_of

CONFIGS = sorted(path.stem for path in config_folder("msd").glob("*.yaml"))
SMALL = {"block_out_channels": [4, 8]}
FAST = {
    "train.steps": 3,
    "train.batch_size": 8,
    "train.optimizer": {"name": "adam", "lr": 1e-3, "betas": [0.0, 0.999]},
    "evaluation": {"samples": 60, "batch_size": 60, "teacher_steps": [1]},
}


def config(folder, method=METHOD, **changes):
    values = {
        "method": method.key,
        "teacher": {"pretrained": str(folder), "null_class": 10},
        "data": {"name": "digits"},
        "train": {"steps": 1},
    }
    return config_of(method, override(values, {**FAST, **changes}))


def networks(**generator) -> Networks:
    found = opened(unet_pipeline(), null_class=10)
    fake = found.denoiser_for(tiny_unet().train())
    with torch.no_grad():
        for parameter in fake.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7)))
    student = found.denoiser_for(tiny_unet(**generator).train())
    return Networks(found.denoiser, fake, student, found.conditioner, found.space)


def batch(count=4, seed=0) -> dict:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 10, (count,), generator=generator)
    return {"x": torch.randn(count, 1, 8, 8, generator=generator), "class_labels": labels}


def pairs_of(labels: list[int], places: list[int] | None = None) -> Pairs:
    generator = torch.Generator().manual_seed(4)
    z, y = torch.randn(2, len(labels), 1, 8, 8, generator=generator)
    kept = torch.arange(len(labels)) if places is None else torch.tensor(places)
    return Pairs(z, y, {"class_labels": torch.tensor(labels)}, kept)


def files(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return open_pipeline(folder).network.state_dict()


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


def metrics_of(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


# ---------------------------------------------------------------- the partition


@pytest.mark.parametrize(
    ("classes", "students", "sizes"),
    [(1000, 4, [250] * 4), (1000, 3, [334, 333, 333]), (10, 4, [3, 3, 2, 2]), (10, 1, [10])],
)
def test_sizes_of_the_parts_of_classes(classes, students, sizes):
    router = split_classes(classes, students)
    assert router.table.bincount().tolist() == sizes
    assert router.table.tolist() == sorted(router.table.tolist())  # consecutive ids


@given(st.integers(1, 300), st.data())
def test_every_class_has_one_student_and_sizes_differ_by_one_at_most(classes, data):
    students = data.draw(st.integers(1, classes))
    order = data.draw(st.none() | st.permutations(range(classes)))
    router = split_classes(classes, students, order)
    counts = router.route({"class_labels": torch.arange(classes)}).bincount(minlength=students)
    assert int(counts.sum()) == classes
    assert int(counts.max() - counts.min()) <= 1


@pytest.mark.parametrize("students", [1, 2, 4, 8])
@pytest.mark.parametrize("random", [False, True])
def test_prompts_split_into_equal_parts_by_their_directions(students, random):
    generator = torch.Generator().manual_seed(3)
    embeddings = torch.randn(103, 6, generator=generator) * torch.tensor([9.0, 5.0, 3.0, 1.0, 1.0, 1.0])
    router = split_embeddings(embeddings, students, generator if random else None)
    if students > 1:
        leaves = router.walk(embeddings)
        counts = leaves.bincount(minlength=students)
        assert int(counts.max() - counts.min()) <= 1
        if not random:  # the first direction is the axis of the largest variance
            assert router.directions[0].abs().argmax() == 0
    else:
        assert router.route({"prompt_embeds": embeddings[:, None]}).tolist() == [0] * 103


def test_a_repeated_prompt_is_never_divided():
    values = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 2.0])[:, None] * torch.tensor([[1.0, 0.5]])
    noisy = values + 1e-9 * torch.randn(values.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    router = split_embeddings(noisy, 2)
    assert len(set(router.walk(noisy)[:5].tolist())) == 1
    assert sorted(router.walk(noisy).bincount().tolist()) == [2, 5]
    with pytest.raises(InputError, match="too alike"):
        split_embeddings(torch.ones(8, 3), 2)


@pytest.mark.parametrize("students", [0, 3, 16])
def test_numbers_of_students_that_prompts_do_not_have(students):
    with pytest.raises(InputError, match=rf"students = {students}"):
        split_embeddings(torch.randn(8, 3), students)


@pytest.mark.parametrize("students", [0, 11])
def test_numbers_of_students_that_classes_do_not_have(students):
    with pytest.raises(InputError, match=rf"students = {students}: allowed: 1 to the 10 classes"):
        split_classes(10, students)


def test_a_router_is_the_same_after_reloading(tmp_path):
    generator = torch.Generator().manual_seed(1)
    embeddings = torch.randn(64, 5, generator=generator)
    for name, router, condition in (
        ("classes", split_classes(10, 4), {"class_labels": torch.arange(10)}),
        ("prompts", split_embeddings(embeddings, 4), {"pooled_embeds": embeddings}),
        ("one", Router(1), {"pooled_embeds": embeddings}),
    ):
        router.save(tmp_path / name)
        again = Router.load(tmp_path / name)
        first = router.route(condition)
        assert again.same_as(router)
        assert torch.equal(first, router.route(condition))
        assert torch.equal(first, again.route(condition))
    assert not split_classes(10, 2).same_as(split_classes(10, 3))
    assert not split_classes(10, 2).same_as(split_classes(10, 2, list(reversed(range(10)))))


def test_a_null_class_has_no_student():
    with pytest.raises(InputError, match="class_labels: 3 to 10; students serve 0 to 9"):
        split_classes(10, 2).route({"class_labels": torch.tensor([3, 10])})


def test_padding_has_no_part_in_the_pooled_embedding():
    embeds = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    found = pooled({"prompt_embeds": embeds, "prompt_mask": mask})
    torch.testing.assert_close(found[0], embeds[0, :2].mean(0))
    torch.testing.assert_close(found[1], embeds[1].mean(0))
    given = {"prompt_embeds": embeds, "pooled_embeds": embeds[:, 0]}
    assert torch.equal(pooled(given), embeds[:, 0])


@pytest.mark.parametrize("content", [None, "{", '{"students": 4}', '{"students": "many"}', '{"other": 1}'])
def test_a_broken_bundle_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "router.json").write_text(content)
    with pytest.raises(InputError, match=r"bundle = '.*no router could be read"):
        RoutedPipeline.from_pretrained(tmp_path)


def test_a_damaged_table_is_named(tmp_path):
    split_classes(10, 2).save(tmp_path)
    (tmp_path / "router.safetensors").write_bytes(b"12345678rubbish")
    with pytest.raises(InputError, match="no router could be read"):
        Router.load(tmp_path)


# ---------------------------------------------------------------- the losses


def test_without_a_regression_the_turns_are_those_of_dmd2():
    """lambda_reg = 0 and R = 5 is DMD2's DM stage, and so is no regression at all."""
    weightless = RegressionConfig(weight=0.0, distance="l2")
    arguments = {"gan": None, "fake_updates": 5}
    host = dmd2.DMD2(networks(), dmd2.DMD2Config(**arguments), seed=3)
    plain = MSD(networks(), MSDConfig(students=1, **arguments), seed=3)
    with_pairs = MSD(
        networks(), MSDConfig(students=1, regression=weightless, **arguments), pairs=pairs_of([1, 2]), seed=3
    )
    assert [player.every for player in plain.players()] == [5, 1]
    for player in ("generator", "fake"):
        losses = [method.loss(batch(), player).total() for method in (host, plain, with_pairs)]
        assert torch.equal(losses[0], losses[1])
        assert torch.equal(losses[0], losses[2])


def test_the_regression_draws_from_all_pairs_and_filtered_from_its_own():
    labels = [0, 1, 8, 9]
    for places, wanted in ((None, {0, 1, 8, 9}), ([0, 1], {0, 1})):
        method = MSD(
            networks(),
            MSDConfig(students=2, gan=None, regression=RegressionConfig(distance="l2")),
            pairs=pairs_of(labels, places),
        )
        seen: set[int] = set()
        method.student.register_forward_pre_hook(
            lambda module, args, kwargs, seen=seen: seen.update(kwargs["class_labels"].tolist()), with_kwargs=True
        )
        for step in range(12):
            method.progress.step = step
            method.regression_loss(4, method.draws.at("generator", step))
        assert seen == wanted


def test_hand_value_of_the_regression():
    class Zero(nn.Module):
        def forward(self, x_t, t, condition):
            return torch.zeros_like(x_t)

    args = MSDConfig(students=2, gan=None, regression=RegressionConfig(weight=0.25, distance="l2"))
    pairs = pairs_of([0, 1])
    pairs.y = torch.stack([torch.full((1, 8, 8), 2.0), torch.full((1, 8, 8), 2.0)])
    method = MSD(networks(), args, pairs=pairs)
    method.generator = Zero()
    weight, loss = method.generator_terms(
        method.sample(batch(), "generator", grad=False), batch(), method.draws.at("generator", 0)
    )["regression"]
    assert (weight, loss.item()) == (0.25, 4.0)


def test_distances_of_a_sample_to_itself_are_zero(tmp_path):
    from kd_diffusion.metrics import save_features, train_features

    x = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    labels = torch.tensor([0, 1, 0, 1])
    save_features(train_features(x, labels, 2, 0), tmp_path / "features")
    for name in ("l2", "features"):
        distance = distance_of(RegressionConfig(distance=name), tmp_path / "features")
        assert distance(x, x).item() == 0
        assert distance(x, x.flip(0)).item() > 0


def test_lpips_enlarges_small_pictures_and_is_zero_on_equal_ones():
    from torchmetrics.functional.image.lpips import _LPIPS

    torch.manual_seed(0)  # random weights: what is checked is the form of the distance
    net = _LPIPS(pretrained=False, net="squeeze", pnet_rand=True).eval()
    sizes = []
    net.register_forward_pre_hook(lambda module, args: sizes.append(tuple(args[0].shape)))
    distance = perceptual(net)
    x = torch.rand(2, 1, 8, 8) * 2 - 1
    with torch.no_grad():
        assert distance(x, x).item() == 0
        assert distance(torch.rand(1, 3, 256, 256), torch.rand(1, 3, 256, 256)).ndim == 0
    assert sizes == [(2, 3, 224, 224), (1, 3, 256, 256)]


def test_pairs_are_the_teachers_and_of_many_conditions(tmp_path, tiny_unet_folder):
    found = open_pipeline(tiny_unet_folder, null_class=10)
    data = load_data(config(tiny_unet_folder).data, 0)
    part = data.train.subset(data.train.labels.argsort().numpy())  # class by class, as folders come
    settings = RegressionConfig(pairs=30, teacher_steps=2, distance="l2")
    write_pairs(tmp_path / "pairs", found, part, settings, kappa=1.0, seed=0, batch=16)
    pairs = read_pairs(tmp_path / "pairs")
    assert pairs.z.shape == pairs.y.shape == (30, 1, 8, 8)
    assert len(pairs.condition["class_labels"].unique()) > 5
    own = drawn_pairs(tmp_path / "pairs", settings.model_copy(update={"filtered": True}), split_classes(10, 2), 1)
    assert pairs.condition["class_labels"][own.places].min() >= 5
    from kd_diffusion.engine.timesteps import levels
    from kd_diffusion.evaluation import trajectory

    condition = {"class_labels": pairs.condition["class_labels"][:4]}
    again = trajectory(found, condition, pairs.z[:4], levels(found.process, 2))[-1]
    torch.testing.assert_close(again, pairs.y[:4])


def test_score_matching_at_the_teacher_is_zero_and_leaves_the_teacher():
    found = opened(unet_pipeline(), null_class=10)
    teacher, twin = found.denoiser.double(), found.copied().double()
    data = {**batch(), "x": batch()["x"].double()}
    distiller = DenoisingDistiller(twin, teacher=teacher, condition=found.conditioner.embed, seed=0)
    loss = distiller.loss(data).total()
    loss.backward()
    assert loss.item() < 1e-24  # the target goes through x and back
    assert all(p.grad is None or p.grad.abs().max() < 1e-11 for p in distiller.parameters())
    small = found.denoiser_for(small_network(found, MSDConfig(student_network=SMALL)).double())
    distiller = DenoisingDistiller(small, teacher=teacher, condition=found.conditioner.embed, seed=0)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in distiller.parameters() if p.requires_grad], lr=0.1)
    distiller.loss(data).total().backward()
    optimizer.step()
    assert equal(before, teacher.state_dict())
    assert not any(p.requires_grad for p in teacher.parameters())
    assert any(p.grad is not None and p.grad.any() for p in small.parameters())


def test_adm_without_its_terms_goes_on_as_dm():
    """From DM's weights and with lambda_G = lambda_D = 0, the steps of ADM are those of DM."""
    weightless = GANConfig(weight_generator=0.0, weight_discriminator=0.0)
    trained = []
    for gan in (None, weightless):
        torch.manual_seed(0)
        method = MSD(networks(), MSDConfig(students=2, gan=gan), seed=3)
        for step in range(3):
            method.progress.step = step
            for player, module in (("generator", method.generator), ("fake", method.fake)):
                terms = method.loss(batch(seed=step), player)
                parameters = list(module.parameters())
                gradients = torch.autograd.grad(terms.total(), parameters, allow_unused=True)
                with torch.no_grad():
                    for parameter, gradient in zip(parameters, gradients, strict=True):
                        if gradient is not None:
                            parameter -= 0.01 * gradient
        trained.append((method.generator.state_dict(), method.fake.state_dict()))
    assert equal(trained[0][0], trained[1][0])
    assert equal(trained[0][1], trained[1][1])


# ---------------------------------------------------------------- bundles


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """Of three channels: the stock pipeline takes no other latents."""
    folder = tmp_path_factory.mktemp("teacher") / "unet"
    pipe = unet_pipeline()
    pipe.register_modules(unet=tiny_unet(in_channels=3, out_channels=3))
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bundle(tmp_path_factory, teacher):
    """Three students of different weights; classes 0-3, 4-6, 7-9."""
    folder = tmp_path_factory.mktemp("bundle")
    found, students = open_pipeline(teacher), {}
    for k in range(3):
        network = tiny_unet(in_channels=3, out_channels=3)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.mul_(1 + 0.1 * k)
        students[k] = folder / f"student_{k}"
        save_pipeline(config(teacher), found, network, students[k], [999], Sampling())
    write_bundle(folder / "bundle", split_classes(10, 3), students)
    return folder / "bundle"


def seeds(count: int, first: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(first + index) for index in range(count)]


def test_mixed_conditions_come_back_in_order_and_cost_one_forward_each(bundle):
    pipe = RoutedPipeline.from_pretrained(bundle)
    labels = [1, 8, 2, 5]  # students 0, 2, 0, 1
    assert pipe.route(class_labels=labels) == [0, 2, 0, 1]
    assert not pipe.loaded
    forwards = []
    for k in range(3):
        pipe.student(k).unet.register_forward_hook(lambda module, args, output: forwards.append(len(args[0])))
    images = pipe(class_labels=labels, generator=seeds(4), output_type="np").images
    assert sum(forwards) == 4
    assert images.shape == (4, 8, 8, 3)
    for index, label in enumerate(labels):
        alone = pipe(class_labels=label, generator=[torch.Generator().manual_seed(index)], output_type="np").images[0]
        assert abs(alone - images[index]).max() < 1e-5
    other = pipe(class_labels=[8, 8], generator=seeds(2), output_type="np").images
    assert abs(other[0] - images[0]).max() > 1e-3  # the students differ


def test_latents_follow_their_conditions(bundle):
    pipe = RoutedPipeline.from_pretrained(bundle)
    z = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    images = pipe(class_labels=[9, 0, 5], latents=z, output_type="pt").images
    turned = pipe(class_labels=[5, 0, 9], latents=z.flip(0), output_type="pt").images
    torch.testing.assert_close(images, turned.flip(0), rtol=0, atol=1e-5)
    assert len(pipe(class_labels=[9, 0], latents=z[:2]).images) == 2  # pictures


def test_students_are_loaded_when_they_are_needed(bundle):
    pipe = RoutedPipeline.from_pretrained(bundle).to("cpu")
    pipe(class_labels=[0, 3])
    assert list(pipe.loaded) == [0]
    pipe(class_labels=[9])
    assert list(pipe.loaded) == [0, 2]


def test_the_evaluation_samples_as_the_bundle_does(bundle, teacher):
    z = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(2))

    class Draw:
        count = 4

        def normal(self, shape):
            return z

    labels = [1, 8, 2, 5]
    own = routed_function(bundle, open_pipeline(teacher))({"class_labels": torch.tensor(labels)}, Draw())
    stock = RoutedPipeline.from_pretrained(bundle)(class_labels=labels, latents=z, output_type="pt").images
    torch.testing.assert_close((own / 2 + 0.5).clamp(0, 1), stock, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_a_student_loads_where_this_package_is_not(bundle):
    script = """
        import sys
        class Blocked:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in ("kd_diffusion", "kdcore"):
                    raise ModuleNotFoundError(name)
        sys.meta_path.insert(0, Blocked())
        from diffusers import DiffusionPipeline
        pipe = DiffusionPipeline.from_pretrained(sys.argv[1])
        pipe.set_progress_bar_config(disable=True)
        images = pipe(batch_size=2, class_labels=[4, 5], num_inference_steps=1, output_type="np").images
        assert images.shape == (2, 8, 8, 3)
        assert not [name for name in sys.modules if name.startswith(("kd_diffusion", "kdcore"))]
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(bundle / "student_1")]
    assert subprocess.run(command, check=False).returncode == 0


def test_calls_that_the_bundle_cannot_answer(bundle, tmp_path):
    pipe = RoutedPipeline.from_pretrained(bundle)
    with pytest.raises(InputError, match="either class_labels or prompt"):
        pipe()
    with pytest.raises(InputError, match="students divide classes"):
        pipe(prompt="a two")
    with pytest.raises(InputError, match="class_labels: 10 to 10"):
        pipe(class_labels=[10])
    with pytest.raises(InputError, match="one image a condition"):
        pipe(class_labels=[1], num_images_per_prompt=2)
    split_classes(10, 3).save(tmp_path / "part")
    with pytest.raises(InputError, match="student 1 of 3 is not in it"):
        RoutedPipeline.from_pretrained(tmp_path / "part")(class_labels=[4])


def test_bundles_of_students_that_were_trained_apart_join(bundle, tmp_path):
    for k in range(3):
        write_bundle(tmp_path / str(k), split_classes(10, 3), {k: bundle / f"student_{k}"})
    join_bundles([tmp_path / str(k) for k in range(3)], tmp_path / "whole")
    assert files(tmp_path / "whole") == files(bundle)
    with pytest.raises(InputError, match="student 1 is in"):
        join_bundles([tmp_path / "1", tmp_path / "1"], tmp_path / "twice")
    with pytest.raises(InputError, match="exists already"):
        join_bundles([tmp_path / "1"], tmp_path / "whole")
    split_classes(10, 2).save(tmp_path / "other")
    with pytest.raises(InputError, match="its router is not that of"):
        join_bundles([tmp_path / "1", tmp_path / "other"], tmp_path / "mixed")


def test_prompts_go_to_their_students(tmp_path, tiny_text_folder):
    found = open_pipeline(tiny_text_folder)
    prompts = ["a two", "seven", "an oak tree", "b", "the five", "a bold nine", "six", "zero"]
    part = load_data(config(tiny_text_folder).data, 0).train.subset(torch.arange(8).numpy())
    part.prompts = prompts
    router = prompt_router(found, part, 2, shuffled=False, seed=0)
    places = router.walk(pooled_prompts(found, part, batch=3))
    assert places.bincount().tolist() == [4, 4]
    settings = config(tiny_text_folder, **{"teacher.null_class": None})
    folders = {k: tmp_path / f"s{k}" for k in range(2)}
    for folder in folders.values():
        save_pipeline(settings, found, found.network, folder, [999], Sampling())
    write_bundle(tmp_path / "bundle", router, folders)
    pipe = RoutedPipeline.from_pretrained(tmp_path / "bundle")
    assert pipe.route(prompt=prompts) == places.tolist()
    assert [pipe.route(prompt=[prompt])[0] for prompt in prompts] == places.tolist()
    steps = []
    for k in range(2):
        pipe.student(k).unet.register_forward_hook(lambda module, args, output: steps.append(len(args[0])))
    images = pipe(prompt=prompts[:3], generator=seeds(3), output_type="np").images
    assert images.shape[0] == 3
    assert sum(steps) == 3  # one step without guidance, as kd.json says
    with pytest.raises(InputError, match="students divide prompts"):
        pipe(class_labels=[1])


# ---------------------------------------------------------------- runs


@pytest.mark.slow
def test_one_student_alone_is_dmd2_bit_for_bit(tmp_path, tiny_unet_folder):
    args = {"method_args.gan": None, "method_args.fake_updates": 2}
    host = config(tiny_unet_folder, dmd2.METHOD, **args)
    run.train(dmd2.METHOD, host, tmp_path / "host", quiet=True, cpu=True)
    own = config(tiny_unet_folder, **{"method_args.students": 1, "method_args.fake_updates": 2})
    run.train(METHOD, own, tmp_path / "msd", quiet=True, cpu=True)
    assert equal(weights(tmp_path / "host" / "student"), weights(tmp_path / "msd" / "student" / "student_0"))
    assert not equal(weights(tmp_path / "host" / "student"), weights(tiny_unet_folder))
    a, b = metrics_of(tmp_path / "host"), metrics_of(tmp_path / "msd")
    assert a["student/frechet"] == pytest.approx(b["student/frechet"], rel=1e-5)
    assert b["student/nfe"] == 1


@pytest.mark.slow
def test_students_are_runs_of_their_own(tmp_path, tiny_unet_folder):
    """A student alone is bit-identical to the one among others, and a rerun leaves the others' files."""
    both = config(tiny_unet_folder, **{"method_args.students": 2, "method_args.fake_updates": 1})
    run.train(METHOD, both, tmp_path / "both", quiet=True, cpu=True)
    alone = config(
        tiny_unet_folder, **{"method_args.students": 2, "method_args.fake_updates": 1, "method_args.only": [1]}
    )
    metrics = run.train(METHOD, alone, tmp_path / "one", quiet=True, cpu=True)
    assert not (tmp_path / "one" / "student" / "student_0").exists()
    assert {"student/frechet", "student_1/frechet"} <= metrics.keys()
    assert "student_0/frechet" not in metrics
    _, loaded, artefacts = run.load_run(tmp_path / "one")
    assert {int(row["caption"]) for row in METHOD.predict(loaded, artefacts, 6)} <= {5, 6, 7, 8, 9}
    _, loaded, artefacts = run.load_run(tmp_path / "both")
    rows = METHOD.predict(loaded, artefacts, 4)
    assert [int(row["caption"]) < 5 for row in rows] == [True, True, False, False]
    assert len({tuple(row["images"]) for row in rows}) == 1
    assert "step 3" in rows[0]["images"]
    for row in rows:  # the last snapshot is what the saved student draws
        assert abs(row["images"]["step 3"].astype(int) - row["images"]["student"]).max() <= 1
    first, second = (weights(tmp_path / "both" / f"student_{k}") for k in range(2))
    assert equal(second, weights(tmp_path / "one" / "student_1"))
    assert not equal(first, second)
    before = files(tmp_path / "both" / "student_0")
    record = json.loads((tmp_path / "both" / "stages.json").read_text())
    (tmp_path / "both" / "metrics.json").unlink()
    for name in ("student-1", "bundle"):
        del record[name]
    (tmp_path / "both" / "stages.json").write_text(json.dumps(record))
    run.train(METHOD, both, tmp_path / "both", resume=True, quiet=True, cpu=True)
    assert files(tmp_path / "both" / "student_0") == before == files(tmp_path / "both" / "student" / "student_0")
    assert equal(second, weights(tmp_path / "both" / "student" / "student_1"))
    given = {"method_args.students": 2, "method_args.router": str(tmp_path / "both" / "router")}
    run.check(METHOD, config(tiny_unet_folder, **given), tmp_path / "checked", cpu=True)


def test_every_condition_of_a_students_batches_is_its_own(tmp_path, tiny_unet_folder, monkeypatch):
    seen: dict[int, set[int]] = {}
    regression: set[int] = set()
    loss, pairs = MSD.loss, MSD.regression_loss

    def watched(self, batch, player="generator"):
        seen.setdefault(id(self), set()).update(batch["class_labels"].tolist())
        return loss(self, batch, player)

    def drawn(self, count, draw):
        kept = self.generator.network.register_forward_pre_hook(
            lambda module, args, kwargs: regression.update(kwargs["class_labels"].tolist()), with_kwargs=True
        )
        try:
            return pairs(self, count, draw)
        finally:
            kept.remove()

    monkeypatch.setattr(MSD, "loss", watched)
    monkeypatch.setattr(MSD, "regression_loss", drawn)
    settings = config(
        tiny_unet_folder,
        **{
            "method_args.students": 2,
            "method_args.only": [1],
            "method_args.fake_updates": 1,
            "method_args.regression": {"distance": "l2", "pairs": 20, "teacher_steps": 1},
            "train.steps": 4,
            "data.held_out": 0.0,  # no metrics, so no network for their features
        },
    )
    run.train(METHOD, settings, tmp_path / "run", quiet=True, cpu=True)
    assert len(seen) == 1
    assert set().union(*seen.values()) <= {5, 6, 7, 8, 9}
    assert regression & {0, 1, 2, 3, 4}


@pytest.mark.slow
def test_small_students_with_score_matching_and_the_adversarial_stage(tmp_path, tiny_unet_folder):
    adam = {"name": "adam", "lr": 1e-3}
    settings = config(
        tiny_unet_folder,
        **{
            "method_args.students": 2,
            "method_args.student_network": SMALL,
            "method_args.tsm": {"steps": 2, "batch_size": 8, "optimizer": adam},
            "method_args.adm": {"steps": 2, "batch_size": 8, "optimizer": adam, "ema": {"decay": 0.9}},
        },
    )
    metrics = run.train(METHOD, settings, tmp_path / "run", quiet=True, cpu=True)
    stages = list(json.loads((tmp_path / "run" / "stages.json").read_text()))
    assert stages[-7:] == ["router", "tsm", "dm-0", "student-0", "dm-1", "student-1", "bundle"]
    teacher = sum(p.numel() for p in open_pipeline(tiny_unet_folder).network.parameters())
    assert metrics["student/parameters"] < teacher
    fake = sorted((tmp_path / "run" / "dm_0" / "fake").iterdir())
    assert [path.suffix for path in fake] == [".json", ".safetensors"]
    for name in ("student_0", "student_1", "student/student_0"):
        pipe = DiffusionPipeline.from_pretrained(tmp_path / "run" / name)
        pipe.set_progress_bar_config(disable=True)
        images = pipe(batch_size=2, class_labels=[1, 2], num_inference_steps=1, output_type="np").images
        assert images.shape == (2, 8, 8, 1)
        assert pipe.unet.config.block_out_channels == [4, 8]
    _, loaded, artefacts = run.load_run(tmp_path / "run")
    rows = METHOD.predict(loaded, artefacts, 2)
    assert rows[0]["images"]["student"].shape == (8, 8)


def test_adm_starts_where_dm_ended_on_other_noise(tmp_path, tiny_unet_folder, monkeypatch):
    starts = []
    init = MSD.__init__

    def watched(self, networks, args, **options):
        init(self, networks, args, **options)
        state = {name: value.clone() for name, value in self.student.state_dict().items()}
        starts.append((args.gan is not None, state, self.draws.seed, self.fake.network.state_dict()))

    monkeypatch.setattr(MSD, "__init__", watched)
    adm = {"steps": 1, "batch_size": 8, "optimizer": {"name": "adam", "lr": 1e-3}}
    changes = {"method_args.students": 1, "method_args.adm": adm, "data.held_out": 0.0}
    settings = config(tiny_unet_folder, **changes)
    run.train(METHOD, settings, tmp_path / "run", quiet=True, cpu=True)
    assert [gan for gan, *_ in starts] == [False, True]
    assert equal(starts[1][1], weights(tmp_path / "run" / "dm_0"))
    assert starts[0][2] != starts[1][2]


@pytest.mark.slow
def test_prompts_are_divided_in_a_run(tmp_path, tiny_text_folder):
    settings = config(
        tiny_text_folder, **{"teacher.null_class": None, "method_args.students": 2, "data.image_size": 16}
    )
    metrics = run.train(METHOD, settings, tmp_path / "run", quiet=True, cpu=True)
    assert metrics["students"] == 2
    pipe = RoutedPipeline.from_pretrained(tmp_path / "run" / "student")
    prompts = load_data(settings.data, 0).train.prompts
    places = pipe.route(prompt=prompts[:200])
    assert 60 <= sum(places) <= 140
    assert len(pipe(prompt=prompts[:2]).images) == 2


# ---------------------------------------------------------------- input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method_args.students": 0}, r"method_args\.students"),
        ({"method_args.steps": 2}, r"has steps = 2; students take one step"),
        ({"method_args.only": [4]}, r"only = \[4\]; the students are 0 to 3"),
        ({"method_args.only": []}, r"only = \[\]"),
        ({"method_args.partition": "kmeans"}, r"method_args\.partition"),
        ({"method_args.tsm": {"steps": 1}}, r"tsm without student_network"),
        ({"method_args.adm": {"steps": 1}, "method_args.gan": None}, r"adm with gan: null"),
        ({"method_args.student": 3}, r"did you mean 'students'"),
    ],
)
def test_arguments_out_of_range_are_named(changes, message):
    with pytest.raises(InputError, match=message):
        config("x", **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method_args.students": 11}, r"students = 11: allowed: 1 to the 10 classes"),
        ({"train.batch_size": 400}, r"train\.batch_size = 400: student 2 has \d+ samples"),
        ({"method_args.student_network": {"block_out_channels": [16, 32]}}, r"student_network: has \d+ parameters"),
        ({"method_args.student_network": {"wrong": 1}}, r"method_args\.student_network: UNet2DModel refuses"),
        (
            {"method_args.student_network": SMALL, "student.lora": {"rank": 2}},
            r"student\.lora: with method_args\.student_network",
        ),
        ({"method_args.router": "/nowhere"}, r"method_args\.router = '/nowhere': no router"),
    ],
)
def test_what_does_not_fit_the_data_is_said_before_anything_trains(tmp_path, tiny_unet_folder, changes, message):
    with pytest.raises(InputError, match=message):
        run.check(METHOD, config(tiny_unet_folder, **changes), tmp_path / "run", cpu=True)


def test_prompts_need_a_power_of_two_and_score_matching_needs_images(tmp_path, tiny_text_folder):
    changes = {"teacher.null_class": None, "data.image_size": 16, "method_args.students": 3}
    settings = config(tiny_text_folder, **changes)
    with pytest.raises(InputError, match=r"method_args\.students = 3: allowed for prompts: a power of two"):
        run.check(METHOD, settings, tmp_path / "run", cpu=True)
    (tmp_path / "prompts.txt").write_text("\n".join(["a two", "a three", "seven"] * 8))
    changes = {
        "teacher.null_class": None,
        "data": {"name": "prompts", "root": str(tmp_path / "prompts.txt")},
        "method_args.student_network": SMALL,
        "method_args.tsm": {"steps": 1},
    }
    settings = config(tiny_text_folder, **changes)
    with pytest.raises(InputError, match=r"method_args\.tsm: needs real samples"):
        run.check(METHOD, settings, tmp_path / "run", cpu=True)


def test_a_world_without_conditions_is_refused(tmp_path):
    values = {"method": "msd", "teacher": {"world": {"name": "mixture"}}, "data": {"name": "mixture"}}
    with pytest.raises(InputError, match="no condition to divide"):
        run.check(METHOD, config_of(METHOD, {**values, "train": {"steps": 1}}), tmp_path / "run", cpu=True)


# ---------------------------------------------------------------- the shipped configs


@pytest.mark.parametrize("name", CONFIGS)
def test_shipped_configs_and_their_arms_are_valid(name):
    assert {"small", "paper", "paper-sd15"} <= set(CONFIGS)
    arms = load_arms(f"msd/{name}")
    assert arms[0].name == "msd"
    assert len(arms) > 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["paper", "paper-sd15"])
def test_the_papers_settings_train_on_another_pipeline(tmp_path, tiny_unet_folder, tiny_text_folder, name):
    from PIL import Image

    by_class = name == "paper"
    for subject in ("ant", "bee", "cow", "dog", "elk", "fox", "gnu", "hen"):
        folder = tmp_path / "images" / subject
        folder.mkdir(parents=True)
        for index in range(6):
            Image.new("L", (16, 16), 40 * index).save(folder / f"{index}.png")
    changes = {
        "teacher.pretrained": str(tiny_unet_folder if by_class else tiny_text_folder),
        "teacher.dtype": "fp32",
        "data.root": str(tmp_path / "images"),
        "data.image_size": 8 if by_class else 16,
        "data.channels": 1,
        "data.held_out": 0.0,
        "evaluation": {"samples": 8, "batch_size": 8, "teacher_steps": [1]},
    }
    for budget in ("train", "method_args.adm"):
        changes |= {f"{budget}.steps": 1, f"{budget}.batch_size": 4, f"{budget}.precision": "fp32"}
        changes |= {f"{budget}.num_workers": 0}
    values = override(read_yaml(config_folder("msd") / f"{name}.yaml"), changes)
    if by_class:
        values["method_args"]["gradient_checkpointing"] = False
    run.train(METHOD, config_of(METHOD, values), tmp_path / "run", quiet=True, cpu=True)
    bundle = tmp_path / "run" / "student"
    assert sorted(path.name for path in bundle.glob("student_*")) == [f"student_{k}" for k in range(4)]
