"""The embedded worlds: exact mixtures, tokenizer, denoising training, pipeline folders that stock diffusers opens."""

import copy

import pytest
import torch
from torch import nn
from torch.autograd import grad

from kd_diffusion.data import DataConfig, load_data
from kd_diffusion.engine.denoiser import Denoiser
from kd_diffusion.engine.denoising import DenoisingDistiller
from kd_diffusion.engine.process import EDM, VP, Flow, add_noise, process_of
from kd_diffusion.integrations.points import MixtureNetwork, PointMLP
from kd_diffusion.worlds import WorldConfig, stages, text, vae, world_stages
from kd_diffusion.worlds.digits import build_digits_unet, consistency_pipeline
from kd_diffusion.worlds.mixture import GaussianMixture, MixtureConfig, flat, spatial
from kdcore.config import RunConfig, TrainConfig, parse
from kdcore.errors import InputError
from kdcore.stages import RunContext, run_stages
from kdcore.training import make_accelerator

UNEVEN = GaussianMixture.of(MixtureConfig(layout="ring", modes=5, std=0.15, imbalance=4.0))


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.fixture(scope="module")
def digits():
    return load_data(DataConfig(), 0)


@pytest.fixture(scope="module")
def large_digits():
    return load_data(DataConfig(image_size=16), 0)


# ---------------------------------------------------------------- the mixture


@pytest.mark.parametrize("level", [0.0, 0.05, 0.7, 80.0])
def test_the_score_is_the_gradient_of_the_log_density(level):
    points = (normal(64, 2, dtype=torch.float64) * (0.5 + level)).requires_grad_(True)
    (gradient,) = grad(UNEVEN.log_density(points, level).sum(), points)
    assert torch.allclose(UNEVEN.score(points, level), gradient, rtol=1e-9, atol=1e-9)


def test_the_density_integrates_to_one():
    axis = torch.linspace(-6, 6, 601, dtype=torch.float64)
    density = UNEVEN.log_density(torch.cartesian_prod(axis, axis), 0.3).exp()
    assert float(density.sum()) * 0.02**2 == pytest.approx(1, abs=1e-6)


def test_the_denoiser_is_the_posterior_mean_of_samples():
    points, _ = UNEVEN.sample(400_000, torch.Generator().manual_seed(0))
    level, at = 0.5, torch.tensor([[0.3, -0.2]], dtype=torch.float64)
    weight = torch.softmax(-(at - points).square().sum(1) / (2 * level**2), 0)  # self-normalised importance sampling
    assert torch.allclose(UNEVEN.denoise(at, level), weight @ points, atol=5e-3)


def test_modes_have_their_weights():
    points, modes = UNEVEN.sample(50_000, torch.Generator().manual_seed(1))
    assert torch.allclose(torch.bincount(modes) / 50_000, UNEVEN.weights.float(), atol=0.01)
    assert float(UNEVEN.weights.max() / UNEVEN.weights.min()) == pytest.approx(4)
    assert float((UNEVEN.assign(points) == modes).double().mean()) > 0.99
    assert torch.equal(UNEVEN.responsibilities(points[:100]).argmax(1), modes[:100])


def test_a_grid_has_its_modes_in_a_fixed_mixed_order():
    first, second = (GaussianMixture.of(MixtureConfig(side=3)) for _ in range(2))
    assert torch.equal(first.means, second.means)
    assert {tuple(mean) for mean in first.means.tolist()} == {(x, y) for x in (-0.8, 0, 0.8) for y in (-0.8, 0, 0.8)}
    assert torch.allclose(first.weights, torch.full((9,), 1 / 9, dtype=torch.float64))


def test_mixtures_refuse_what_does_not_fit():
    with pytest.raises(InputError, match=r"points: shape \(4, 3\)"):
        UNEVEN.score(torch.zeros(4, 3), 1.0)
    with pytest.raises(InputError, match="must be positive"):
        GaussianMixture(torch.zeros(2, 2), torch.tensor([1.0, 0.0]), 0.1)
    with pytest.raises(InputError, match="allowed: "):
        GaussianMixture(torch.zeros(2, 2), torch.ones(3), 0.1)


# ---------------------------------------------------------------- networks in EDM's form


def exact_denoiser():
    network = MixtureNetwork(**UNEVEN.config_arguments())
    return Denoiser(network, *process_of(consistency_pipeline(network).scheduler))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_exact_network_denoises_at_every_level(dtype):
    denoiser = exact_denoiser().to(dtype)
    t = torch.logspace(-3, 1.9, 40, dtype=torch.float64)
    x_t = UNEVEN.sample(40, torch.Generator().manual_seed(2))[0] + t[:, None] * normal(40, 2, dtype=torch.float64)
    found = flat(denoiser(x_t.to(dtype)[:, :, None, None], t, {})).double()
    tolerance = 1e-4 if dtype == torch.float32 else 1e-10
    assert torch.allclose(found, UNEVEN.denoise(x_t, t), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("network", ["mixture", "mlp", "unet"])
def test_one_step_of_the_stock_pipeline_is_the_denoiser_at_the_highest_level(network, digits, tmp_path):
    from diffusers import DiffusionPipeline

    torch.manual_seed(0)
    if network == "unet":
        pipe = build_digits_unet(digits, {"block_out_channels": [8, 16]})
        labels = torch.arange(6)
    else:
        model = MixtureNetwork(**UNEVEN.config_arguments()) if network == "mixture" else PointMLP(width=16)
        pipe, labels = consistency_pipeline(model), None
    pipe.save_pretrained(tmp_path)
    pipe = DiffusionPipeline.from_pretrained(tmp_path, use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    denoiser = Denoiser(pipe.unet, *process_of(pipe.scheduler))
    kept = {}
    arguments = {"batch_size": 6, "class_labels": labels, "num_inference_steps": 1, "output_type": "pt"}
    images = pipe(
        **arguments,
        generator=torch.Generator().manual_seed(3),
        callback=lambda i, t, sample: kept.update(sample=sample),
    ).images
    size = pipe.unet.config.sample_size
    z = normal(6, pipe.unet.config.in_channels, size, size, seed=3)
    with torch.no_grad():
        x = denoiser(80.0 * z, torch.full((6,), 80.0), {} if labels is None else {"class_labels": labels})
    assert torch.allclose(kept["sample"], x, atol=1e-5, rtol=1e-5)
    assert torch.allclose(images, (x / 2 + 0.5).clamp(0, 1), atol=1e-5)


def test_networks_of_the_plane_read_one_time_or_one_for_each_sample():
    for network in (MixtureNetwork(**UNEVEN.config_arguments()), PointMLP(width=16)):
        x = normal(4, 2, 1, 1)
        whole = network(x, torch.tensor(-100.0)).sample
        assert whole.shape == x.shape
        assert torch.equal(whole, network(x, torch.full((4,), -100.0), return_dict=False)[0])
        assert not torch.allclose(whole, network(x, torch.tensor(300.0)).sample)


def test_the_mlp_is_conditional_when_it_is_asked_to_be():
    network = PointMLP(width=16, num_class_embeds=3)
    x = normal(3, 2, 1, 1)
    found = network(x.expand(3, -1, -1, -1), torch.zeros(3), class_labels=torch.tensor([0, 1, 1])).sample
    assert found.shape == x.shape
    with pytest.raises(InputError, match="class_labels: required"):
        network(x, torch.zeros(3))


# ---------------------------------------------------------------- denoising training


class Linear(nn.Module):
    """A network that can be called like a U-Net: F = w x, for losses that are computed by hand."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        return (self.weight * sample,)


def seen_draws(distiller, count, shape):
    """The times and the noise that the first loss of a distiller takes."""
    from kd_diffusion.engine.timesteps import sample_times

    draw = distiller.draws.at("denoising", 0)
    t = sample_times(distiller.times, distiller.denoiser.process, draw, count)
    return t, draw.normal(shape).double()


def test_the_loss_of_edm_is_its_weighted_loss_on_x():
    process = EDM(sigma_data=0.5)
    distiller = DenoisingDistiller(Denoiser(Linear(), process, "edm"), seed=4)
    x = normal(7, 1, 2, 2, seed=5, dtype=torch.float64)
    t, e = seen_draws(distiller, 7, x.shape)
    x_t = x + t.view(-1, 1, 1, 1) * e
    weight = (t**-2 + 0.5**-2).view(-1, 1, 1, 1)
    expected = (weight * (distiller.denoiser(x_t, t, {}) - x) ** 2).mean()
    assert distiller.loss({"x": x}).total().item() == pytest.approx(expected.item(), rel=1e-9)


@pytest.mark.parametrize(
    ("process", "kind"), [(Flow(), "flow_prediction"), (VP(torch.linspace(0.999, 0.01, 50)), "epsilon")]
)
def test_the_loss_is_on_the_prediction_itself(process, kind):
    distiller = DenoisingDistiller(Denoiser(Linear(), process, kind), seed=1)
    x = normal(6, 1, 2, 2, seed=6, dtype=torch.float64)
    t, e = seen_draws(distiller, 6, x.shape)
    aim = e if kind == "epsilon" else e - x
    expected = (0.3 * add_noise(process, x, e, t) - aim).square().mean()
    assert distiller.loss({"x": x}).total().item() == pytest.approx(expected.item(), rel=1e-9)


def test_a_network_that_is_its_own_teacher_has_nothing_to_learn():
    denoiser = exact_denoiser()
    batch = {"x": spatial(UNEVEN.sample(64, torch.Generator().manual_seed(0))[0])}
    exact = DenoisingDistiller(copy.deepcopy(denoiser), teacher=denoiser, condition=lambda batch: {})
    from_data = DenoisingDistiller(denoiser, condition=lambda batch: {})
    assert float(exact.loss(batch).total()) < 1e-5
    assert float(from_data.loss(batch).total()) > 0.1  # the data is not determined by x_t


def test_a_teacher_gets_no_gradient_and_gives_the_target():
    student, teacher = (Denoiser(PointMLP(width=16), EDM(), "edm") for _ in range(2))
    distiller = DenoisingDistiller(student, teacher=teacher, condition=lambda batch: {})
    distiller.loss({"x": normal(8, 2, 1, 1)}).total().backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert any(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in student.parameters())
    assert {id(p) for p in distiller.deployed().parameters()} == {id(p) for p in student.network.parameters()}


def test_conditions_are_dropped_at_the_rate_that_is_asked_for():
    seen = []
    distiller = DenoisingDistiller(
        Denoiser(Linear(), EDM(), "edm"),
        condition=lambda batch: seen.append(batch["class_labels"]) or {},
        null={"class_labels": torch.tensor(10)},
        drop=0.25,
    )
    labels = torch.arange(4000) % 10
    distiller.loss({"x": torch.zeros(4000, 1, 1, 1, dtype=torch.float64), "class_labels": labels})
    dropped = seen[0] == 10
    assert float(dropped.double().mean()) == pytest.approx(0.25, abs=0.03)
    assert torch.equal(seen[0][~dropped], labels[~dropped])


def test_denoising_takes_x_from_pixels_or_a_generator():
    pixels = normal(4, 1, 2, 2, dtype=torch.float64)
    denoiser = Denoiser(Linear(), EDM(), "edm")
    given = DenoisingDistiller(denoiser).loss({"x": 2 * pixels}).total()
    encoded = DenoisingDistiller(denoiser, encode=lambda p: 2 * p).loss({"pixels": pixels}).total()
    made = DenoisingDistiller(denoiser, data=lambda batch, draw: 2 * pixels).loss({}).total()
    assert given.item() == encoded.item() == made.item()
    with pytest.raises(InputError, match="denoising needs images"):
        DenoisingDistiller(denoiser).loss({"input_ids": pixels})


# ---------------------------------------------------------------- text


def test_every_word_of_the_prompts_is_one_token(large_digits):
    prompts = large_digits.train.prompts
    tokenizer = text.build_tokenizer(prompts, 16)
    ids = text.tokens(tokenizer, prompts)
    assert ids.shape == (len(prompts), 16)
    words = [prompt.replace(",", " ,").split() for prompt in prompts]
    assert [int((row != tokenizer.pad_token_id).sum()) for row in ids] == [len(w) + 1 for w in words]  # end is padding
    back = tokenizer.batch_decode(ids, skip_special_tokens=True)
    assert [line.split() for line in back] == words


def test_unknown_words_become_pieces_and_long_prompts_are_cut():
    tokenizer = text.build_tokenizer(["a bold seven, tilted right", "a seventh"], 8)
    assert tokenizer.tokenize("Bold, zé") == ["bold</w>", ",</w>", "z", *tokenizer.tokenize("é")]
    assert tokenizer.unk_token_id not in text.tokens(tokenizer, ["xyz"])[0, 1:4]
    ids = text.tokens(tokenizer, ["a bold seven " * 9, ""])
    assert ids.shape == (2, 8)
    assert ids[0, -1] == tokenizer.eos_token_id
    assert ids[1, 0] == tokenizer.bos_token_id
    assert bool((ids[1, 1:] == tokenizer.eos_token_id).all())


def test_a_tokenizer_needs_words():
    with pytest.raises(InputError, match="no word in them"):
        text.build_tokenizer(["", "  "], 8)


# ---------------------------------------------------------------- whole worlds, a few steps each

SHORT = {"steps": 3, "batch_size": 8}
SMALL = {
    "digits_unet": {"network": {"block_out_channels": [8, 16]}},
    "digits_dit": {"network": {"num_layers": 1}, "vae_train": SHORT},
    "digits_text": {"network": {"block_out_channels": [8, 16]}, "vae_train": SHORT},
    "mixture": {"network": {"width": 16}},
}


def context_in(folder, seed=0):
    config = RunConfig(method="world", seed=seed)
    return RunContext(config, folder, make_accelerator(TrainConfig(steps=1), cpu=True), quiet=True)


def world_data(name):
    if name == "mixture":
        return load_data(DataConfig(name="mixture", size=200), 0)
    return load_data(DataConfig(image_size=8 if name == "digits_unet" else 16), 0)


@pytest.fixture(scope="module", params=list(SMALL))
def world(request, tmp_path_factory):
    name = request.param
    data = world_data(name)
    config = parse(WorldConfig, {"name": name, "train": SHORT, **SMALL[name]})
    artefacts = run_stages(world_stages(config, data, 0), context_in(tmp_path_factory.mktemp(name)))
    return name, data, artefacts


def test_a_world_is_a_folder_that_stock_diffusers_opens_and_samples_from(world):
    from diffusers import DiffusionPipeline

    name, data, artefacts = world
    pipe = DiffusionPipeline.from_pretrained(artefacts["teacher"], use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    arguments = {
        "digits_unet": {"batch_size": 2, "class_labels": [3, 10], "num_inference_steps": 2},
        "digits_dit": {"class_labels": [3, 9], "guidance_scale": 1.0, "num_inference_steps": 2},
        "digits_text": {"prompt": ["a bold seven", "a digit"], "guidance_scale": 3.0, "num_inference_steps": 2},
        "mixture": {"batch_size": 2, "num_inference_steps": 2},
    }[name]
    images = pipe(**arguments, output_type="np").images
    assert images.shape == (2, data.image_size, data.image_size, data.channels)
    assert type(pipe).__name__ == {
        "digits_dit": "DiTPipeline",
        "digits_text": "StableDiffusionPipeline",
    }.get(name, "ConsistencyModelPipeline")


def test_a_world_is_taken_from_the_cache_the_second_time(world, tmp_path, monkeypatch):
    name, data, artefacts = world
    config = parse(WorldConfig, {"name": name, "train": SHORT, **SMALL[name]})
    monkeypatch.setattr(stages.TrainStage, "run", lambda self, context: pytest.fail("trained again"))
    again = run_stages(world_stages(config, data, 0), context_in(tmp_path))
    assert set(again) == set(artefacts)
    for file in artefacts["teacher"].rglob("*.safetensors"):
        assert file.read_bytes() == (again["teacher"] / file.relative_to(artefacts["teacher"])).read_bytes()


def test_training_moves_the_network_and_the_text_encoder(large_digits, tmp_path):
    from diffusers import AutoencoderKL, DiffusionPipeline

    autoencoder = vae.build_vae(large_digits)
    autoencoder.save_pretrained(tmp_path / "vae")
    context = context_in(tmp_path)
    context.artefacts["vae"] = tmp_path / "vae"
    folders = []
    for steps in (1, 4):
        config = parse(WorldConfig, {"name": "digits_text", "train": {**SHORT, "steps": steps, "ema": None}})
        stage = stages._text_stages(config, large_digits, 0)[1]
        context.folder = tmp_path / str(steps)
        context.folder.mkdir()
        folders.append(stage.run(context)["teacher"])
    first, second = (DiffusionPipeline.from_pretrained(folder, use_safetensors=True) for folder in folders)
    for part in ("unet", "text_encoder"):
        moved = [
            not torch.equal(a, b)
            for a, b in zip(getattr(first, part).parameters(), getattr(second, part).parameters(), strict=True)
        ]
        assert sum(moved) > 0.5 * len(moved)
    kept = AutoencoderKL.from_pretrained(tmp_path / "vae")
    assert all(torch.equal(a, b) for a, b in zip(kept.parameters(), second.vae.parameters(), strict=True))


def test_latents_have_unit_deviation(large_digits):
    torch.manual_seed(0)
    autoencoder = vae.build_vae(large_digits)
    pixels = large_digits.train.pixels[:300]
    vae.fit_scale(autoencoder, pixels)
    vae.fit_scale(autoencoder, pixels)  # does not build on the scale that is there
    latents = vae.encode(autoencoder, pixels)
    assert latents.shape == (300, 1, 8, 8)
    assert float(latents.std()) == pytest.approx(1, abs=1e-4)


@pytest.mark.slow
def test_the_autoencoder_keeps_the_attributes_that_prompts_speak_of(large_digits, tmp_path):
    from diffusers import AutoencoderKL

    from kd_diffusion.attributes import attributes

    stage = world_stages(parse(WorldConfig, {"name": "digits_text"}), large_digits, 0)[0]
    autoencoder = AutoencoderKL.from_pretrained(stage.run(context_in(tmp_path))["vae"])
    pixels, labels = large_digits.held_out.pixels, large_digits.held_out.labels
    with torch.no_grad():
        decoded = autoencoder.decode(vae.encode(autoencoder, pixels) / autoencoder.config.scaling_factor).sample
    before, after = (attributes(images, labels, large_digits.rule) for images in (pixels, decoded.clamp(-1, 1)))
    assert float((before.weight == after.weight).double().mean()) > 0.9
    assert float((before.tilt == after.tilt).double().mean()) > 0.9


def test_a_partial_budget_keeps_the_other_defaults():
    config = parse(WorldConfig, {"name": "digits_unet", "train": {"steps": 7, "optimizer": {"lr": 0.1}}})
    assert (config.train.steps, config.train.optimizer.lr) == (7, 0.1)
    assert config.train.optimizer.name == "adam"
    assert config.train.ema.decay == 0.995
    assert parse(WorldConfig, {"name": "digits_unet", "train": {"ema": None}}).train.ema is None
    assert parse(WorldConfig, config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("values", "source", "message"),
    [
        ({"name": "mixture"}, {}, "world.name = 'mixture': cannot be trained on data.name = 'digits'"),
        ({"name": "digits_unet"}, {"name": "mixture", "size": 40}, "cannot be trained on data.name = 'mixture'"),
        ({"name": "digits_unet", "train": {"batch_size": 5000}}, {}, "world.train.batch_size = 5000"),
        ({"name": "digits_unet", "network": {"blocks": 3}}, {}, "world.network: UNet2DModel refuses"),
        ({"name": "digits_unit"}, {}, "allowed: 'digits_unet'"),
        ({"name": "digits_unet", "trian": {}}, {}, "did you mean 'train'"),
    ],
)
def test_bad_worlds_are_refused(values, source, message, tmp_path):
    with pytest.raises(InputError, match=message):
        run_stages(world_stages(parse(WorldConfig, values), load_data(DataConfig(**source))), context_in(tmp_path))


def test_a_world_may_have_data_of_its_own(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a bold seven\n" * 3)
    prompts = load_data(DataConfig(name="prompts", root=str(file)))
    config = {"name": "digits_text"}
    with pytest.raises(InputError, match=r"needs images, data.name = 'prompts'"):
        world_stages(parse(WorldConfig, config), prompts)
    own = parse(WorldConfig, {**config, "data": {"name": "digits", "image_size": 16}})
    assert [stage.name for stage in world_stages(own, prompts)] == ["vae", "teacher"]


@pytest.mark.slow
def test_the_trained_unet_draws_the_digit_that_is_asked_for(digits, tmp_path):
    from kd_diffusion.engine.rollout import rollout
    from kd_diffusion.engine.timesteps import levels
    from kd_diffusion.metrics import train_features

    stages_ = world_stages(parse(WorldConfig, {"name": "digits_unet"}), digits, 0)
    folder = run_stages(stages_, context_in(tmp_path))["teacher"]
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(folder, use_safetensors=True)
    denoiser = Denoiser(pipe.unet, *process_of(pipe.scheduler))
    labels, generator = torch.arange(300) % 10, torch.Generator().manual_seed(0)
    pixels = rollout(
        denoiser,
        denoiser.process,
        levels(denoiser.process, 50),
        {"class_labels": labels},
        lambda: torch.randn(300, 1, 8, 8, generator=generator),
        renoise="euler",
    )
    classifier = train_features(digits.train.pixels, digits.train.labels, 10, 1)
    accuracy = (classifier(pixels).argmax(1) == labels).double().mean()
    assert float(accuracy) > 0.9
