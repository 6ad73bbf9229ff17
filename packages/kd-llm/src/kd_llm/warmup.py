"""A student from scratch that is trained before a method begins: on the data's own answers, once, then from the cache.

Its folder is the artefact `base`. A student with weights of its own is saved there as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field

from kd_llm import __version__
from kd_llm.engine.passrate import with_completion
from kd_llm.engine.problems import Problems, problems_of
from kd_llm.integrations.stage import LMSetup, TransformersStage
from kd_llm.runs import Prepared, Run, make_setup, open_student, supervised
from kdcore.config import Config, TrainConfig
from kdcore.errors import InputError, did_you_mean
from kdcore.stages import Artefacts, CachedStage, Procedure, RunContext, Stage


class WarmupConfig(Config):
    """Training of the student on the data's own solutions before anything is measured, for a student from scratch."""

    train: TrainConfig = Field(description="budget")
    domains: list[str] | None = Field(None, description="domains it sees; None: all")
    hints: float = Field(0.0, ge=0, le=1, description="share of problems that show the solution (variant: self)")

    def check(self, domains: Sequence[str], field: str) -> None:
        """InputError where `domains` of the config are not among the data's."""
        for domain in self.domains or ():
            if domain not in domains:
                known = did_you_mean(domain, domains)
                raise InputError(f"{field}.domains: '{domain}' is not among the data's domains{known}")


def base_stage(config: Run, prepared: Prepared, warmup: WarmupConfig | None, template: str | None = None) -> Stage:
    """Gives the artefact `base`, a model folder without adapters. `template` is what `warmup.hints` show."""
    plain = config.model_copy(update={"student": config.student.model_copy(update={"adapters": None})})

    def save(context: RunContext) -> Artefacts:
        folder = context.folder / "base"
        if context.is_main:
            open_student(plain, prepared, context.artefacts).save_pretrained(folder)
        context.accelerator.wait_for_everyone()
        return {"base": folder}

    if warmup is None:
        return Procedure("base", save)
    settings, seen = warmup, template if warmup.hints else None

    def setup(context: RunContext) -> LMSetup:
        rows = warmup_rows(config, prepared, context.artefacts, settings, seen)
        student = open_student(plain, prepared, context.artefacts)
        return make_setup(config, prepared, context, student, supervised(config), dataset=rows)

    values = config.model_dump(mode="json")
    names = ["task", "tokenizer", "student", "data", "seed", *(["teacher"] if config.student.cut else [])]
    identity = {
        "version": __version__,
        "torch": torch.__version__,
        "contents": prepared.data.digest(),
        "warmup": warmup.model_dump(mode="json"),
        "template": seen,
        **{name: values[name] for name in names},
    }
    return CachedStage(TransformersStage("base", warmup.train, setup, artefact="base"), identity)


def warmup_rows(
    config: Run, prepared: Prepared, artefacts: Artefacts, warmup: WarmupConfig, template: str | None
) -> list[dict[str, Any]]:
    """The data's problems with their answers; a share of them, drawn by the seed, shows the answer in the prompt."""
    data, tokenizer = prepared.data, prepared.tokenizer(artefacts)
    problems = problems_of(data.train, tokenizer, config.data.length, template=template)
    if problems.shown is not None:
        draw = torch.rand(len(problems), generator=torch.Generator().manual_seed(config.seed)).tolist()
        pairs = zip(problems.prompts, problems.shown, draw, strict=True)
        prompts = [shown if u < warmup.hints else prompt for prompt, shown, u in pairs]
        problems = Problems(prompts, problems.answers, problems.domains)
    ids = tokenizer(problems.answers, add_special_tokens=False)["input_ids"]
    answers = zip(problems.prompts, ids, strict=True)
    rows = problems.rows([with_completion(prompt, [*own, tokenizer.eos_token_id], True) for prompt, own in answers])
    kept = None if warmup.domains is None else {data.domains.index(name) for name in warmup.domains}
    return [row for row in rows if kept is None or row["domain"] in kept]
