"""RoutedPipeline: a bundle of pipelines, each for its own part of the conditions, behind one call.

    bundle/router.json (and router.safetensors), student_0/, student_1/, ..

Each student is a stock diffusers pipeline that loads alone; this class adds the routing and loads a student when it is
first needed, so that a call costs one network.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kd_diffusion.engine.conditions import Condition
from kdcore.errors import InputError

ROUTER = "router"


@dataclass
class Router:
    """Condition -> student. Either a table of classes, or a tree of median splits of pooled prompt embeddings.

    table: (num_classes,) int64, the student of each class.
    directions: (levels, D), one direction per level of the tree; thresholds: (2^levels - 1,), node by node.
    """

    count: int
    table: Tensor | None = None
    directions: Tensor | None = None
    thresholds: Tensor | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def route(self, condition: Condition) -> Tensor:
        """The student of each sample, int64 (B,). InputError for a class outside the table."""
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
        return self._walk(pooled(condition).cpu())

    def _walk(self, embeddings: Tensor) -> Tensor:
        assert self.directions is not None
        assert self.thresholds is not None
        node = torch.zeros(len(embeddings), dtype=torch.int64)
        for level, direction in enumerate(self.directions):
            first = 2**level - 1
            right = (embeddings.double() @ direction) > self.thresholds[first + node]
            node = 2 * node + right.long()
        return node

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {"table": self.table, "directions": self.directions, "thresholds": self.thresholds}
        held = {name: value.contiguous() for name, value in tensors.items() if value is not None}
        if held:
            save_file(held, folder / f"{ROUTER}.safetensors")
        record = {"students": self.count, **self.extra}
        (folder / f"{ROUTER}.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path | str) -> Router:
        """Raises InputError for a folder without a readable router."""
        folder = Path(folder)
        try:
            record = json.loads((folder / f"{ROUTER}.json").read_text(encoding="utf-8"))
            file = folder / f"{ROUTER}.safetensors"
            tensors = load_file(file) if file.is_file() else {}
            return cls(int(record.pop("students")), **tensors, extra=record)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"bundle '{folder}': no router could be read ({error})") from None


def pooled(condition: Condition) -> Tensor:
    """(B, D): a prompt's pooled embedding where there is one, else the mean over its tokens without padding."""
    if "pooled_embeds" in condition:
        return condition["pooled_embeds"]
    embeds = condition["prompt_embeds"]
    mask = condition.get("prompt_mask")
    if mask is None:
        return embeds.mean(1)
    weight = mask.to(embeds.dtype)[..., None]
    return (embeds * weight).sum(1) / weight.sum(1).clamp_min(1)


def split_classes(num_classes: int, count: int, order: Sequence[int] | None = None) -> Router:
    """Consecutive classes (in `order`), parts whose sizes differ by one at most.

    >>> [split_classes(n, k).table.bincount().tolist() for n, k in ((10, 4), (1000, 3))]
    [[3, 3, 2, 2], [334, 333, 333]]
    """
    if not 1 <= count <= num_classes:
        raise InputError(f"students = {count}: allowed 1 to the {num_classes} classes")
    table = torch.empty(num_classes, dtype=torch.int64)
    classes = np.arange(num_classes) if order is None else np.asarray(order)
    for student, part in enumerate(np.array_split(classes, count)):
        table[torch.from_numpy(part)] = student
    return Router(count, table=table)


def split_embeddings(embeddings: Tensor, count: int, generator: torch.Generator | None = None) -> Router:
    """Median splits along the first log2(count) principal directions (random ones with a generator), so that the parts
    have equal sizes by construction; embeddings (N, D)."""
    levels = count.bit_length() - 1
    if count < 1 or 2**levels != count or count > len(embeddings):
        raise InputError(f"students = {count}: for prompts a power of two, at most the {len(embeddings)} prompts")
    if count == 1:
        return Router(1)
    x = embeddings.double()
    if generator is None:
        _, _, components = torch.linalg.svd(x - x.mean(0), full_matrices=False)
        directions = components[:levels]
    else:
        directions = torch.randn(levels, x.shape[1], generator=generator, dtype=torch.float64)
    thresholds = torch.zeros(2**levels - 1, dtype=torch.float64)
    node = torch.zeros(len(x), dtype=torch.int64)
    for level, direction in enumerate(directions):
        values, first = x @ direction, 2**level - 1
        for part in range(2**level):
            own = values[node == part].sort().values
            thresholds[first + part] = (own[(len(own) - 1) // 2] + own[len(own) // 2]) / 2 if len(own) else 0.0
        node = 2 * node + (values > thresholds[first + node]).long()
    return Router(count, directions=directions.contiguous(), thresholds=thresholds)


class RoutedPipeline:
    """`RoutedPipeline.from_pretrained(bundle)(class_labels=[..])` or `(prompt=[..])`, images in the order asked for.

    Keyword arguments go to the students' own pipelines; `generator` may be a list, one per sample. `loaded` names the
    students that calls have needed so far.
    """

    def __init__(self, folder: Path | str, router: Router, **load_options: Any):
        self.folder, self.router, self.load_options = Path(folder), router, load_options
        self.loaded: dict[int, Any] = {}
        self._conditioner: Any = None

    @classmethod
    def from_pretrained(cls, folder: Path | str, **load_options: Any) -> RoutedPipeline:
        """Reads the router; `load_options` go to `DiffusionPipeline.from_pretrained` of each student."""
        return cls(folder, Router.load(folder), **load_options)

    def student(self, index: int) -> Any:
        """The pipeline of a student, loaded once. InputError where the bundle does not hold it."""
        if index not in self.loaded:
            from diffusers import DiffusionPipeline

            folder = self.folder / f"student_{index}"
            if not folder.is_dir():
                raise InputError(f"bundle '{self.folder}': student {index} of {self.router.count} is not in it")
            pipe = DiffusionPipeline.from_pretrained(folder, use_safetensors=True, **self.load_options)
            pipe.set_progress_bar_config(disable=True)
            self.loaded[index] = pipe
        return self.loaded[index]

    def route(self, *, class_labels: Sequence[int] | None = None, prompt: Sequence[str] | None = None) -> list[int]:
        """The student of each condition."""
        if (class_labels is None) == (prompt is None):
            raise InputError("RoutedPipeline: give either class_labels or prompt")
        if class_labels is not None:
            return self.router.route({"class_labels": torch.as_tensor(list(class_labels))}).tolist()
        assert prompt is not None
        if self.router.count == 1:
            return [0] * len(prompt)
        return self.router.route(self._text().embed(self._text().tokens(list(prompt)))).tolist()

    def _text(self) -> Any:
        """The text encoder of any student: they share the teacher's."""
        if self._conditioner is None:
            from kd_diffusion.integrations.conditioners import TextConditioner

            available = sorted(int(path.name.split("_")[1]) for path in self.folder.glob("student_*"))
            self._conditioner = TextConditioner(self.student(available[0]))
        return self._conditioner

    def __call__(
        self,
        *,
        class_labels: Sequence[int] | None = None,
        prompt: str | Sequence[str] | None = None,
        generator: Any = None,
        **options: Any,
    ) -> Any:
        """The students' images (`.images`, a list or an array) in the order of the conditions."""
        from diffusers import ImagePipelineOutput

        prompts = [prompt] if isinstance(prompt, str) else prompt
        name, values = ("prompt", prompts) if prompts is not None else ("class_labels", class_labels)
        places = self.route(class_labels=class_labels, prompt=prompts)
        assert values is not None
        images: list[Any] = [None] * len(places)
        for index in sorted(set(places)):
            own = [place for place, chosen in enumerate(places) if chosen == index]
            pipe = self.student(index)
            arguments = {name: [values[place] for place in own], **options}
            if name == "class_labels" and "batch_size" in _parameters(pipe):
                arguments["batch_size"] = len(own)
            if isinstance(generator, list):
                arguments["generator"] = [generator[place] for place in own]
            elif generator is not None:
                arguments["generator"] = generator
            for place, image in zip(own, pipe(**arguments).images, strict=True):
                images[place] = image
        stacked = np.stack(images) if images and isinstance(images[0], np.ndarray) else images
        return ImagePipelineOutput(images=stacked)


def _parameters(pipe: Any) -> set[str]:
    import inspect

    return set(inspect.signature(pipe.__call__).parameters)
