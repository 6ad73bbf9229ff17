"""Seconds and peak memory of an iteration of NCFM and of AST against the loops that their authors released.

The released code is not part of this repository: give the folders of clones of gszfwsb/NCFM (`--ncfm`) and of
shenjiyuan123/AST-Alignment-with-Smooth-Expert (`--ast`). Same network (ConvNet, width 128, depth 3, instance norm),
same number of images, same augmentation, random images of 3 x 32 x 32.

    ncfm-release, ncfm-release-psi    condenser/compute_loss.py's two functions, as condenser/Condenser.py calls them,
                                      with normals or with SampleNet, its width set to the network's
    ncfm-gaussian, -tiled, -mixture   our method in kdcore's loop: normals; SampleNet's tiled frequencies; the paper's
                                      mixture
    ast-release                       distill.py's main(), unchanged, one iteration at a time; what it imports for
                                      plots, whitening and data is replaced by empty modules
    ast                               our method in kdcore's loop

An iteration of NCFM is a matching and a calibration step for every class; the release's reading of networks from disk
is left out, ours is timed with the interpolation of its networks. An iteration of AST is one trajectory match.

Time: one process, contenders interleaved in a new random order each round, ratios are medians over the rounds. Peak
memory: a process each, the kernel's high-water mark over three iterations (the allocator's on CUDA) above what was in
use before the first: the release of AST keeps an iteration's tensors until the next one replaces them.

    python tools/bench/dataset_distillation.py --ncfm NCFM --ast AST-Alignment-with-Smooth-Expert --output result.json
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import sys
import tempfile
import threading
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from measure import MIB, PeakMemory, environment, in_subprocess, interleaved, pick_device, seconds_per_step

NCFM = ["ncfm-release", "ncfm-gaussian", "ncfm-release-psi", "ncfm-tiled", "ncfm-mixture"]
AST = ["ast-release", "ast"]
REFERENCE = {
    "ncfm-gaussian": "ncfm-release",
    "ncfm-tiled": "ncfm-release-psi",
    "ncfm-mixture": "ncfm-release-psi",
    "ast": "ast-release",
}
MEAN, STD = [0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010]
IMAGE_LR, RATE_LR, RATE = 100.0, 1e-5, 0.01
EXPERT_EPOCHS, MAX_START, KEPT = 2, 4, 6


def released(folder: Path, *names: str) -> list[Any]:
    """Modules of a clone. Both clones have modules of the same names, so what they load is forgotten again."""
    before = set(sys.modules)
    sys.path.insert(0, str(folder.resolve()))
    try:
        return [importlib.import_module(name) for name in names]
    finally:
        sys.path.remove(str(folder.resolve()))
        own = str(folder.resolve())
        for name in set(sys.modules) - before:
            module = sys.modules[name]
            places = [getattr(module, "__file__", None) or "", *map(str, getattr(module, "__path__", []))]
            if any(place.startswith(own) for place in places):
                del sys.modules[name]


def images(count: int, arguments: argparse.Namespace) -> Any:
    import torch

    return torch.randint(0, 256, (count, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def our_network(arguments: argparse.Namespace) -> Any:
    import torch

    from kd_classification.engine.convnet import ConvNet

    torch.manual_seed(0)
    return ConvNet(num_classes=arguments.classes, width=arguments.width)


def loop(distiller: Any, loader: Any, lr: float, name: str, momentum: float, device: Any, epochwise: bool) -> Any:
    """`kdcore.training.Loop`, one epoch or one step at a time: what its `fit` does between two checkpoints.

    Like every contender, it yields when it is ready, then after each iteration.
    """
    from kdcore.config import OptimizerConfig, RunConfig, TrainConfig
    from kdcore.stages import RunContext
    from kdcore.training import Loop, TrainSetup, make_accelerator

    optimizer = OptimizerConfig(name=name, lr=lr, momentum=momentum, weight_decay=5e-4 if name == "adamw" else 0.0)
    train = TrainConfig(steps=10**9, optimizer=optimizer, checkpoint_every=10**9, log_every=10)
    accelerator = make_accelerator(train, cpu=device.type == "cpu")
    context = RunContext(RunConfig(method="bench", train=train), Path(tempfile.mkdtemp()), accelerator, quiet=True)
    running = Loop("synthetic", context, TrainSetup(distiller, loader), train)
    with running.log:
        yield
        while True:
            distiller.progress.epoch = running.epoch
            distiller.epoch_start()
            for window in running._windows():
                running.window += 1
                running._iteration(window)
                if not epochwise:
                    yield
            distiller.epoch_end()
            running.epoch, running.window = running.epoch + 1, 0
            if epochwise:
                yield


# ---------------------------------------------------------------- NCFM


def ncfm(arguments: argparse.Namespace, device: Any, sampling: str) -> Iterator[None]:
    import torch

    from kd_classification.engine.diff_augment import DiffAugment
    from kd_classification.engine.experts import flat_parameters
    from kd_classification.engine.real_images import RealImages
    from kd_classification.engine.synthetic import LearnableImages, Preprocessing
    from kd_classification.methods.ncfm import NCFM as Method
    from kd_classification.methods.ncfm import ClassSteps
    from kdcore.config import OptimizerConfig

    network = our_network(arguments)
    flat = flat_parameters(network)[None]
    count, classes = arguments.real * arguments.classes, arguments.classes
    real = RealImages(images(count, arguments), torch.arange(count) % classes, classes).to(device)
    labels = torch.arange(classes).repeat_interleave(arguments.per_class)
    distiller = Method(
        LearnableImages(torch.rand(len(labels), 3, 32, 32), labels),
        network,
        flat,
        flat + 0.01,
        Preprocessing(MEAN, STD),
        DiffAugment(["color", "crop", "cutout"], "layered", siamese=True),
        factor=2,
        optimizer=OptimizerConfig(name="adamw", lr=1e-3, weight_decay=5e-4),
        frequencies=arguments.frequencies,
        sampling=sampling,
        real_batch=arguments.real,
    )
    steps = ClassSteps(real, arguments.real, 1, 0)
    return loop(distiller, steps, 1e-3, "adamw", 0.9, device, epochwise=True)


class Untimed:
    """Stands for the release's TimingTracker."""

    def start_step(self) -> None: ...

    def record(self, name: str) -> None: ...


def ncfm_release(arguments: argparse.Namespace, device: Any, psi: bool) -> Iterator[None]:
    import torch
    from torchvision import transforms

    modules = ["NCFM.NCFM", "NCFM.SampleNet", "condenser.compute_loss", "condenser.decode"]
    modules += ["utils.diffaug", "data.augment", "data.dataloader", "models.convnet"]
    losses, sample_net, compute, decoding, diffaug, augment, loading, convnet = released(arguments.ncfm, *modules)
    torch.manual_seed(0)
    classes = arguments.classes

    def network() -> Any:
        return convnet.ConvNet(classes, net_width=arguments.width).to(device).requires_grad_(False)

    interval, final = network(), network()
    count = arguments.real * classes
    real = [(image.to(device),) for image in images(count, arguments)]

    class Memory(list):
        targets = (torch.arange(count) % classes).tolist()
        nclass = classes

    loader = loading.ClassMemDataLoader(Memory(real), arguments.real, device=device)
    data = torch.rand(classes * arguments.per_class, 3, 32, 32, device=device).requires_grad_()
    targets = torch.arange(classes, device=device).repeat_interleave(arguments.per_class)

    def class_sample(label: int) -> Any:
        mask = targets == label
        return decoding.decode("single", (32, 32), data[mask], targets[mask], 2, bound=100000)

    normalise = augment.Normalize(mean=MEAN, std=STD, device=device)
    aug = transforms.Compose([normalise, diffaug.DiffAug(strategy="color_crop_cutout", batch=True)])
    optimizer = torch.optim.AdamW([data], lr=1e-3, weight_decay=5e-4)
    args = argparse.Namespace(device=device, num_freqs=arguments.frequencies)
    args.cf_loss_func = losses.CFLossFunc(0.5, 0.5)
    sampler, sampler_optimizer = None, None
    if psi:
        width = interval.classifier.in_features
        sampler = sample_net.SampleNet(feature_dim=width, t_batchsize=arguments.frequencies).to(device)
        sampler_optimizer = torch.optim.SGD(sampler.parameters(), lr=1e-3, momentum=0.5)
    common = {"aug_fn": aug, "optim_img": optimizer, "class_list": range(classes), "timing_tracker": Untimed()}
    yield
    while True:
        data.data = torch.clamp(data.data, min=0.0, max=1.0)
        compute.compute_match_loss(
            args,
            loader_real=loader,
            sample_fn=class_sample,
            inner_loss_fn=losses.match_loss,
            model_interval=interval,
            data_grad=data.grad,
            optim_sampling_net=sampler_optimizer,
            sampling_net=sampler,
            **common,
        )
        compute.compute_calib_loss(
            sample_fn=class_sample,
            inter_loss_fn=losses.cailb_loss,
            iter_calib=1,
            model_final=final,
            calib_weight=1,
            data_grad=data.grad,
            **common,
        )
        yield


# ---------------------------------------------------------------- AST


def trajectory(arguments: argparse.Namespace) -> Any:
    """(epochs, P) weights of a made-up expert, in the order of ConvNet's parameters, which both codes share."""
    import torch

    from kd_classification.engine.experts import flat_parameters

    start = flat_parameters(our_network(arguments))
    steps = 0.01 * torch.randn(KEPT, len(start), generator=torch.Generator().manual_seed(1))
    return start + steps.cumsum(0)


def ast(arguments: argparse.Namespace, device: Any) -> Iterator[None]:
    import torch

    from kd_classification.engine.diff_augment import DiffAugment
    from kd_classification.engine.synthetic import LearnableImages
    from kd_classification.methods.smooth_trajectories import SmoothTrajectories, Windows

    rows = trajectory(arguments)

    class Memory:
        def rows(self, first: int, end: int) -> Any:
            return rows[first:end]

    torch.manual_seed(0)
    labels = torch.arange(arguments.classes)
    distiller = SmoothTrajectories(
        LearnableImages(torch.randn(len(labels), 3, 32, 32), labels),
        our_network(arguments),
        DiffAugment(["color", "crop", "cutout", "flip", "scale", "rotate"]),
        image_lr=IMAGE_LR,
        steps=arguments.steps,
        expert_epochs=EXPERT_EPOCHS,
        max_start_epoch=MAX_START,
        rate=RATE,
        rate_lr=RATE_LR,
    )
    windows = Windows([Memory()], MAX_START, EXPERT_EPOCHS, 0)  # type: ignore[list-item]
    return loop(distiller, windows, IMAGE_LR, "sgd", 0.5, device, epochwise=False)


class Turns:
    """Lets another thread run up to its next mark, and waits until it has come there."""

    def __init__(self) -> None:
        self.go, self.done = threading.Semaphore(0), threading.Semaphore(0)
        self.error: BaseException | None = None

    def mark(self) -> None:
        self.done.release()
        self.go.acquire()

    def step(self) -> None:
        self.go.release()
        self.done.acquire()
        if self.error is not None:
            raise RuntimeError("the released code failed") from self.error


def stand_ins(turns: Turns) -> dict[str, types.ModuleType]:
    """Modules that the release imports and an iteration does not need; its log marks where an iteration begins."""

    def module(name: str, **content: Any) -> types.ModuleType:
        made = types.ModuleType(name)
        made.__dict__.update(content)
        return made

    def log(values: dict[str, Any], step: int | None = None) -> None:
        if "Progress" in values:
            turns.mark()

    holder = types.SimpleNamespace(_items={})
    nothing = lambda *_, **__: None  # noqa: E731
    wandb = module("wandb", log=log, finish=nothing, Image=nothing, Histogram=nothing, config=holder)
    wandb.run = types.SimpleNamespace(name="bench")  # type: ignore[attr-defined]
    wandb.init = lambda config=None, **_: holder._items.update(vars(config))  # type: ignore[attr-defined]
    return {
        "wandb": wandb,
        "kornia": module("kornia"),
        "generator": module("generator", Generator=object),
        "scipy.ndimage.interpolation": module("scipy.ndimage.interpolation", rotate=None),
    }


def ast_arguments(arguments: argparse.Namespace, buffer: str) -> argparse.Namespace:
    """What distill.py's parser would give, with the extras on."""
    off = ["align_loss", "adaptive_middle_loss", "ignore_graph", "zca", "texture", "no_aug", "force_save"]
    on = ["balance_loss", "agg_middle_loss", "weight_perturb", "load_all"]
    values: dict[str, Any] = {**dict.fromkeys(off, False), **dict.fromkeys(on, True)}
    values |= {"dataset": "Random", "subset": "", "model": "ConvNet", "ipc": 1, "eval_mode": "S", "num_eval": 0}
    values |= {"eval_it": 10**9, "epoch_eval_train": 0, "Iteration": 10**9 - 1, "mom": 0.9, "batch_real": 256}
    values |= {"lr_img": IMAGE_LR, "lr_lr": RATE_LR, "lr_teacher": RATE, "lr_init": RATE, "batch_syn": None}
    values |= {"batch_train": 256, "pix_init": "real", "dsa": "True", "buffer_path": buffer, "data_path": ""}
    values |= {"dsa_strategy": "color_crop_cutout_flip_scale_rotate", "expert_epochs": EXPERT_EPOCHS}
    values |= {"syn_steps": arguments.steps, "max_start_epoch": MAX_START, "canvas_size": 2, "canvas_samples": 1}
    values |= {"max_files": None, "max_experts": None}
    return argparse.Namespace(**values)


def ast_release(arguments: argparse.Namespace, device: Any) -> Iterator[None]:
    import torch

    from kd_classification.engine.experts import as_parameters

    turns, classes = Turns(), arguments.classes
    extras = stand_ins(turns)
    sys.modules.update(extras)
    distill, utils = released(arguments.ast, "distill", "utils")
    folder = tempfile.mkdtemp()
    place = Path(folder, "Random", "ConvNet")
    place.mkdir(parents=True)
    network = our_network(arguments)
    rows = [[part.clone() for part in as_parameters(row, network).values()] for row in trajectory(arguments)]
    torch.save([rows], place / "replay_buffer_0.pt")
    data = [((images(1, arguments)[0].float() / 255 - 0.5) / 0.25, label) for label in range(classes)]
    identity = {label: label for label in range(classes)}
    found = (3, (32, 32), classes, [], MEAN, STD, data, data, [], None, identity, identity)
    distill.get_dataset = lambda *_, **__: found
    for module in (distill, utils):
        module.print = lambda *_, **__: None
    setting = utils.get_default_convnet_setting()
    globals_of = distill.get_network.__globals__
    globals_of["get_default_convnet_setting"] = lambda: (arguments.width, *setting[1:])

    def run() -> None:
        turns.go.acquire()
        try:
            distill.main(ast_arguments(arguments, folder))
        except BaseException as error:
            turns.error = error
            turns.done.release()

    before = os.getcwd()
    os.chdir(folder)  # it writes its pictures into the working folder
    threading.Thread(target=run, daemon=True).start()
    turns.step()  # up to the first iteration
    yield
    turns.step()  # the first one saves pictures
    os.chdir(before)
    while True:
        yield
        turns.step()


# ---------------------------------------------------------------- measuring


def contender(name: str, arguments: argparse.Namespace, device: Any) -> Iterator[None]:
    if name.startswith("ncfm-release"):
        return ncfm_release(arguments, device, psi=name.endswith("psi"))
    if name.startswith("ncfm"):
        sampling = {"gaussian": "gaussian", "tiled": "tiled", "mixture": "scale_mixture"}[name.removeprefix("ncfm-")]
        return ncfm(arguments, device, sampling)
    return ast_release(arguments, device) if name == "ast-release" else ast(arguments, device)


def same_loss(arguments: argparse.Namespace) -> float:
    """Largest difference of our discrepancy from the release's on the same features and frequencies, relative."""
    import torch

    from kd_classification.methods.ncfm import ncfd

    (losses,) = released(arguments.ncfm, "NCFM.NCFM")
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for alpha in (0.1, 0.5, 0.9):
        a, b, t = (torch.randn(n, 16, generator=generator, dtype=torch.float64) for n in (30, 7, 50))
        theirs = losses.CFLossFunc(alpha, 1 - alpha)(a, b, t)
        worst = max(worst, abs(float(ncfd(a, b, t, alpha) / theirs) - 1))
    return worst


def measure_memory(name: str, arguments: argparse.Namespace) -> int:
    device = pick_device(threads=arguments.threads, cpu=arguments.cpu)
    steps = contender(name, arguments, device)
    next(steps)
    with PeakMemory(device.type) as peak:
        seconds_per_step(steps, 3, device)
    return peak.extra


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ncfm", type=Path, help="clone of gszfwsb/NCFM")
    parser.add_argument("--ast", type=Path, help="clone of shenjiyuan123/AST-Alignment-with-Smooth-Expert")
    parser.add_argument("--width", type=int, default=128, help="of the ConvNet")
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--per-class", type=int, default=10, help="NCFM: images stored per class, 4 tiles each")
    parser.add_argument("--real", type=int, default=1024, help="NCFM: real images in a class step")
    parser.add_argument("--frequencies", type=int, default=1024, help="NCFM")
    parser.add_argument("--steps", type=int, default=20, help="AST: inner steps, 1 image per class")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu", action="store_true", help="leave an accelerator alone")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure_memory(arguments.child, arguments)))
        return
    groups = [*([NCFM] if arguments.ncfm else []), *([AST] if arguments.ast else [])]
    if not groups:
        parser.error("give --ncfm, --ast or both")
    device = pick_device(threads=arguments.threads, cpu=arguments.cpu)
    given = {k: v for k, v in vars(arguments).items() if k not in ("output", "child", "ncfm", "ast")}
    result: dict[str, Any] = {"environment": environment("timm", "accelerate"), "arguments": given, "contenders": {}}
    if arguments.ncfm:
        result["relative_difference_of_the_discrepancy"] = same_loss(arguments)
    for names in groups:
        running = {name: contender(name, arguments, device) for name in names}
        seconds = interleaved(running, device, warmup=2, rounds=arguments.rounds, size=1)
        del running
        for name in names:
            own = seconds[name]
            entry: dict[str, Any] = {"seconds": statistics.median(own)}
            entry["peak_bytes"] = in_subprocess(__file__, name, options(arguments))
            reference = REFERENCE.get(name)
            if reference is not None:
                ratios = [a / b for a, b in zip(own, seconds[reference], strict=True)]
                entry |= {"reference": reference, "over_reference": statistics.median(ratios)}
                entry["peak_over_reference"] = entry["peak_bytes"] / result["contenders"][reference]["peak_bytes"]
            result["contenders"][name] = entry
            versus = f"{entry['over_reference']:6.2f} {entry['peak_over_reference']:6.2f}" if reference else ""
            print(f"{name:18} {entry['seconds']:8.3f} s {entry['peak_bytes'] / MIB:8.0f} MiB  {versus}", flush=True)
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")


def options(arguments: argparse.Namespace) -> list[str]:
    """The command line of a child process."""
    found = ["--cpu"] if arguments.cpu else []
    for name in ("ncfm", "ast", "width", "classes", "per_class", "real", "frequencies", "steps", "threads"):
        value = getattr(arguments, name)
        if value is not None:
            found += [f"--{name.replace('_', '-')}", str(value)]
    return found


if __name__ == "__main__":
    main()
