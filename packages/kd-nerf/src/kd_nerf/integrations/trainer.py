"""nerfstudio's Trainer, with checkpoints from which a training goes on bit for bit.

A stock checkpoint has weights, optimisers, schedules and the gradient scaler. What a step draws at random is missing:
here the state of every generator travels with it, and what the pipeline has drawn and not yet used. `--load-dir` of
ns-train and `--resume` of kd train both read it; nerfstudio and stock classes find a checkpoint as they know it.

Exact where the same process would be: same data, config, device and number of threads, and kernels that are
deterministic. With `datamanager.train_num_images_to_sample_from` photographs come in random portions, of which one is
lost.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from nerfstudio.engine.trainer import Trainer, TrainerConfig
from nerfstudio.utils.decorators import check_main_thread

from kdcore.checkpoint import rng_state, set_rng_state
from kdcore.errors import InputError

RANDOM = "random"
"""Key of a checkpoint's generators."""


@dataclass
class ResumableTrainerConfig(TrainerConfig):
    _target: type = field(default_factory=lambda: ResumableTrainer)


class ResumableTrainer(Trainer):
    """Saves and restores generators; the pipeline's own, if any, by its `random_state` and `set_random_state`."""

    _random: dict[str, Any] | None = None

    @check_main_thread
    def save_checkpoint(self, step: int) -> None:
        """Writes `step-<step>.ckpt` in one move, then deletes older ones where the config says so."""
        self.checkpoint_dir.mkdir(parents=True, exist_ok=True)
        path = self.checkpoint_dir / f"step-{step:09d}.ckpt"
        pipeline: Any = self.pipeline
        inner = getattr(pipeline, "module", pipeline)  # of a distributed pipeline
        content = {
            "step": step,
            "pipeline": inner.state_dict(),
            "optimizers": {name: one.state_dict() for name, one in self.optimizers.optimizers.items()},
            "schedulers": {name: one.state_dict() for name, one in self.optimizers.schedulers.items()},
            "scalers": self.grad_scaler.state_dict(),
            RANDOM: {"generators": rng_state(), "pipeline": inner.random_state()},
        }
        temporary = path.with_suffix(".tmp")  # a killed process leaves no broken .ckpt
        torch.save(content, temporary)
        os.replace(temporary, path)
        if self.config.save_only_latest_checkpoint:
            for other in self.checkpoint_dir.glob("*.ckpt"):
                if other != path:
                    other.unlink()

    def _load_checkpoint(self) -> None:
        for leftover in self.checkpoint_dir.glob("*.tmp"):  # nerfstudio reads a step off every file's name
            leftover.unlink()
        super()._load_checkpoint()
        path = self.config.load_checkpoint
        if self.config.load_dir is not None:
            path = Path(self.config.load_dir) / f"step-{self._start_step - 1:09d}.ckpt"
        if path is not None:
            self._random = torch.load(path, map_location="cpu", weights_only=True).get(RANDOM)

    def train(self) -> None:
        """Goes on with the generators of the checkpoint, whatever the set-up has drawn."""
        if self._random is not None:
            pipeline: Any = self.pipeline
            try:
                getattr(pipeline, "module", pipeline).set_random_state(self._random["pipeline"])
                set_rng_state(self._random["generators"])
            except (KeyError, TypeError, ValueError, RuntimeError) as error:
                raise InputError(f"load_dir: the checkpoint's random generators do not fit ({error})") from None
            self._random = None
        self.step = max(0, self._start_step - 1)  # where nothing is left to do
        super().train()
