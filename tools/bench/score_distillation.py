"""Time and peak memory of a DMD2 training cycle: `kd_diffusion` in kdcore's loop, a bare loop, NVlabs/FastGen.

A cycle is one generator step and R fake-score steps, GAN on, for a class-conditional UNet2DModel of diffusers under
EDM's preconditioning: teacher, fake and student are three of it, all in float32. Same data in memory, same batch, same
AdamW, same clipping norm.

    bare           the loop one would write by hand: R iterations, the generator in the first of them, the fake on
                   the same samples (then detached)
    kdcore         kd_diffusion's DMD2 in kdcore.training.Loop: the trainer behind `kd train`
    fastgen        FastGen's DMD2Model, driven as its Trainer.run does, on an adapter around the same network
    trunk-bare, trunk-kdcore       the discriminator's head on the fake's middle block, which it trains: DMD2's own

The first three have the head on the frozen teacher's middle block, the only host FastGen has. FastGen counts
differently: of `student_update_freq` iterations one is the generator's and the others are the fake's, each on fresh
samples. It runs with R + 1, so that a cycle has as many steps of both; it then generates R + 1 batches where the other
loops generate R. Its generator's GAN term reads the features of the teacher's own pass at x_t, where the others noise
x anew, as the paper has it. Its loop clips and repairs only the student's gradients, as its config has it. Its
callbacks that only report (wandb, GPU statistics, profiler) are off; nothing of it is replaced. `calls` in the result
counts the network's forward passes in a cycle, whole ones and those that end at the middle block.

Time: one process, blocks of cycles interleaved over the contenders in a new random order each round; a contender's
ratio is the median over the rounds of its block against the same round's block of its reference. Loading is included.
Peak memory: a subprocess each, the kernel's high-water mark (Linux) over a cycle after a warm-up, weights and optimiser
states not counted; the allocator's maximum on CUDA.

    python tools/bench/score_distillation.py --fastgen FOLDER --output runs/bench/score_distillation.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from measure import MIB, PeakMemory, environment, in_subprocess, interleaved, pick_device, seconds_per_step

FROZEN, TRUNK = ["bare", "kdcore", "fastgen"], ["trunk-bare", "trunk-kdcore"]
CLASSES, SIGMA_DATA, SIGMA_MIN, SIGMA_MAX, RHO, LEVELS = 10, 0.5, 0.002, 80.0, 7.0, 1000
LAMBDA_G, LAMBDA_D, CLIP = 3e-3, 1e-2, 10.0
ADAMW = {"lr": 2e-6, "betas": (0.9, 0.999), "weight_decay": 0.01}


def unet(arguments: argparse.Namespace) -> Any:
    """The network, the same weights every time; its first and last layers are marked for `forward_calls`."""
    import torch
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    channels = tuple(arguments.channels)
    attention = (False,) * (len(channels) - 1) + (True,)
    made = UNet2DModel(
        sample_size=arguments.size,
        block_out_channels=channels,
        layers_per_block=arguments.layers,
        norm_num_groups=16,
        down_block_types=tuple("AttnDownBlock2D" if has else "DownBlock2D" for has in attention),
        up_block_types=tuple("AttnUpBlock2D" if has else "UpBlock2D" for has in reversed(attention)),
        num_class_embeds=CLASSES + 1,
    )
    made.conv_in.bench_role, made.conv_out.bench_role = "entered", "finished"
    return made


def images(arguments: argparse.Namespace) -> Any:
    """A data set in memory: {"x": (3, S, S) float32, "class_labels": int}."""
    import torch
    from torch.utils.data import Dataset

    class Images(Dataset):
        def __init__(self) -> None:
            generator = torch.Generator().manual_seed(0)
            count, size = 8 * arguments.batch, arguments.size
            self.x = torch.randn(count, 3, size, size, generator=generator).mul_(SIGMA_DATA)
            self.labels = torch.randint(CLASSES, (count,), generator=generator)

        def __len__(self) -> int:
            return len(self.x)

        def __getitem__(self, index: int) -> dict[str, Any]:
            return {"x": self.x[index], "class_labels": int(self.labels[index])}

    return Images()


def endless(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    from torch.utils.data import DataLoader

    loader = DataLoader(images(arguments), batch_size=arguments.batch, shuffle=True)
    while True:
        yield from loader


# ---------------------------------------------------------------- the network under EDM's preconditioning, by hand


def scalings(sigma: Any) -> tuple[Any, Any, Any, Any]:
    """c_skip, c_out, c_in as (B, 1, 1, 1) and the network's time (B,), of sigma (B,)."""
    s = sigma.view(-1, 1, 1, 1)
    total = s**2 + SIGMA_DATA**2
    return SIGMA_DATA**2 / total, s * SIGMA_DATA / total.sqrt(), total.rsqrt(), 250 * sigma.log()


def denoise(network: Any, x_t: Any, sigma: Any, labels: Any) -> Any:
    skip, out, into, time_input = scalings(sigma)
    return skip * x_t + out * network(into * x_t, time_input, labels, return_dict=False)[0]


def to_middle(network: Any, sample: Any, time_input: Any, labels: Any) -> tuple[Any, Any, tuple[Any, ...]]:
    """The network up to its middle block: its output, the embedding and the skip connections."""
    embedding = network.time_embedding(network.time_proj(time_input)) + network.class_embedding(labels)
    sample = network.conv_in(sample)
    skips = (sample,)
    for block in network.down_blocks:
        sample, made = block(hidden_states=sample, temb=embedding)
        skips += made
    return network.mid_block(sample, embedding), embedding, skips


def from_middle(network: Any, sample: Any, embedding: Any, skips: tuple[Any, ...]) -> Any:
    for block in network.up_blocks:
        count = len(block.resnets)
        sample, skips = block(sample, skips[-count:], embedding), skips[:-count]
    return network.conv_out(network.conv_act(network.conv_norm_out(sample)))


def middle(network: Any, x_t: Any, sigma: Any, labels: Any) -> Any:
    into, time_input = scalings(sigma)[2:]
    return to_middle(network, into * x_t, time_input, labels)[0]


def denoise_with_middle(network: Any, x_t: Any, sigma: Any, labels: Any) -> tuple[Any, Any]:
    skip, out, into, time_input = scalings(sigma)
    features, embedding, skips = to_middle(network, into * x_t, time_input, labels)
    return skip * x_t + out * from_middle(network, features, embedding, skips), features


# ---------------------------------------------------------------- contenders: generators that yield after each cycle


def bare(arguments: argparse.Namespace, device: Any, trunk: bool) -> Iterator[None]:
    """DMD2 by hand. `trunk`: the head on the fake's middle block, else on the teacher's."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    teacher = unet(arguments).eval().requires_grad_(False).to(device)
    fake, student = unet(arguments).to(device), unet(arguments).to(device)
    wide = arguments.channels[-1]
    head = nn.Sequential(
        *(nn.Conv2d(wide, wide, 4, 2, 1), nn.GroupNorm(32, wide), nn.SiLU()),
        *(nn.Conv2d(wide, wide, 4, 4), nn.GroupNorm(32, wide), nn.SiLU(), nn.Conv2d(wide, 1, 1)),
    ).to(device)
    critics = [*fake.parameters(), *head.parameters()]
    student_optimizer = torch.optim.AdamW(student.parameters(), **ADAMW)
    critic_optimizer = torch.optim.AdamW(critics, **ADAMW)
    ramp = torch.linspace(0, 1, LEVELS, dtype=torch.float64)
    low, high = SIGMA_MIN ** (1 / RHO), SIGMA_MAX ** (1 / RHO)
    table = ((low + ramp * (high - low)) ** RHO).float().to(device)
    host = fake if trunk else teacher

    def noised(x: Any, first: int = 0, last: int = LEVELS - 1) -> tuple[Any, Any]:
        sigma = table[torch.randint(first, last + 1, (len(x),), device=device)]
        return x + sigma.view(-1, 1, 1, 1) * torch.randn_like(x), sigma

    def logits(x: Any, labels: Any) -> Any:
        x_t, sigma = noised(x)
        return head(middle(host, x_t, sigma, labels))

    def generator_loss(x: Any, labels: Any) -> Any:
        x_t, sigma = noised(x, 20, 980)
        with torch.no_grad():
            mu_r, mu_f = (denoise(network, x_t, sigma, labels) for network in (teacher, fake))
            weight = 1 / ((x - mu_r).abs().mean((1, 2, 3), keepdim=True) + 1e-6)
            target = x - weight * (mu_f - mu_r)
        return 0.5 * F.mse_loss(x, target) + LAMBDA_G * F.softplus(-logits(x, labels)).mean()

    def critic_loss(x: Any, real: Any, labels: Any) -> Any:
        x_t, sigma = noised(x)
        weight = (sigma**-2 + SIGMA_DATA**-2).view(-1, 1, 1, 1)
        loss = (weight * (denoise(fake, x_t, sigma, labels) - x) ** 2).mean()
        if trunk:
            on_fake, on_real = logits(x, labels), logits(real, labels)
        else:
            with torch.no_grad():
                features = [middle(teacher, *noised(y), labels) for y in (x, real)]
            on_fake, on_real = (head(feature) for feature in features)
        return loss + LAMBDA_D * (F.softplus(on_fake).mean() + F.softplus(-on_real).mean())

    def step(loss: Any, optimizer: Any, parameters: Any) -> None:
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad()

    data = endless(arguments)
    sigma_max = torch.full((arguments.batch,), SIGMA_MAX, device=device)
    for iteration in range(sys.maxsize):
        batch = next(data)
        real, labels = batch["x"].to(device), batch["class_labels"].to(device)
        z = torch.randn_like(real)
        with torch.set_grad_enabled(iteration % arguments.ratio == 0):
            x = denoise(student, SIGMA_MAX * z, sigma_max, labels)
        if iteration % arguments.ratio == 0:
            for parameter in critics:
                parameter.requires_grad_(False)
            step(generator_loss(x, labels), student_optimizer, student.parameters())
            for parameter in critics:
                parameter.requires_grad_(True)
        loss = critic_loss(x.detach(), real, labels)
        step(loss, critic_optimizer, critics)
        if iteration % 10 == 0:
            loss.item()
        if (iteration + 1) % arguments.ratio == 0:
            yield


def fastgen(arguments: argparse.Namespace, device: Any) -> Iterator[None]:
    """FastGen's own config, model, optimisers, schedules and trainer; what `Trainer.run` does between two saves."""
    if arguments.fastgen is None:
        raise SystemExit("contender 'fastgen' needs --fastgen FOLDER, a checkout of NVlabs/FastGen")
    sys.path.insert(0, str(arguments.fastgen))
    from fastgen.configs.callbacks import GradClip_CALLBACK
    from fastgen.configs.methods.config_dmd2 import create_config
    from fastgen.methods import DMD2Model
    from fastgen.networks.discriminators import Discriminator_EDM
    from fastgen.trainer import Trainer
    from fastgen.utils import LazyCall, basic_utils
    from fastgen.utils import logging_utils as logger
    from loguru import logger as sink
    from omegaconf import DictConfig
    from torch.utils.data import DataLoader

    sink.remove()
    config = create_config()
    config.trainer.callbacks = DictConfig(GradClip_CALLBACK)
    model_config = config.model
    model_config.device = device.type
    model_config.input_shape = [3, arguments.size, arguments.size]
    model_config.net = LazyCall(adapter())(arguments=arguments)
    resolutions = [arguments.size // 2**i for i in range(len(arguments.channels))]
    model_config.discriminator = LazyCall(Discriminator_EDM)(all_res=resolutions, in_channels=arguments.channels[-1])
    model_config.student_update_freq = arguments.ratio + 1
    model_config.gan_loss_weight_gen = LAMBDA_G
    for options in (
        model_config.net_optimizer,
        model_config.fake_score_optimizer,
        model_config.discriminator_optimizer,
    ):
        options.update(ADAMW)
    trainer, model = Trainer(config), DMD2Model(model_config)
    model.on_train_begin()
    model.init_optimizers()

    def labelled(samples: list[dict[str, Any]]) -> dict[str, Any]:
        import torch

        labels = torch.tensor([sample["class_labels"] for sample in samples])
        real = torch.stack([sample["x"] for sample in samples])
        return {"real": real, "condition": labels, "neg_condition": torch.full_like(labels, CLASSES)}

    loader = DataLoader(images(arguments), batch_size=arguments.batch, shuffle=True, collate_fn=labelled)

    def batches() -> Iterator[dict[str, Any]]:
        while True:
            yield from loader

    data = batches()
    trainer.callbacks.on_train_begin(model, iteration=0)
    for iteration in range(1, sys.maxsize):
        trainer.callbacks.on_training_step_begin(model, iteration=iteration)
        batch = trainer.preprocess_data(model, next(data), None)
        logger.debug(f"iteration: {iteration} | data: {basic_utils.to_str(batch)}")
        trainer.callbacks.on_training_accum_step_begin(model, batch, iteration=iteration, accum_iter=0)
        losses, outputs = trainer.train_step(model, model, batch, iteration, 0)
        trainer.callbacks.on_training_step_end(
            model=model, data_batch=batch, output_batch=outputs, loss_dict=losses, iteration=iteration
        )
        trainer.auto_resume_exit(model, iteration)
        if iteration % model_config.student_update_freq == 0:
            yield


def adapter() -> Any:
    """The same UNet2DModel as a network of FastGen; its one feature map is the middle block's output."""
    import torch
    from fastgen.networks.network import FastGenNetwork

    class Hosted(FastGenNetwork):
        def __init__(self, arguments: argparse.Namespace):
            super().__init__(net_pred_type="x0", schedule_type="edm")
            self.network = unet(arguments)

        def forward(
            self,
            x_t: torch.Tensor,
            t: torch.Tensor,
            condition: Any = None,
            r: torch.Tensor | None = None,
            return_features_early: bool = False,
            feature_indices: set[int] | None = None,
            return_logvar: bool = False,
            fwd_pred_type: str | None = None,
            **unused: Any,
        ) -> Any:
            sigma = t.to(x_t.dtype)
            if return_features_early:
                return [middle(self.network, x_t, sigma, condition)]
            features = None
            if feature_indices:
                x0, features = denoise_with_middle(self.network, x_t, sigma, condition)
            else:
                x0 = denoise(self.network, x_t, sigma, condition)
            made = self.noise_scheduler.convert_model_output(
                x_t, x0, t, src_pred_type="x0", target_pred_type=fwd_pred_type or self.net_pred_type
            )
            return made if features is None else [made, [features]]

    return Hosted


def kdcore_loop(arguments: argparse.Namespace, device: Any, trunk: bool) -> Iterator[None]:
    """`kdcore.training.Loop`, one iteration at a time: what its `fit` does between two checkpoints."""
    from kd_diffusion.engine.adversarial import GANConfig
    from kd_diffusion.engine.denoiser import Denoiser
    from kd_diffusion.engine.distillation import Networks
    from kd_diffusion.engine.process import EDM
    from kd_diffusion.integrations.conditioners import ClassConditioner
    from kd_diffusion.integrations.pipelines import Space
    from kd_diffusion.methods.dmd2 import DMD2, DMD2Config
    from kdcore.config import OptimizerConfig, RunConfig, TrainConfig
    from kdcore.data import seeded_loader
    from kdcore.stages import RunContext
    from kdcore.training import Loop, TrainSetup, make_accelerator

    gan = GANConfig(
        host="fake_trunk" if trunk else "teacher_features",
        weight_generator=LAMBDA_G,
        weight_discriminator=LAMBDA_D,
    )
    teacher, fake, student = (
        Denoiser(unet(arguments), EDM(SIGMA_MIN, SIGMA_MAX, RHO, SIGMA_DATA), "edm") for _ in range(3)
    )
    space = Space(None, (3, arguments.size, arguments.size))
    networks = Networks(teacher, fake, student, ClassConditioner(CLASSES, CLASSES), space)
    distiller = DMD2(networks, DMD2Config(fake_updates=arguments.ratio, gan=gan))
    optimizer = OptimizerConfig(name="adamw", **ADAMW)
    train = TrainConfig(steps=10**6, batch_size=arguments.batch, optimizer=optimizer, clip=CLIP)
    accelerator = make_accelerator(train, cpu=device.type == "cpu")
    context = RunContext(RunConfig(method="dmd2", train=train), Path(tempfile.mkdtemp()), accelerator, quiet=True)
    loader = seeded_loader(images(arguments), arguments.batch)
    loop = Loop("student", context, TrainSetup(distiller, loader), train)
    with loop.log:
        while True:
            for window in loop._windows():
                loop.window += 1
                loop._iteration(window)
                if loop.step % arguments.ratio == 0:
                    yield
            loop.epoch, loop.window = loop.epoch + 1, 0


def contender(name: str, arguments: argparse.Namespace, device: Any) -> Iterator[None]:
    makers: dict[str, Callable[[], Iterator[None]]] = {
        "bare": lambda: bare(arguments, device, trunk=False),
        "trunk-bare": lambda: bare(arguments, device, trunk=True),
        "kdcore": lambda: kdcore_loop(arguments, device, trunk=False),
        "trunk-kdcore": lambda: kdcore_loop(arguments, device, trunk=True),
        "fastgen": lambda: fastgen(arguments, device),
    }
    return makers[name]()


# ---------------------------------------------------------------- measuring


def device_of(arguments: argparse.Namespace) -> Any:
    return pick_device(threads=arguments.threads, cpu=arguments.cpu)


def measure_time(names: list[str], arguments: argparse.Namespace) -> dict[str, list[float]]:
    device = device_of(arguments)
    running = {name: contender(name, arguments, device) for name in names}
    return interleaved(running, device, warmup=1, rounds=arguments.rounds, size=arguments.block)


def measure_memory(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Extra peak bytes of one cycle of one contender in this process, and the forward passes of another."""
    device = device_of(arguments)
    cycles = contender(name, arguments, device)
    seconds_per_step(cycles, 1, device)
    with PeakMemory(device.type) as peak:
        seconds_per_step(cycles, 1, device)
    return {"peak_bytes": peak.extra, "calls": forward_calls(cycles, arguments.batch)}


def forward_calls(cycles: Iterator[None], batch: int) -> dict[str, float]:
    """Batches that pass through a network in one cycle: whole forward passes, and those cut at the middle block."""
    from torch.nn.modules.module import register_module_forward_hook

    seen = {"entered": 0, "finished": 0}

    def count(module: Any, args: tuple[Any, ...], output: Any) -> None:
        role = getattr(module, "bench_role", None)
        if role is not None:
            seen[role] += len(output)

    handle = register_module_forward_hook(count)
    try:
        next(cycles)
    finally:
        handle.remove()
    return {"whole": seen["finished"] / batch, "to_middle": (seen["entered"] - seen["finished"]) / batch}


def memory_in_subprocess(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    options = [f"--{key}={getattr(arguments, key)}" for key in ("size", "layers", "batch", "ratio", "threads")]
    options += ["--channels", *map(str, arguments.channels)]
    options += [f"--fastgen={arguments.fastgen}"] if arguments.fastgen else []
    return in_subprocess(__file__, name, [*options, *(["--cpu"] if arguments.cpu else [])])


def reference(name: str) -> str:
    return "trunk-bare" if name in TRUNK else "bare"


def ratio(seconds: dict[str, list[float]], name: str) -> float:
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[reference(name)], strict=True))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fastgen", type=Path, help="checkout of NVlabs/FastGen; without it that contender is out")
    parser.add_argument("--size", type=int, default=32, help="image side")
    parser.add_argument("--channels", type=int, nargs="+", default=[32, 64, 128], help="of the network, per resolution")
    parser.add_argument("--layers", type=int, default=1, help="residual blocks per resolution")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--ratio", type=int, default=5, help="fake-score steps per generator step")
    parser.add_argument("--block", type=int, default=1, help="cycles in a block")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu", action="store_true", help="leave an accelerator alone")
    parser.add_argument("--only", nargs="*", choices=[*FROZEN, *TRUNK], help="contenders besides the bare loops")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    if arguments.child:
        print(json.dumps(measure_memory(arguments.child, arguments)))
        return
    names = [name for name in [*FROZEN, *TRUNK] if not arguments.only or name in arguments.only]
    names = [name for name in names if name != "fastgen" or arguments.fastgen]
    names = list(dict.fromkeys(n for name in names for n in (reference(name), name)))
    seconds = measure_time(names, arguments)
    memory = {name: memory_in_subprocess(name, arguments) for name in names}
    result = {
        "environment": environment("diffusers", "accelerate"),
        "arguments": {k: str(v) for k, v in vars(arguments).items() if k not in ("output", "child", "fastgen")},
        "parameters": sum(parameter.numel() for parameter in unet(arguments).parameters()),
        "contenders": {},
    }
    print(f"{'contender':14} {'s/cycle':>9} {'x bare':>8} {'peak MiB':>9} {'x bare':>8}   forward passes")
    for name in names:
        times, base = ratio(seconds, name), memory[reference(name)]["peak_bytes"]
        middle_seconds, measured = statistics.median(seconds[name]), memory[name]
        peak = measured["peak_bytes"] / base
        result["contenders"][name] = {
            "reference": reference(name),
            "seconds_per_cycle": middle_seconds,
            "over_reference": times,
            "peak_bytes": measured["peak_bytes"],
            "peak_over_reference": peak,
            "calls": measured["calls"],
        }
        mib = measured["peak_bytes"] / MIB
        print(f"{name:14} {middle_seconds:9.3f} {times:8.3f} {mib:9.0f} {peak:8.2f}   {measured['calls']}")
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
