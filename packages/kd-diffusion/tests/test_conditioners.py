"""What a network is given of a prompt is what its stock pipeline gives it."""

import inspect

import pytest
import torch

from kd_diffusion.integrations.pipelines import opened
from kd_diffusion.testing_text import PIPELINES, word_tokenizer
from kdcore.errors import InputError

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
