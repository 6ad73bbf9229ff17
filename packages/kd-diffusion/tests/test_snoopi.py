"""SNOOPI's training: drawn guidance scales, the clamped term with CLIP, negative prompts in the student and teacher.

The equation of NASA and its processor are tested in test_nasa.py.
"""

import json

import pytest
import torch

from kd_diffusion import negation, runs
from kd_diffusion.engine.denoiser import guide
from kd_diffusion.engine.score import noise_weight
from kd_diffusion.integrations.nasa import NasaAttnProcessor, nasa
from kd_diffusion.integrations.pipelines import open_pipeline
from kd_diffusion.methods import snoopi, swiftbrush
from kd_diffusion.methods.snoopi import METHOD, NegativesConfig, clamped_loss, negative_prompts
from kdcore.config import parse
from kdcore.errors import InputError
from kdcore.method import config_folder, load_config
from kdcore.run import train

LORA = {"rank": 2, "alpha": 4, "targets": ["to_q", "to_v"]}
TERMS = {"terms": ["bold", "tilted left", "three"], "count": 20}


def run_config(folder, method=METHOD, **overrides):
    values = {
        "method": method.key,
        "teacher": {"pretrained": str(folder)},
        "data": {"name": "digits", "image_size": 16},
        "method_args": {"lora": LORA},
        "train": {"steps": 2, "batch_size": 4, "optimizer": {"name": "adamw", "lr": 1e-4}, "clip": 1.0},
        "evaluation": {"samples": 8, "batch_size": 8, "teacher_steps": [1]},
    }
    for name, value in overrides.items():
        values[name] = {**values[name], **value} if isinstance(values.get(name), dict) else value
    return parse(method.config, values)


def distiller_of(folder, module=snoopi, *, spread=True, seed=0, **args):
    """A float64 distiller whose adapters do something when `spread`."""
    config = run_config(folder, module.METHOD, method_args=args)
    opened = open_pipeline(folder)
    opened.network.double()
    networks = runs.adapter_networks(config, opened, {}, None)
    networks.generator.double()
    networks.fake.double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in networks.fake.named_parameters():
            if "lora_A" in name or (spread and "lora_B" in name):
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return module.build(config, networks)


def prompts(distiller, count=2):
    words = ["a bold seven", "a thin three, tilted left", "an upright one"]
    return distiller.conditioner.tokens([words[i % 3] for i in range(count)])


def pair(count=2):
    generator = torch.Generator().manual_seed(3)
    x, e = (torch.randn(count, 4, 8, 8, dtype=torch.float64, generator=generator) for _ in range(2))
    return x, x + e, torch.tensor([300, 700])[:count]


# ---------------------------------------------------------------- PG-SB


def test_one_fixed_scale_is_swiftbrush_bit_for_bit(tiny_text_folder):
    drawn = distiller_of(tiny_text_folder, guidance_low=4.5, guidance_high=4.5)
    fixed = distiller_of(tiny_text_folder, swiftbrush, guidance_scale=4.5)
    for step in range(3):
        grads = []
        for distiller in (drawn, fixed):
            distiller.zero_grad()
            distiller.progress.step = step
            for player in ("generator", "fake"):
                distiller.loss(prompts(distiller), player).total().backward()
            grads.append([p.grad for p in (*distiller.student.parameters(), *distiller.fake.parameters())])
        assert any(grad is not None and bool(grad.any()) for grad in grads[0])
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_mean_gradient_is_that_of_the_mean_scale(tiny_text_folder):
    distiller = distiller_of(tiny_text_folder, random="none")
    x, x_t, t = pair()
    condition = distiller.condition(prompts(distiller))

    def direction(kappa):
        distiller.args.guidance_scale = kappa
        return distiller.direction(x, x_t, t, condition)

    scales = torch.linspace(0.5, 4.0, 8).tolist()
    mean = torch.stack([direction(kappa) for kappa in scales]).mean(0)
    torch.testing.assert_close(mean, direction(2.25), rtol=1e-8, atol=1e-10)
    assert not torch.allclose(direction(0.5), direction(4.0), rtol=1e-2)


@pytest.mark.parametrize("per_sample", [False, True])
def test_teacher_and_fake_get_the_same_scale(tiny_text_folder, per_sample):
    distiller = distiller_of(tiny_text_folder, spread=False, per_sample=per_sample)
    x, x_t, t = pair()
    condition = distiller.condition(prompts(distiller))
    for step in range(5):
        distiller.progress.step = step
        assert not bool(distiller.direction(x, x_t, t, condition).any())
    apart = distiller_of(tiny_text_folder, spread=False, random="teacher")
    assert bool(apart.direction(x, x_t, t, condition).any())


def test_scales_are_drawn_uniformly_and_for_the_iteration(tiny_text_folder):
    distiller = distiller_of(tiny_text_folder)
    drawn = []
    for step in range(400):
        distiller.progress.step = step
        real, fake = distiller.guidance(4)
        assert isinstance(real, float)
        assert real == fake
        drawn.append(real)
    assert 0.5 <= min(drawn) < 0.6
    assert 3.9 < max(drawn) <= 4.0
    assert abs(sum(drawn) / 400 - 2.25) < 4 * 3.5 / (12 * 400) ** 0.5


def test_a_scale_per_sample(tiny_text_folder):
    real, fake = distiller_of(tiny_text_folder, per_sample=True).guidance(6)
    assert torch.equal(real, fake)
    assert len(real.unique()) == 6


@pytest.mark.parametrize(("random", "fixed"), [("teacher", 1), ("fake", 0)])
def test_the_other_side_keeps_its_scale(tiny_text_folder, random, fixed):
    distiller = distiller_of(tiny_text_folder, random=random, guidance_scale=4.5)
    scales = distiller.guidance(2)
    assert scales[fixed] == 4.5
    assert 0.5 <= scales[1 - fixed] <= 4.0


# ---------------------------------------------------------------- CLIP


def test_hand_values_of_the_clamped_term():
    cosine = torch.tensor([0.30, 0.40], dtype=torch.float64, requires_grad=True)
    per_sample = [clamped_loss(cosine[i : i + 1], 0.37) for i in range(2)]
    assert float(per_sample[0].detach()) == pytest.approx(0.07, rel=1e-12)
    assert float(per_sample[1].detach()) == 0
    clamped_loss(cosine, 0.37).backward()
    assert cosine.grad.tolist() == [-0.5, 0.0]


@pytest.fixture(scope="module")
def tiny_clip_folder(tmp_path_factory):
    """A CLIP model with random weights whose tokenizer reads letters."""
    import string

    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip")
    letters = [letter + end for letter in string.ascii_lowercase + ",." for end in ("", "</w>")]
    vocabulary = {token: i for i, token in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = CLIPConfig(
        text_config={**sizes, **ends, "vocab_size": len(tokenizer), "max_position_embeddings": 16},
        vision_config={**sizes, "image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    return folder


def test_clip_pulls_the_student(tiny_text_folder, tiny_clip_folder):
    clip = {"pretrained": str(tiny_clip_folder), "tau": 1.0}
    distiller = distiller_of(tiny_text_folder, clip=clip)
    batch = prompts(distiller, 3)
    assert distiller.prompts(batch)[0].replace(" ", "") == "aboldseven"
    terms = distiller.loss(batch, "generator")
    weight, term = terms["clip"]
    assert weight == 0.1
    assert 0 < float(term.detach()) <= 2
    term.backward()
    assert any(bool(p.grad.any()) for p in distiller.student.parameters() if p.grad is not None)
    assert all(p.grad is None for p in distiller.clip.parameters())
    assert not any(name.startswith("clip.") for name in distiller.checkpoint_state())


def test_clip_that_is_not_there(tiny_text_folder, tmp_path):
    with pytest.raises(InputError, match=r"method_args\.clip\.pretrained"):
        distiller_of(tiny_text_folder, clip={"pretrained": str(tmp_path / "none")})


# ---------------------------------------------------------------- NASA in training


def test_negative_prompts_are_made_of_the_terms():
    config = NegativesConfig(terms=["a", "b", "c"], most=2, count=300)
    found = negative_prompts(config, 0)
    assert len(found) == 300
    assert found == negative_prompts(config, 0)
    assert set(found) == {"a", "b", "c", "a, b", "b, a", "a, c", "c, a", "b, c", "c, b"}


def test_student_runs_with_the_negative_and_a_drawn_alpha(tiny_text_folder):
    with_nasa = distiller_of(tiny_text_folder, negatives=TERMS)
    without = distiller_of(tiny_text_folder)
    silent = distiller_of(tiny_text_folder, negatives={**TERMS, "alpha_high": 0.0})
    batch = prompts(without)
    drawn = with_nasa.sample(batch, "generator", grad=True)
    plain = without.sample(batch, "generator", grad=False)
    assert torch.equal(silent.sample(batch, "generator", grad=False).x, plain.x)
    assert not torch.allclose(drawn.x, plain.x, atol=1e-3)
    draw = with_nasa.draws.at("negative generator", 0)
    draw.integers(0, TERMS["count"] - 1, 2)
    alpha = draw.one_uniform()
    without.draws = type(without.draws)(0)
    with nasa(without.student, with_nasa._negative["prompt_embeds"], alpha):
        again = without.sample(batch, "generator", grad=False)
    assert torch.equal(drawn.x, again.x)


def test_nothing_of_nasa_stays_in_the_student(tiny_text_folder):
    distiller = distiller_of(tiny_text_folder, negatives=TERMS)
    keys = list(distiller.student.state_dict())
    distiller.loss(prompts(distiller), "generator").total().backward()
    assert not any(isinstance(p, NasaAttnProcessor) for p in distiller.student.attn_processors.values())
    assert list(distiller.student.state_dict()) == keys


@pytest.mark.parametrize("in_fake", [False, True])
def test_the_teacher_is_guided_away_from_the_negative(tiny_text_folder, in_fake):
    distiller = distiller_of(
        tiny_text_folder, negatives={**TERMS, "in_fake": in_fake}, random="none", guidance_scale=3.0
    )
    batch = prompts(distiller)
    condition = distiller.sample(batch, "generator", grad=False).condition
    x, x_t, t = pair()
    negative, null = distiller._negative, distiller.conditioner.null(2, "cpu")
    real, fake = distiller.real_score, distiller.fake
    with torch.no_grad():
        mu_real = guide(real(x_t, t, negative), real(x_t, t, condition), 3.0)
        mu_fake = guide(fake(x_t, t, negative if in_fake else null), fake(x_t, t, condition), 3.0)
    expected = noise_weight(distiller.process, t, x) * (mu_fake - mu_real)
    torch.testing.assert_close(distiller.direction(x, x_t, t, condition), expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"guidance_low": 5.0}, "guidance_low = 5.0 must not be above guidance_high"),
        ({"random": "all"}, r"method_args\.random"),
        ({"negatives": {"terms": []}}, r"method_args\.negatives\.terms"),
        ({"negatives": {"terms": ["a"], "alpha_low": 2.0}}, "alpha_low = 2.0 must not be above"),
        ({"fake": "noise", "gan": {}}, "a gan without an optimizer of its own"),
        ({"clip": {"tau": 2.0}}, r"method_args\.clip\.tau"),
    ],
)
def test_bad_arguments(tiny_text_folder, args, message):
    with pytest.raises(InputError, match=message):
        run_config(tiny_text_folder, method_args=args)


def test_negatives_need_text(tiny_unet_folder):
    with pytest.raises(InputError, match=r"method_args\.negatives: the teacher is not conditioned on text"):
        distiller_of(tiny_unet_folder, fake="copy", negatives=TERMS)


# ---------------------------------------------------------------- what negative prompts remove


def test_questions_name_what_they_ask_away():
    digits, weights = negation.digit_question(60), negation.weight_question(60)
    assert digits.negatives[3] == "a three"
    assert not any("three" in prompt for prompt in digits.prompts)
    assert len(set(digits.prompts)) > 3
    assert weights.prompts[7] == "a seven"
    assert (weights.negatives[7], weights.negatives[17]) == ("a thin digit", "a bold digit")
    assert weights.weight[:20].tolist() == [0] * 10 + [2] * 10


def test_ways_to_take_a_negative(tiny_text_folder):
    """Guiding the samples of one step is a blend of two images; at alpha = 0 every way is the plain student."""
    own = open_pipeline(tiny_text_folder)
    question = negation.weight_question(4)
    swapped = negation.Question(question.negatives, question.prompts, question.digit)

    def latents(sampler, asked=question):
        found = []
        negation.generate(own, asked, lambda *a: found.append(sampler(*a)) or found[-1], seed=0, batch_size=4)
        return found[0]

    plain, other = latents(negation.plain(own, 1)), latents(negation.plain(own, 1), swapped)
    blend = other + 1.5 * (plain - other)
    torch.testing.assert_close(latents(negation.by_guidance(own, 1, 0.5)), blend, rtol=1e-4, atol=1e-4)
    for way in (negation.by_nasa, negation.by_guidance, negation.by_embedding):
        torch.testing.assert_close(latents(way(own, 1, 0.0)), plain, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(latents(way(own, 1, 0.5)), plain, atol=1e-2)
    steps = latents(negation.by_teacher(own, 2, 1.0))
    assert steps.shape == plain.shape


# ---------------------------------------------------------------- training


@pytest.mark.slow
def test_trains_to_a_stock_pipeline(tiny_text_folder, tiny_clip_folder, tmp_path):
    from diffusers import DiffusionPipeline

    args = {
        "lora": LORA,
        "clip": {"pretrained": str(tiny_clip_folder)},
        "negatives": TERMS,
        "negation": {"alphas": [0.5], "samples": 20, "teacher_steps": 2},
    }
    config = run_config(tiny_text_folder, method_args=args)
    metrics = train(METHOD, config, tmp_path / "run", quiet=True, cpu=True)
    for name in ("none/digit_rate", "none/accuracy", "nasa_0.5/weight_rate", "guidance_0.5/confidence"):
        assert 0 <= metrics[f"negation/{name}"] <= 1
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "run" / "student")
    images = pipe("a bold seven", num_inference_steps=1, guidance_scale=1.0, output_type="np").images
    assert images.shape == (1, 16, 16, 1)


def test_configs_are_valid():
    for name in ("small", "paper", "paper-sd15", "paper-pixart"):
        assert (config_folder("snoopi") / f"{name}.yaml").is_file()
        method, config = load_config(f"snoopi/{name}")
        assert method.key == "snoopi"
        assert config.method_args.guidance_low == 0.5


def small_enough(tmp_path, teacher, clip):
    lines = tmp_path / "prompts.txt"
    lines.write_text("\n".join(f"a photo number {i}" for i in range(80)))
    return [
        f"teacher.pretrained={teacher}",
        f"data.root={lines}",
        f"method_args.clip.pretrained={clip}",
        "train.steps=1",
        "train.batch_size=2",
        "train.precision=fp32",
        "train.num_workers=0",
        "evaluation.samples=2",
        "evaluation.teacher_steps=[1]",
    ]


@pytest.mark.parametrize("name", ["paper", "paper-sd15"])
def test_paper_configs_build_on_another_teacher(tiny_text_folder, tiny_clip_folder, tmp_path, name):
    method, config = load_config(f"snoopi/{name}", small_enough(tmp_path, tiny_text_folder, tiny_clip_folder))
    train(method, config, tmp_path / "run", quiet=True, cpu=True)
    assert (tmp_path / "run" / "student" / "model_index.json").is_file()


@pytest.fixture(scope="module")
def tiny_pixart_folder(tmp_path_factory):
    """PixArtAlphaPipeline with random weights."""
    import string

    from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    pieces = ["<pad>", "</s>", "<unk>", "\u2581", *string.ascii_lowercase]
    tokenizer = T5Tokenizer(vocab=[(piece, 0.0) for piece in pieces], extra_ids=0)
    text = T5Config(vocab_size=len(tokenizer), d_model=12, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    torch.manual_seed(0)
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        norm_num_groups=4,
        cross_attention_dim=16,
        caption_channels=12,
        sample_size=8,
        patch_size=2,
    )
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape))
    vae = AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
        mid_block_add_attention=False,
    )
    pipe = PixArtAlphaPipeline(tokenizer, T5EncoderModel(text), vae, transformer, DPMSolverMultistepScheduler())
    folder = tmp_path_factory.mktemp("pixart")
    pipe.save_pretrained(folder)
    return folder


def test_pixart_config_builds_on_another_teacher(tiny_pixart_folder, tiny_clip_folder, tmp_path):
    from diffusers import PixArtAlphaPipeline

    overrides = small_enough(tmp_path, tiny_pixart_folder, tiny_clip_folder)
    method, config = load_config("snoopi/paper-pixart", overrides)
    assert config.method_args.negatives.in_student
    train(method, config, tmp_path / "run", quiet=True, cpu=True)
    pipe = PixArtAlphaPipeline.from_pretrained(tmp_path / "run" / "student")
    images = pipe(
        "a fox",
        num_inference_steps=1,
        guidance_scale=1.0,
        output_type="np",
        use_resolution_binning=False,
        clean_caption=False,
    ).images
    assert images.shape == (1, 16, 16, 3)
