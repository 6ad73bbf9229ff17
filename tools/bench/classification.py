"""Step time and peak memory of `kd` and `dhkd` in our loop against a bare loop, timm's task and torchdistill's box.

All contenders train the same timm networks on the same images in memory with SGD. The loss is cross-entropy plus the
temperature KL, except for the `dhkd` rows, whose method nobody else has; they show what it costs over plain KD.

    bare           the loop one would write by hand: DataLoader, two forwards, loss, backward, step
    kdcore         kdcore.training.Loop (accelerate): the trainer behind `kd train`, with its log, schedule and checks
    timm-task      our as_timm_task(KD) in the same hand-written loop
    timm           timm.task.LogitDistillationTask, likewise
    torchdistill   its DistillationBox, driven as its example scripts do
    dhkd-bare, dhkd-kdcore         DHKD, linear auxiliary head
    dhkd-aligned                   DHKD in kdcore's loop with gradient alignment: two backward passes

Time: one process, blocks of steps interleaved over the contenders in a new random order each round; a contender's
ratio is the median over the rounds of its block against the same round's reference block. Loading is included. Peak
memory: a subprocess each, the kernel's high-water mark (Linux) over three steps after a warm-up; the allocator's
maximum on CUDA.

    python tools/bench/classification.py --output runs/bench/classification.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from measure import MIB, PeakMemory, environment, interleaved, pick_device, seconds_per_step

KD = ["bare", "kdcore", "timm-task", "timm", "torchdistill"]
DHKD = ["dhkd-bare", "dhkd-kdcore", "dhkd-aligned"]
ALPHA, TEMPERATURE, CLASSES = 0.5, 4.0, 100
OPTIMIZER = {"lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4}


def networks(arguments: argparse.Namespace, device: Any) -> tuple[Any, Any]:
    import timm
    import torch

    torch.manual_seed(0)
    teacher = timm.create_model(arguments.teacher, num_classes=CLASSES).eval().requires_grad_(False).to(device)
    return teacher, timm.create_model(arguments.student, num_classes=CLASSES).to(device)


def tensors(arguments: argparse.Namespace) -> tuple[Any, Any]:
    import torch

    generator = torch.Generator().manual_seed(0)
    count, size = 4 * arguments.batch, arguments.size
    images = torch.randn(count, 3, size, size, generator=generator)
    return images, torch.randint(CLASSES, (count,), generator=generator)


# ---------------------------------------------------------------- contenders: generators that yield after each step


def endless(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader


def plain_loader(arguments: argparse.Namespace) -> Any:
    from torch.utils.data import DataLoader, TensorDataset

    return DataLoader(TensorDataset(*tensors(arguments)), batch_size=arguments.batch, shuffle=True)


def by_hand(arguments: argparse.Namespace, device: Any, loss_of: Callable[..., Any], parameters: Any) -> Iterator[None]:
    """The hand-written loop around a loss; every tenth one is read, as a log would."""
    import torch

    optimizer = torch.optim.SGD(parameters, **OPTIMIZER)
    for step, (images, labels) in enumerate(endless(plain_loader(arguments))):
        loss = loss_of(images.to(device), labels.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0:
            loss.item()
        yield


def bare(arguments: argparse.Namespace, device: Any) -> Iterator[None]:
    import torch
    import torch.nn.functional as F

    teacher, student = networks(arguments, device)
    student.train()

    def loss_of(images: Any, labels: Any) -> Any:
        with torch.no_grad():
            target = teacher(images)
        logits = student(images)
        log_q, log_p = (logits / TEMPERATURE).log_softmax(1), (target / TEMPERATURE).log_softmax(1)
        soft = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
        return (1 - ALPHA) * F.cross_entropy(logits, labels) + ALPHA * TEMPERATURE**2 * soft

    return by_hand(arguments, device, loss_of, student.parameters())


def timm_task(arguments: argparse.Namespace, device: Any, ours: bool) -> Iterator[None]:
    import torch

    teacher, student = networks(arguments, device)
    if ours:
        from kd_classification.integrations import as_timm_task
        from kd_classification.methods.kd import KD as Method

        task = as_timm_task(Method(teacher, student, alpha=ALPHA, temperature=TEMPERATURE))
    else:
        from timm.task import LogitDistillationTask

        criterion = torch.nn.CrossEntropyLoss()
        weights = {"task_loss_weight": 1 - ALPHA, "temperature": TEMPERATURE}
        task = LogitDistillationTask(student, teacher, criterion, device=device, verbose=False, **weights)
    task.get_trainable_module().train()
    return by_hand(arguments, device, lambda x, y: task(x, y)["loss"], student.parameters())


def torchdistill(arguments: argparse.Namespace, device: Any) -> Iterator[None]:
    """Set up as its sample configs do for KD, driven as its image-classification example does."""
    import logging

    from torch.utils.data import RandomSampler, TensorDataset

    logging.getLogger("torchdistill").setLevel(logging.ERROR)
    from torchdistill.core.distillation import DistillationBox

    teacher, student = networks(arguments, device)
    path = {"student_module_path": ".", "student_module_io": "output"}
    path |= {"teacher_module_path": ".", "teacher_module_io": "output"}
    loss = {**path, "temperature": TEMPERATURE, "alpha": 1 - ALPHA, "reduction": "batchmean"}
    loader = {
        "dataset_id": "train",
        "sampler": {"class_or_func": RandomSampler},
        "kwargs": {"batch_size": arguments.batch},
    }
    config = {
        "num_epochs": 1,
        "train_data_loader": loader,
        "teacher": {"sequential": [], "forward_proc": "forward_batch_only", "requires_grad": False},
        "student": {"sequential": [], "forward_proc": "forward_batch_only", "requires_grad": True},
        "optimizer": {"key": "SGD", "kwargs": dict(OPTIMIZER)},
        "criterion": {
            "key": "WeightedSumLoss",
            "kwargs": {"sub_terms": {"kd": {"criterion": {"key": "KDLoss", "kwargs": loss}, "weight": 1.0}}},
        },
    }
    data = {"train": TensorDataset(*tensors(arguments))}
    box = DistillationBox(teacher, student, data, config, device, None, False, 1)
    while True:
        box.pre_epoch_process(epoch=0)
        for images, labels, supplement in box.train_data_loader:
            box.pre_forward_process()
            loss = box.forward_process(images.to(device), labels.to(device), supplement)
            box.post_forward_process(loss=loss)
            yield


def distiller(arguments: argparse.Namespace, device: Any, name: str) -> Any:
    from kd_classification.methods.dhkd import DHKD as Dual
    from kd_classification.methods.kd import KD as Plain

    teacher, student = networks(arguments, device)
    if name == "kdcore":
        return Plain(teacher, student, alpha=ALPHA, temperature=TEMPERATURE)
    made = Dual(teacher, student, auxiliary_head="linear", gradient_alignment=name == "dhkd-aligned")
    return made.to(device)


def dhkd_bare(arguments: argparse.Namespace, device: Any) -> Iterator[None]:
    import torch

    from kd_classification.data import Batch

    made = distiller(arguments, device, "dhkd-bare").train()
    parameters = [p for p in made.parameters() if p.requires_grad]
    return by_hand(arguments, device, lambda x, y: made.loss(Batch(x, y, torch.arange(len(x)))).total(), parameters)


def kdcore_loop(arguments: argparse.Namespace, device: Any, name: str) -> Iterator[None]:
    """`kdcore.training.Loop`, one iteration at a time: what its `fit` does between two checkpoints."""
    from torch.utils.data import TensorDataset

    from kd_classification.data import collate
    from kdcore.config import OptimizerConfig, RunConfig, TrainConfig
    from kdcore.data import seeded_loader
    from kdcore.stages import RunContext
    from kdcore.training import Loop, TrainSetup, make_accelerator

    class Indexed(TensorDataset):
        def __getitem__(self, index: int) -> tuple[Any, int, int]:
            image, label = super().__getitem__(index)
            return image, int(label), index

    train = TrainConfig(steps=10**6, batch_size=arguments.batch, optimizer=OptimizerConfig(name="sgd", **OPTIMIZER))
    folder = Path(tempfile.mkdtemp())
    context = RunContext(
        RunConfig(method=name, train=train), folder, make_accelerator(train, cpu=device.type == "cpu"), quiet=True
    )
    loader = seeded_loader(Indexed(*tensors(arguments)), arguments.batch, collate=collate)
    loop = Loop("student", context, TrainSetup(distiller(arguments, device, name), loader), train)
    with loop.log:
        while True:
            for window in loop._windows():
                loop.window += 1
                loop._iteration(window)
                yield
            loop.epoch, loop.window = loop.epoch + 1, 0


def contender(name: str, arguments: argparse.Namespace, device: Any) -> Iterator[None]:
    if name == "bare":
        return bare(arguments, device)
    if name in ("timm", "timm-task"):
        return timm_task(arguments, device, ours=name == "timm-task")
    if name == "torchdistill":
        return torchdistill(arguments, device)
    if name == "dhkd-bare":
        return dhkd_bare(arguments, device)
    return kdcore_loop(arguments, device, name)


# ---------------------------------------------------------------- measuring


def device_of(arguments: argparse.Namespace) -> Any:
    return pick_device(threads=arguments.threads, cpu=arguments.cpu)


def measure_time(names: list[str], arguments: argparse.Namespace) -> dict[str, list[float]]:
    device = device_of(arguments)
    running = {name: contender(name, arguments, device) for name in names}
    return interleaved(running, device, warmup=3, rounds=arguments.rounds, size=arguments.block)


def measure_memory(name: str, arguments: argparse.Namespace) -> int:
    """Extra peak bytes of three steps of one contender, in this process."""
    device = device_of(arguments)
    steps = contender(name, arguments, device)
    seconds_per_step(steps, 1, device)
    with PeakMemory(device.type) as peak:
        seconds_per_step(steps, 3, device)
    return peak.extra


def memory_in_subprocess(name: str, arguments: argparse.Namespace) -> int:
    options = [f"--{key}={getattr(arguments, key)}" for key in ("teacher", "student", "size", "batch", "threads")]
    command = [sys.executable, __file__, "--child", name, *options, *(["--cpu"] if arguments.cpu else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr.strip()[-2000:]}")
    return int(done.stdout.split()[-1])


def ratio(seconds: dict[str, list[float]], name: str, reference: str) -> float:
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[reference], strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="resnet34")
    parser.add_argument("--student", default="resnet18")
    parser.add_argument("--size", type=int, default=64, help="image side")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--block", type=int, default=4, help="steps in a block")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu", action="store_true", help="leave an accelerator alone")
    parser.add_argument("--only", nargs="*", choices=[*KD, *DHKD], help="contenders; bare and dhkd-bare are references")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(measure_memory(arguments.child, arguments))
        return
    names = [name for name in [*KD, *DHKD] if not arguments.only or name in arguments.only or name.endswith("bare")]
    seconds = measure_time(names, arguments)
    memory = {name: memory_in_subprocess(name, arguments) for name in names}
    result = {
        "environment": environment("timm", "accelerate", "torchdistill"),
        "arguments": {k: str(v) for k, v in vars(arguments).items() if k not in ("output", "child")},
        "contenders": {},
    }
    print(f"{'contender':14} {'ms/step':>9} {'x bare':>8} {'peak MiB':>9} {'x bare':>8}")
    for name in names:
        times, peak = ratio(seconds, name, "bare"), memory[name] / memory["bare"]
        middle = statistics.median(seconds[name])
        result["contenders"][name] = {
            "seconds": middle,
            "over_bare": times,
            "peak_bytes": memory[name],
            "peak_over_bare": peak,
        }
        print(f"{name:14} {middle * 1e3:9.1f} {times:8.3f} {memory[name] / MIB:9.0f} {peak:8.2f}")
    overhead = {"kd": ratio(seconds, "kdcore", "bare") - 1} if "kdcore" in names else {}
    if "dhkd-kdcore" in names:
        overhead["dhkd"] = ratio(seconds, "dhkd-kdcore", "dhkd-bare") - 1
    for method, share in overhead.items():
        print(f"trainer overhead, {method}: {100 * share:+.2f} % of a bare step")
    result["trainer_overhead"] = overhead
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
