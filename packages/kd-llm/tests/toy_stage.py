"""A TransformersStage small enough to be killed, resumed and run by two processes in a test; also a script."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import IterableDataset

from kd_llm.engine.objective import DivergenceArgs, TokenObjective
from kd_llm.engine.teachers import LocalTeacher
from kd_llm.integrations.stage import LMSetup, TransformersStage
from kd_llm.testing import collate, examples, tiny_model
from kdcore.accelerator import make_accelerator
from kdcore.config import RunConfig, TrainConfig
from kdcore.stages import RunContext, run_stages


class WithProjection(TokenObjective):
    """Token loss and the distance of the last hidden rows through a trained projection."""

    name = "with_projection"

    def __init__(self, teacher, *, say=False, poison=None, **kwargs):
        super().__init__(teacher, DivergenceArgs(divergence="js", hard_weight=0.5), **kwargs)
        self.auxiliary["projection"] = nn.Linear(16, 24, bias=False)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.say, self.poison = say, poison

    def loss(self, call, batch, items):
        rows = call.hidden_rows(batch)
        signal, _ = self.teacher.run(batch, rows)
        terms = self.token_terms(rows, batch, items)
        distance = F.mse_loss(self.auxiliary["projection"](rows.hidden), signal.hidden_t)
        terms["feature"] = (0.1, distance * self.share(batch, items))
        if self.poison is not None and int(self.steps) == self.poison:
            terms["feature"] = (0.1, terms["feature"][1] * float("nan"))
        return terms

    def on_step_end(self, trainer):
        self.steps += 1
        if self.say:
            print("step", int(self.steps), flush=True)


class Stream(IterableDataset):
    """Examples without a length."""

    def __iter__(self):
        return iter(examples(36))


def data_set(kind):
    if kind == "hugging face":
        from datasets import Dataset

        return Dataset.from_list(examples(36))
    return Stream() if kind == "stream" else examples(36)


def run(
    folder: Path,
    *,
    resume=False,
    dropout=0.1,
    quiet=True,
    evaluate=True,
    config=None,
    poison=None,
    say=False,
    data="list",
):
    """Trains the toy into `folder`; returns the stage's artefacts."""
    train = config or TrainConfig(
        steps=24,
        batch_size=4,
        accumulation=2,
        optimizer={"name": "adamw", "lr": 0.01, "eps": 1e-4},  # key biases have no gradient but rounding
        schedule={"name": "cosine", "warmup_epochs": 0.5},
        checkpoint_every=3,
        log_every=5,
        clip=1.0,
        ema={"decay": 0.9},
    )
    folder.mkdir(parents=True, exist_ok=True)
    accelerator = make_accelerator(train, cpu=True, folder=folder)
    context = RunContext(RunConfig(method="toy", train=train), folder, accelerator, resume=resume, quiet=quiet)

    def build(_: RunContext) -> LMSetup:
        drop = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
        student, teacher = tiny_model("gpt2", seed=1, **drop), tiny_model("llama", width=24, seed=2)
        objective = WithProjection(LocalTeacher(teacher), poison=poison, say=say)
        held_out = collate(examples(4, seed=9))

        def measure(model: nn.Module) -> dict[str, float]:
            torch.rand(3)  # a validation that draws must not change the training
            return {"loss": model(**{k: v for k, v in held_out.items() if k != "example"}).loss.item()}

        return LMSetup(student, None, objective, data_set(data), collate, measure if evaluate else None)

    if context.is_main:
        (folder / "processes").write_text(str(accelerator.num_processes))
    return run_stages([TransformersStage("student", train, build)], context)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--say", action="store_true")
    arguments = vars(parser.parse_args())
    torch.set_num_threads(1)
    run(arguments.pop("folder"), **arguments)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
