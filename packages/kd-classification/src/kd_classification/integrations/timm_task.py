"""A Distiller as a `timm.task.TrainingTask`: what timm's own train script trains, averages, compiles and saves.

    task = as_timm_task(KD(teacher, student), epochs=300, steps_per_epoch=len(loader))
    optimizer = timm.optim.create_optimizer_v2(task.get_trainable_module(), "sgd", lr=0.1)
    result = task(images, labels)      # {"loss": ..., "output": student logits, "ce": ..., "kd": ...}
    result["loss"].backward()

Checkpoints have timm's layout: the student's own state dict under `state_dict`; what else trains (projectors, auxiliary
heads) and the progress under `task_state`. The frozen teacher is in neither.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from timm.models import group_parameters
from timm.task import TrainingTask
from timm.utils import unwrap_model
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kd_classification.data import Batch
from kd_classification.models import Adapted
from kdcore.distiller import Distiller, LossTerms, Progress, freeze, is_frozen
from kdcore.errors import InputError


class TrainableDistiller(nn.Module):
    """The distiller as timm's trainable module: `forward(images, labels)` gives the terms and the student's logits.

    A copy (timm's EMA makes one) shares the frozen networks instead of copying them.
    """

    def __init__(self, distiller: Distiller):
        super().__init__()
        self.distiller = distiller
        self.logits: Tensor | None = None
        self.recording = False
        # Whichever of timm's forward methods the loss calls, the logits come out of the classifier.
        student = distiller.deployed()
        classifier = student.get_classifier() if hasattr(student, "get_classifier") else student
        (classifier if isinstance(classifier, nn.Module) else student).register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        if self.recording and self.logits is None:
            self.logits = output

    def forward(self, images: Tensor, labels: Tensor) -> tuple[dict[str, tuple[float, Tensor]], Tensor | None]:
        index = torch.full((len(images),), -1, device=images.device)
        self.recording = True
        terms = self.distiller(Batch(images, labels, index))
        logits, self.logits, self.recording = self.logits, None, False
        return terms, logits

    def __deepcopy__(self, memo: dict[int, Any]) -> TrainableDistiller:
        new = TrainableDistiller.__new__(TrainableDistiller)
        nn.Module.__init__(new)
        memo[id(self)] = new  # the copied hook becomes a method of the copy
        memo.update({id(module): module for module in self.distiller.modules() if is_frozen(module)})
        new.logits, new.recording = None, False
        new.distiller = copy.deepcopy(self.distiller, memo)
        return new

    # ------------------------------------------------------------ what timm's optimiser factory asks a model

    def _prefix(self) -> str:
        """Name of the deployed module inside this one, with its dot."""
        deployed = self.distiller.deployed()
        return next(f"{name}." for name, module in self.named_modules() if module is deployed)

    def no_weight_decay(self) -> set[str]:
        student = self.distiller.deployed()
        names = student.no_weight_decay() if hasattr(student, "no_weight_decay") else set()
        return {self._prefix() + name for name in names}

    def group_matcher(self, coarse: bool = False) -> Any:
        """The student's layers; what the distiller adds counts as its last one."""
        student, prefix = self.distiller.deployed(), self._prefix()
        if not hasattr(student, "group_matcher"):
            return {}
        layers = group_parameters(student, student.group_matcher(coarse=coarse), reverse=True)
        last = max(layers.values(), default=0)
        return lambda name: layers.get(name.removeprefix(prefix), last) if name.startswith(prefix) else last


class DistillerTask(TrainingTask):
    """What `as_timm_task` returns; see the module."""

    def __init__(
        self,
        distiller: Distiller,
        *,
        epochs: int = 1,
        steps_per_epoch: int | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(device=device, dtype=dtype, verbose=False)
        self.steps_per_epoch = steps_per_epoch
        distiller.progress = Progress(epochs=epochs, steps=epochs * (steps_per_epoch or 1))
        self.trainable_module: Any = TrainableDistiller(distiller)
        self.to(device=device, dtype=dtype)

    @property
    def distiller(self) -> Distiller:
        return unwrap_model(self.trainable_module).distiller

    def prepare_distributed(self, device_ids: list | None = None, **ddp_kwargs: Any) -> DistillerTask:
        """DDP around the trainable part; terms of weight 0 may leave parameters unused."""
        ddp_kwargs.setdefault("find_unused_parameters", True)
        self.trainable_module = DistributedDataParallel(self.trainable_module, device_ids=device_ids, **ddp_kwargs)
        return self

    def compile(self, backend: str = "inductor", mode: str | None = None, **compile_kwargs: Any) -> nn.Module:
        """Compiles the loss, with the networks in it, and the student for validation."""
        self.eval_model = torch.compile(self.distiller.deployed(), backend=backend, mode=mode, **compile_kwargs)
        self.trainable_module = torch.compile(self.trainable_module, backend=backend, mode=mode, **compile_kwargs)
        return self.eval_model

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """images (B, C, H, W), labels (B,) or (B, K) -> `loss`, `output` (logits (B, K)) and the unweighted terms."""
        if self.trainable_module.training:  # timm's script switches this module, not the task
            self._count()
        terms, logits = self.trainable_module(input, target)
        result = {"loss": LossTerms(terms).total()}
        if logits is not None:
            result["output"] = logits
        return {**result, **{name: term.detach() for name, (_, term) in terms.items()}}

    def _count(self) -> None:
        """Keeps the distiller's progress, and its epoch hooks where the length of an epoch is known."""
        distiller, progress = self.distiller, self.distiller.progress
        if self.steps_per_epoch is not None:
            epoch, position = divmod(progress.step, self.steps_per_epoch)
            if position == 0:
                if epoch > 0:
                    distiller.epoch_end()
                progress.epoch = epoch
                distiller.epoch_start()
        progress.step += 1

    def get_eval_model(self, module: nn.Module | None = None, ema: bool = False) -> nn.Module | None:
        resolved = super().get_eval_model(module=module, ema=ema)
        inner = None if resolved is None else unwrap_model(resolved)
        return inner.distiller.deployed() if isinstance(inner, TrainableDistiller) else resolved

    def get_clip_parameters(self, exclude_head: bool = False) -> list[nn.Parameter]:
        trained = [p for p in self.distiller.parameters() if p.requires_grad]
        if not exclude_head:
            return trained
        head = {id(p) for p in list(self.distiller.deployed().parameters())[-2:]}
        return [p for p in trained if id(p) not in head]

    # ------------------------------------------------------------ checkpoints

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """Trained tensors outside the student, and the progress."""
        module = module if module is not None else self.get_trainable_module(ema=ema)
        if module is None:
            return {}
        trainable = unwrap_model(module)
        own = trainable._prefix().removeprefix("distiller.")
        state = {k: v for k, v in trainable.distiller.checkpoint_state().items() if not k.startswith(own)}
        progress = trainable.distiller.progress
        return {"auxiliary": state, "progress": {"epoch": progress.epoch, "step": progress.step}}

    def load_task_state(
        self,
        state: dict[str, Any] | None,
        strict: bool = True,
        module: nn.Module | None = None,
        ema: bool = False,
    ) -> None:
        if not state:
            return
        module = module if module is not None else self.get_trainable_module(ema=ema)
        if module is None:
            raise RuntimeError("load_task_state: no trainable module; call setup_ema() before loading EMA state")
        distiller = unwrap_model(module).distiller
        expected = set(self.get_task_state(module=module)["auxiliary"])
        if strict and expected != set(state["auxiliary"]):
            raise RuntimeError(
                f"task state does not fit {type(distiller).__name__}: "
                f"it differs in {sorted(expected ^ set(state['auxiliary']))}"
            )
        distiller.load_state_dict(state["auxiliary"], strict=False)
        distiller.progress.epoch, distiller.progress.step = state["progress"]["epoch"], state["progress"]["step"]


def as_timm_task(
    distiller: Distiller,
    *,
    epochs: int = 1,
    steps_per_epoch: int | None = None,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> DistillerTask:
    """The distiller as a training task of timm.

    `epochs` and `steps_per_epoch` (calls of the task per epoch) let methods with a schedule of their own follow the
    training. A frozen timm network of the distiller whose `pretrained_cfg` names another normalisation than the
    student's is put behind a conversion, in place, as timm's own distillation tasks do.

    Raises InputError for a distiller that a single summed loss cannot train: several players, a gradient rule, or a
    teacher cache (timm's loaders give no sample index).
    """
    name = type(distiller).__name__
    players = distiller.players()
    if len(players) != 1:
        raise InputError(
            f"as_timm_task: {name} has players {[p.name for p in players]}; timm's tasks have one optimiser"
        )
    if distiller.gradient_rule(players[0].name) is not None:
        raise InputError(
            f"as_timm_task: {name} combines gradients per term; timm's tasks minimise one sum: turn it off"
        )
    if getattr(distiller, "teacher_cache", None) is not None:
        raise InputError(f"as_timm_task: {name} reads cached teacher outputs by sample index; timm's loaders give none")
    _match_normalisation(distiller)
    return DistillerTask(distiller, epochs=epochs, steps_per_epoch=steps_per_epoch, device=device, dtype=dtype)


def _match_normalisation(distiller: Distiller) -> None:
    student = distiller.deployed()
    if not getattr(student, "pretrained_cfg", None):
        return
    wanted = _statistics(student)
    for name, network in list(distiller.named_children()):
        if not is_frozen(network) or not getattr(network, "pretrained_cfg", None):
            continue
        own = _statistics(network)
        if own != wanted:
            behind = Adapted(network, *wanted, own_mean=own[0], own_std=own[1])
            setattr(distiller, name, freeze(behind))


def _statistics(network: nn.Module) -> tuple[list[float], list[float]]:
    """Mean and deviation of a timm network, one value a channel; grey images get the mean of the colours' values."""
    channels = int(getattr(network, "in_chans", None) or network.pretrained_cfg["input_size"][0])
    given = [list(network.pretrained_cfg[name]) for name in ("mean", "std")]
    mean, std = ([sum(values) / len(values)] * channels if len(values) != channels else values for values in given)
    return mean, std
