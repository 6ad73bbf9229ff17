"""RoutedPipeline: a bundle of pipelines, each for its own part of the conditions, behind one call.

    bundle/router.json, router.safetensors, student_0/, student_1/, ..

Each student is a stock diffusers pipeline that loads alone, without this package; `RoutedPipeline` adds the routing and
loads a student when it is first needed, so that a sample costs one network. Students that were trained apart become one
bundle by `join_bundles`.
"""

from __future__ import annotations

import inspect
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from kd_diffusion import evaluation as ev
from kd_diffusion.engine.conditions import Condition, take
from kd_diffusion.engine.rollout import start_noise
from kd_diffusion.integrations.pipelines import Opened, open_pipeline
from kdcore.errors import InputError

ROUTER = "router"
PER_SAMPLE = ("class_labels", "prompt", "negative_prompt", "generator", "latents")


@dataclass
class Router:
    """Condition -> student. Either a table of classes, or a tree of median splits of pooled prompt embeddings.

    table: (num_classes,) int64, the student of each class.
    directions: (levels, D) float64, one direction per level of the tree; thresholds: (2^levels - 1,), node by node.
    Neither: one student serves everything. Raises InputError where they do not fit `count`.
    """

    count: int
    table: Tensor | None = None
    directions: Tensor | None = None
    thresholds: Tensor | None = None

    def __post_init__(self) -> None:
        if self.table is not None:
            fits = bool(((self.table >= 0) & (self.table < self.count)).all())
        elif self.directions is not None and self.thresholds is not None:
            fits = 2 ** len(self.directions) == self.count == len(self.thresholds) + 1
        else:
            fits = self.count == 1
        if not fits:
            raise InputError(f"router: its table or tree does not fit {self.count} students")

    def route(self, condition: Condition) -> Tensor:
        """The student of each sample, int64 (B,). InputError for a class outside the table, such as that of none."""
        if self.table is not None:
            labels = condition["class_labels"].cpu()
            if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(self.table):
                raise InputError(
                    f"class_labels: {int(labels.min())} to {int(labels.max())}; students serve 0 to "
                    f"{len(self.table) - 1} (the class of none has no student)"
                )
            return self.table[labels]
        if self.count == 1:
            return torch.zeros(len(next(iter(condition.values()))), dtype=torch.int64)
        return self.walk(pooled(condition).cpu())

    def walk(self, embeddings: Tensor) -> Tensor:
        """The leaf of each pooled embedding (B, D), int64 (B,)."""
        assert self.directions is not None
        assert self.thresholds is not None
        node = torch.zeros(len(embeddings), dtype=torch.int64)
        for level, direction in enumerate(self.directions):
            first = 2**level - 1
            right = (embeddings.double() @ direction) > self.thresholds[first + node]
            node = 2 * node + right.long()
        return node

    def tensors(self) -> dict[str, Tensor]:
        found = {"table": self.table, "directions": self.directions, "thresholds": self.thresholds}
        return {name: value.contiguous() for name, value in found.items() if value is not None}

    def same_as(self, other: Router) -> bool:
        """Whether every condition goes to the same student."""
        own, its = self.tensors(), other.tensors()
        return self.count == other.count and own.keys() == its.keys() and all(own[n].equal(its[n]) for n in own)

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        if self.tensors():
            save_file(self.tensors(), folder / f"{ROUTER}.safetensors")
        record = json.dumps({"students": self.count}, indent=2)
        (folder / f"{ROUTER}.json").write_text(record + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path | str, *, field: str = "bundle") -> Router:
        """Raises InputError that names `field` for a folder without a readable router."""
        folder = Path(folder)
        try:
            record = json.loads((folder / f"{ROUTER}.json").read_text(encoding="utf-8"))
            file = folder / f"{ROUTER}.safetensors"
            return cls(int(record["students"]), **(load_file(file) if file.is_file() else {}))
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise InputError(f"{field} = '{folder}': no router could be read ({error})") from None


def pooled(condition: Condition) -> Tensor:
    """(B, D): the pooled embedding of the text encoder where the condition has it, else the mean over the prompt's
    tokens: without padding where there is a mask, over the encoder's whole length where there is none (CLIP)."""
    if "pooled_embeds" in condition:
        return condition["pooled_embeds"]
    embeds = condition["prompt_embeds"].float()
    mask = condition.get("prompt_mask")
    if mask is None:
        return embeds.mean(1)
    weight = mask.to(embeds.dtype)[..., None]
    return (embeds * weight).sum(1) / weight.sum(1).clamp_min(1)


# ---------------------------------------------------------------- bundles


def link_or_copy(source: Any, target: Any) -> Any:
    """A hard link where the file system has them: the same file twice, and room for one. For `shutil.copytree`."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
    return target


def write_bundle(folder: Path, router: Router, students: dict[int, Path]) -> None:
    """`folder` with the router and these students' pipelines; what was there before is replaced."""
    shutil.rmtree(folder, ignore_errors=True)
    router.save(folder)
    for index, source in students.items():
        shutil.copytree(source, folder / f"student_{index}", copy_function=link_or_copy)


def students_in(bundle: Path) -> dict[int, Path]:
    """Number -> folder of the students that a bundle holds."""
    found = {path.name.removeprefix("student_"): path for path in Path(bundle).glob("student_*")}
    return {int(number): path for number, path in sorted(found.items()) if number.isdigit()}


def join_bundles(bundles: Sequence[Path | str], target: Path | str) -> None:
    """One bundle of the students of several, which must have the same router.

    Raises InputError for another router, a student that two of them hold, or a target that exists.
    """
    target = Path(target)
    if target.exists():
        raise InputError(f"target '{target}': exists already; give a new folder")
    if not bundles:
        raise InputError("bundles: none given")
    router, students = Router.load(bundles[0]), {}
    for bundle in map(Path, bundles):
        if not router.same_as(Router.load(bundle)):
            raise InputError(f"bundle '{bundle}': its router is not that of '{bundles[0]}'")
        for index, path in students_in(bundle).items():
            if index in students:
                raise InputError(f"bundle '{bundle}': student {index} is in '{students[index].parent}' too")
            students[index] = path
    write_bundle(target, router, students)


class RoutedPipeline:
    """`RoutedPipeline.from_pretrained(bundle)(class_labels=[..])` or `(prompt=[..])`, images in the order asked for.

    Keyword arguments go to the students' own pipelines, whose `kd.json` gives the number of steps and the guidance
    scale where the caller does not. `latents`, and lists of `generator` or `negative_prompt`, follow the samples; a
    single `generator` is drawn from student by student. `loaded` holds the students that calls have needed so far.
    """

    def __init__(self, folder: Path | str, router: Router, **load_options: Any):
        self.folder, self.router, self.load_options = Path(folder), router, load_options
        self.loaded: dict[int, Any] = {}
        self._device: Any = None
        self._conditioner: Any = None

    @classmethod
    def from_pretrained(cls, folder: Path | str, **load_options: Any) -> RoutedPipeline:
        """Reads the router; `load_options` go to `DiffusionPipeline.from_pretrained` of each student."""
        return cls(folder, Router.load(folder), **load_options)

    def to(self, device: Any) -> RoutedPipeline:
        """Moves the students, also those that are loaded later."""
        self._device = device
        for pipe in self.loaded.values():
            pipe.to(device)
        if self._conditioner is not None:
            self._conditioner.to(device)
        return self

    def student(self, index: int) -> Any:
        """The pipeline of a student, loaded once. InputError where the bundle does not hold it."""
        if index not in self.loaded:
            from diffusers import DiffusionPipeline

            folder = self.folder / f"student_{index}"
            if not folder.is_dir():
                raise InputError(f"bundle '{self.folder}': student {index} of {self.router.count} is not in it")
            pipe = DiffusionPipeline.from_pretrained(folder, use_safetensors=True, **self.load_options)
            pipe.set_progress_bar_config(disable=True)
            self.loaded[index] = pipe if self._device is None else pipe.to(self._device)
        return self.loaded[index]

    def route(self, *, class_labels: Sequence[int] | None = None, prompt: Sequence[str] | None = None) -> list[int]:
        """The student of each condition. InputError unless the conditions are of the kind the router knows."""
        if (class_labels is None) == (prompt is None):
            raise InputError("RoutedPipeline: give either class_labels or prompt")
        by_class = self.router.table is not None
        if by_class != (class_labels is not None) and self.router.count > 1:
            raise InputError(f"RoutedPipeline: its students divide {'classes' if by_class else 'prompts'}; give those")
        values = class_labels if class_labels is not None else prompt
        assert values is not None
        if self.router.count == 1 and not by_class:
            return [0] * len(values)
        if by_class:
            return self.router.route({"class_labels": torch.as_tensor(values, dtype=torch.int64)}).tolist()
        text = self._text()
        tokens = {name: value.to(text._device()) for name, value in text.tokens(list(values)).items()}
        return self.router.route(text.embed(tokens)).tolist()

    def _text(self) -> Any:
        """The text encoder of any student: they share the teacher's."""
        if self._conditioner is None:
            from kd_diffusion.integrations.conditioners import TextConditioner

            available = [*self.loaded, *students_in(self.folder)]
            self._conditioner = TextConditioner(self.student(available[0] if available else 0))
        return self._conditioner

    def __call__(
        self,
        *,
        class_labels: int | Sequence[int] | None = None,
        prompt: str | Sequence[str] | None = None,
        **options: Any,
    ) -> Any:
        """The students' images (`.images`, a list, an array or a tensor) in the order of the conditions."""
        from diffusers import ImagePipelineOutput

        prompts = [prompt] if isinstance(prompt, str) else prompt
        labels = [class_labels] if isinstance(class_labels, int) else class_labels
        name, values = ("prompt", prompts) if prompts is not None else ("class_labels", labels)
        places = self.route(class_labels=labels, prompt=prompts)
        if options.get("num_images_per_prompt", 1) != 1:
            raise InputError("num_images_per_prompt: one image a condition; repeat the prompt instead")
        assert values is not None
        images: list[Any] = [None] * len(places)
        for index in sorted(set(places)):
            own = [place for place, chosen in enumerate(places) if chosen == index]
            arguments = self._arguments(index, {name: values, **options}, own, len(places))
            for place, image in zip(own, self.student(index)(**arguments).images, strict=True):
                images[place] = image
        return ImagePipelineOutput(images=_stacked(images))

    def _arguments(self, index: int, options: dict[str, Any], own: list[int], count: int) -> dict[str, Any]:
        """A student's share of the arguments of a call on `count` conditions."""
        shares = {n: _share(value, own, count) if n in PER_SAMPLE else value for n, value in options.items()}
        known = set(inspect.signature(self.student(index).__call__).parameters)
        notes = self.folder / f"student_{index}" / "kd.json"
        defaults = json.loads(notes.read_text(encoding="utf-8")) if notes.is_file() else {}
        names = known & {"num_inference_steps", "guidance_scale"}
        found = {name: defaults[name] for name in names if name in defaults} | shares
        return found | ({"batch_size": len(own)} if "class_labels" in options and "batch_size" in known else {})


def _share(value: Any, own: list[int], count: int) -> Any:
    """The entries of the samples `own` where there is one a sample, else the value."""
    if isinstance(value, Tensor | np.ndarray) and value.ndim > 0 and len(value) == count:
        return value[own]
    if isinstance(value, list | tuple) and len(value) == count:
        return [value[place] for place in own]
    return value


def _stacked(images: list[Any]) -> Any:
    """One array or tensor where the images are those, else the list."""
    if images and isinstance(images[0], np.ndarray):
        return np.stack(images)
    return torch.stack(images) if images and isinstance(images[0], Tensor) else images


# ---------------------------------------------------------------- evaluation


def routed_function(bundle: Path, teacher: Opened) -> ev.Generate:
    """The bundle's sampler: the noise of a batch is drawn once, each sample goes to its own student."""
    router = Router.load(bundle)
    students: dict[int, Opened] = {}

    def student(k: int) -> Opened:
        if k not in students:
            folder = bundle / f"student_{k}"
            if not folder.is_dir():
                raise InputError(f"student {k}: not trained in this run (only = ..), so there is no evaluation")
            students[k] = open_pipeline(folder)
            students[k].denoiser.eval()
        return students[k]

    @torch.no_grad()
    def function(condition: Condition, draw: Any) -> Tensor:
        places, z = router.route(condition), draw.normal((draw.count, *teacher.space.shape))
        x = torch.empty_like(z)
        for k in places.unique().tolist():
            own, mask = student(k), (places == k).to(z.device)
            t = own.process.at(torch.full((int(mask.sum()),), own.process.size - 1, device=z.device))
            denoiser = own.denoiser.to(z.device)
            x[mask] = denoiser(start_noise(own.process, z[mask], t), t, take(condition, mask))
        return x

    return function
