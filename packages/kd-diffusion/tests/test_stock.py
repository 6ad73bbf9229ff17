"""Students of every method, and their LoRA files, in a process that has diffusers and not this package."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kd_diffusion import runs, testing
from kd_diffusion.engine.denoiser import Denoiser
from kd_diffusion.engine.rollout import rollout
from kd_diffusion.integrations.pipelines import open_pipeline
from kd_diffusion.methods import disback, phased_dmd
from kdcore.config import parse

LORA = {"rank": 2, "alpha": 6, "targets": ["to_q", "to_v"]}
TEXT = {  # key -> arguments of the method, adapters of the student
    "dmd2": ({"gan": None, "guidance_scale": 1.75}, LORA),
    "swiftbrush": ({"lora": LORA}, None),
    "sid": ({"steps": 1}, None),
    "f_distill": ({}, None),
    "snoopi": ({"lora": LORA, "negatives": {"terms": ["bold"], "count": 2}}, LORA),
    "disback": ({"host": "swiftbrush", "host_args": {"lora": LORA}}, None),
}
PROMPT, VIDEO = "a bold seven", {"height": 16, "width": 16, "num_frames": 5, "max_sequence_length": 512}
SCRIPT = textwrap.dedent(
    """
    import json, sys
    from pathlib import Path
    sys.modules.update(kd_diffusion=None, kdcore=None)   # importing either raises
    from diffusers import DiffusionPipeline
    from safetensors.torch import load_file, save_file

    asked, found = json.loads(Path(sys.argv[1]).read_text()), {}
    z = load_file(sys.argv[2])

    def sampled(pipe, name, given):
        pipe.set_progress_bar_config(disable=True)
        output = pipe(**given, latents=z[name].clone(), guidance_scale=1.0, output_type="latent")
        return (output.frames if hasattr(output, "frames") else output.images).contiguous()

    for name, (folder, teacher, given, slots) in asked.items():
        pipe = DiffusionPipeline.from_pretrained(folder, use_safetensors=True)
        found[name] = sampled(pipe, name, given)
        if slots is None:
            continue
        base = DiffusionPipeline.from_pretrained(teacher, use_safetensors=True)
        base.register_modules(scheduler=pipe.scheduler)
        if pipe.config.get("boundary_ratio") is not None:
            base.register_to_config(boundary_ratio=pipe.config.boundary_ratio)
        plain = sampled(base, name, given)
        for lora, options in slots.items():
            base.load_lora_weights(Path(folder) / lora, **options)
        found[name + " by LoRA"], found[name + " teacher"] = sampled(base, name, given), plain
    save_file(found, sys.argv[3])
    """
)


def moved(network: torch.nn.Module) -> None:
    """What training does to a student's weights."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def text_student(key: str, teacher, folder) -> tuple[Tensor, Tensor]:
    """Saves a student of one step as its stage does; (its noise, its sample)."""
    arguments, lora = TEXT[key]
    values = {
        "method": key,
        "teacher": {"pretrained": str(teacher)},
        "student": {"lora": lora},
        "method_args": arguments,
        "train": {"steps": 1, "batch_size": 16},
    }
    if key == "disback":
        recipe, config = disback.host_of(parse(disback.METHOD.config, values))
    else:
        recipe, method = runs.recipe(key)
        config = parse(method.config, values)
    opened = open_pipeline(teacher)
    distiller = recipe.build(config, recipe.networks(config, opened, {}, None))
    moved(distiller.student)
    runs.save_pipeline(config, opened, distiller.deployed().eval(), folder, distiller.indices, recipe.sampling)
    return sampled(opened, distiller, recipe.sampling)


def video_student(teacher, folder) -> tuple[Tensor, Tensor]:
    """The same of phased DMD's two experts on Wan; adapters on the second."""
    values = {
        "method": "phased_dmd",
        "teacher": {"pretrained": str(teacher), "size": [5, 16, 16]},
        "student": {"lora": LORA},
        "train": {"steps": 1, "batch_size": 2},
    }
    config = parse(phased_dmd.METHOD.config, values)
    opened = open_pipeline(teacher, size=(5, 16, 16))
    networks = phased_dmd.phase_networks(config, opened, None, 2)
    before = Denoiser(opened.pipe.transformer, opened.process, opened.denoiser.prediction_type)
    distiller = phased_dmd.PhasedDMD(networks, config.method_args, 2, before)
    moved(distiller.student)
    runs.save_pipeline(config, opened, distiller.deployed().eval(), folder, distiller.indices, phased_dmd.SAMPLING)
    return sampled(opened, distiller, phased_dmd.SAMPLING)


def sampled(opened, distiller, sampling: runs.Sampling) -> tuple[Tensor, Tensor]:
    prompt = "a seven" if len(opened.space.shape) == 4 else PROMPT
    z = torch.randn(1, *opened.space.shape, generator=torch.Generator().manual_seed(2))
    condition = opened.conditioner.embed(opened.conditioner.tokens([prompt]))
    denoiser = opened.denoiser_for(distiller.deployed().eval())
    options = {"start": sampling.start, "renoise": sampling.renoise}
    return z, rollout(denoiser, opened.process, distiller.indices, condition, lambda: z, **options)


@pytest.mark.slow
def test_students_and_their_adapters_sample_without_this_package(tiny_text_folder, tmp_path):
    testing.wan_pipeline().save_pretrained(tmp_path / "wan")
    asked, noises, expected = {}, {}, {}
    for key, (_, lora) in TEXT.items():
        noises[key], expected[key] = text_student(key, tiny_text_folder, tmp_path / key)
        given = {"prompt": PROMPT, "num_inference_steps": 1}
        asked[key] = [str(tmp_path / key), str(tiny_text_folder), given, {"lora": {}} if lora else None]
    noises["phased_dmd"], expected["phased_dmd"] = video_student(tmp_path / "wan", tmp_path / "phased_dmd")
    second = {"lora/expert_2": {"load_into_transformer_2": True}}
    given = {"prompt": "a seven", "num_inference_steps": 4, **VIDEO}
    asked["phased_dmd"] = [str(tmp_path / "phased_dmd"), str(tmp_path / "wan"), given, second]

    (tmp_path / "asked.json").write_text(json.dumps(asked))
    save_file(noises, tmp_path / "z.safetensors")
    files = [str(tmp_path / name) for name in ("asked.json", "z.safetensors", "found.safetensors")]
    done = subprocess.run([sys.executable, "-c", SCRIPT, *files], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = load_file(files[-1])
    for name, x in expected.items():
        torch.testing.assert_close(found[name], x, rtol=1e-3, atol=1e-3, msg=name)
        if asked[name][-1] is not None:
            torch.testing.assert_close(found[f"{name} by LoRA"], x, rtol=1e-3, atol=1e-3, msg=f"{name} by LoRA")
            assert not torch.allclose(found[f"{name} teacher"], x, atol=0.05), name
