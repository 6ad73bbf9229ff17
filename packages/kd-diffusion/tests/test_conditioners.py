"""What a network is given of a prompt is what its stock pipeline gives it."""

import inspect

import pytest
import torch

from kd_diffusion.engine.conditions import concat
from kd_diffusion.engine.process import Flow
from kd_diffusion.integrations.pipelines import opened, sampler_config
from kd_diffusion.testing import random_weights, tiny_dit, tiny_vae, wan_pipeline
from kd_diffusion.testing_text import PIPELINES, pixart_pipeline, tiny_pixart, word_tokenizer
from kdcore.errors import InputError
from kdcore.method import load_config

PROMPTS = ["bold cat", "thin seven dog three"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return word_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module", params=list(PIPELINES))
def pipe(request, tokenizer):
    pipe = PIPELINES[request.param](tokenizer)
    if request.param == "flux":
        pipe.default_sample_size = 8
    return pipe


def encoded(pipe, prompts):
    """(embeds, pooled or mask or None) of the pipeline's own `encode_prompt`."""
    taken = inspect.signature(pipe.encode_prompt).parameters
    texts = {name: prompts for name in ("prompt", "prompt_2", "prompt_3") if name in taken}
    options = {"do_classifier_free_guidance": False} if "do_classifier_free_guidance" in taken else {}
    if "num_images_per_prompt" in taken:
        options["num_images_per_prompt"] = 1
    found = pipe.encode_prompt(**texts, device="cpu", **options)
    name = type(pipe).__name__
    second = {"StableDiffusionXLPipeline": 2, "StableDiffusion3Pipeline": 2, "FluxPipeline": 1}
    if name in second:
        return found[0], found[second[name]]
    return found[0], found[1] if name.startswith("PixArt") else None


def test_embeddings_are_the_pipelines_own(pipe):
    found = opened(pipe)
    condition = found.conditioner.embed(found.conditioner.tokens(PROMPTS))
    embeds, second = encoded(pipe, PROMPTS)
    torch.testing.assert_close(condition["prompt_embeds"], embeds, rtol=1e-4, atol=1e-4)
    if second is not None:
        name = "prompt_mask" if "prompt_mask" in condition else "pooled_embeds"
        torch.testing.assert_close(condition[name].to(second.dtype), second)


def test_the_network_takes_them(pipe):
    found = opened(pipe)
    condition = found.conditioner.embed(found.conditioner.tokens(PROMPTS))
    channels, height, width = found.space.shape
    x = torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(0))
    t = found.process.at(torch.tensor([300, 700]))
    null = found.conditioner.null(2, "cpu")
    assert null.keys() == condition.keys()
    with torch.no_grad():
        x0 = found.denoiser.guided(x, t, condition, null, 2.0)
    assert x0.shape == x.shape
    assert bool(torch.isfinite(x0).all())


def test_sdxl_is_unconditional_with_zeros(tokenizer):
    found = opened(PIPELINES["sdxl"](tokenizer))
    null = found.conditioner.null(1, "cpu")
    assert not null["prompt_embeds"].any()
    assert not null["pooled_embeds"].any()
    assert null["time_ids"].any()


def test_a_batch_without_prompts_is_refused(pipe):
    with pytest.raises(InputError, match="the data has no prompts"):
        opened(pipe).conditioner.embed({"class_labels": torch.tensor([1])})


# ---------------------------------------------------------------- a step of the stock pipeline


def dit_pipeline(_):
    """With the 1000 classes of ImageNet, as facebook/DiT-XL-2-256 has them; its pipeline guides with class 1000."""
    from diffusers import DDIMScheduler, DiTPipeline

    return DiTPipeline(tiny_dit(num_embeds_ada_norm=1000, out_channels=8), tiny_vae(), DDIMScheduler())


def large_pixart_pipeline(_):
    """With the size and the aspect ratio that PixArt of 1024 pixels is conditioned on."""
    pipe = pixart_pipeline()
    wide = {"num_attention_heads": 3, "cross_attention_dim": 24}
    pipe.register_modules(
        transformer=tiny_pixart(sample_size=128, patch_size=16, use_additional_conditions=True, **wide)
    )
    return pipe


def one_wan_pipeline(_):
    return wan_pipeline(experts=1)


KINDS = {**PIPELINES, "dit": dit_pipeline, "pixart-1024": large_pixart_pipeline, "wan": one_wan_pipeline}
PLAIN = {"use_resolution_binning": False, "clean_caption": False}
SMALL = {"height": 16, "width": 16, "num_frames": 5, "max_sequence_length": 512}
OWN = {
    "pixart": PLAIN,
    "pixart-1024": PLAIN,
    "wan": SMALL,
    "flux": {"height": 8, "width": 8},
    "sd3": {"height": 8, "width": 8},
}


@pytest.mark.parametrize("kind", list(KINDS))
def test_the_first_step_of_the_stock_pipeline_is_ours(kind, tokenizer):
    """What the network is given and answers, conditional and not: prompts, pooled text, sizes, masks, null class."""
    pipe = KINDS[kind](tokenizer)
    pipe.set_progress_bar_config(disable=True)
    if kind == "flux":
        pipe.default_sample_size = 8
    size = (5, 16, 16) if kind == "wan" else None
    found = opened(pipe, size=size)
    random_weights(found.network)
    calls = []
    hook = found.network.register_forward_hook(
        lambda module, args, kwargs, output: calls.append(((args or (kwargs["hidden_states"],))[0], kwargs, output[0])),
        with_kwargs=True,
    )
    asked = [3, 999] if kind == "dit" else ["cat", "bold dog"]
    given = {"guidance_scale": 3.0, "num_inference_steps": 2, **OWN.get(kind, {})}
    pipe(asked, output_type="np" if kind == "dit" else "latent", **given)
    hook.remove()

    (sample, kwargs, output), *others = calls
    count = len(sample) if kind in ("wan", "flux") else len(sample) // 2  # the others ask both at once
    conditional = slice(0, count) if kind in ("wan", "flux", "dit") else slice(count, None)
    if kind == "flux":
        sample, output = (type(pipe)._unpack_latents(x, 8, 8, 1) for x in (sample, output))
    x_t, time = sample[:count], kwargs["timestep"] if "timestep" in kwargs else pipe.scheduler.timesteps[0]
    time = torch.as_tensor(time).reshape(-1)[:1].expand(count)
    if isinstance(found.process, Flow):
        time = time.double() if kind == "flux" else time.double() / 1000
    if kind == "dit":
        batch = {"class_labels": torch.tensor(asked)}
    else:
        batch = found.conditioner.tokens(asked)
    condition, null = found.conditioner.embed(batch), found.conditioner.null(count, "cpu")
    with torch.no_grad():
        both = found.denoiser.output(torch.cat((x_t, x_t)), torch.cat((time, time)), concat(condition, null))
    ours, plain = both.chunk(2)
    assert not torch.allclose(ours, plain, atol=1e-3)
    torch.testing.assert_close(output[conditional][:, : x_t.shape[1]], ours, rtol=1e-4, atol=1e-4)
    if kind == "wan":  # asks one after the other
        output = others[0][2]
    if kind != "flux":  # has no unconditional side
        unconditional = slice(count, None) if kind == "dit" else slice(0, count)
        torch.testing.assert_close(output[unconditional][:, : x_t.shape[1]], plain, rtol=1e-4, atol=1e-4)


def test_a_teacher_whose_scheduler_is_named_after_edm(tokenizer, tmp_path):
    """Its networks take ln(sigma) / 4 as it is; students of one step sample with such a scheduler too."""
    from diffusers import EDMEulerScheduler

    pipe = PIPELINES["sdxl"](tokenizer)
    pipe.register_modules(scheduler=EDMEulerScheduler())
    pipe.set_progress_bar_config(disable=True)
    random_weights(pipe.unet)
    pipe.save_pretrained(tmp_path / "teacher")
    found = opened(pipe)
    z = torch.randn(2, *found.space.shape, generator=torch.Generator().manual_seed(0))
    condition = found.conditioner.embed(found.conditioner.tokens(PROMPTS))
    with torch.no_grad():
        x = found.denoiser(80 * z, torch.full((2,), 80.0), condition)
    scheduler = sampler_config(pipe.scheduler, "edm", found.process, [999])
    for own in (pipe.scheduler, scheduler):  # the teacher's, with the same sigmas, and the student's
        pipe.scheduler = own
        given = {"num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "latent"}
        torch.testing.assert_close(pipe(PROMPTS, latents=z.clone(), **given).images, x, rtol=1e-3, atol=2e-3)
    overrides = [f"teacher.pretrained={tmp_path / 'teacher'}", "data={name: digits}", "train.batch_size=2"]
    method, config = load_config("dmd2/paper-sdxl", [*overrides, "teacher.variant=null", "method_args.gan=null"])
    with pytest.raises(InputError, match=r"method_args\.steps = 4: allowed: 1, EDMEulerScheduler"):
        method.stages(config, None)
