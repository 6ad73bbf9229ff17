"""Where a teacher's signal comes from: a model beside the student, a cache on disk, the student without adapters.

A source gives, for the rows of a batch that predict a label, either the teacher's own rows and head (`DenseSignal`; its
logits are only ever made in chunks, inside the loss) or its k most probable tokens (`TopK`). A served teacher is in
`kd_llm.integrations.served`.

Cache (`write_cache`): one entry per example, key = `example` (its row in the data set), value = the top-k of every row
that predicts a label, in order; bound to the teacher's weights and to the token ids by their hashes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from kd_llm.engine import rows as r
from kd_llm.engine.heads import base_model, head_of
from kd_llm.engine.token_loss import DenseSignal, Signal
from kdcore.distiller import freeze
from kdcore.errors import InputError
from kdcore.gpu import TeacherCache, TopK

if TYPE_CHECKING:
    from kd_llm.engine.objective import DivergenceArgs, HiddenRows

Batch = Mapping[str, Any]


class TeacherSource(Protocol):
    """What `TokenObjective` needs of a teacher."""

    @property
    def num_outputs(self) -> int:
        """The size of its vocabulary."""
        ...

    def prepare(self, student: nn.Module) -> None:
        """Once, before training: to the student's device. InputError on a mismatch."""

    def check(self, args: DivergenceArgs) -> None:
        """InputError for a divergence that this source cannot give the signal for."""

    def signal(self, batch: Batch, rows: HiddenRows) -> Signal:
        """The teacher's view of the rows `rows.index` of the batch, without gradient."""
        ...


class LocalTeacher:
    """A frozen model beside the student: evaluation mode, no gradient, its head multiplies predicting rows alone."""

    def __init__(self, model: nn.Module):
        self.model = freeze(model)

    @property
    def num_outputs(self) -> int:
        head = head_of(self.model)
        if head.linear:
            return len(head.weight)
        return int(base_model(self.model).config.get_text_config(decoder=True).vocab_size)

    def prepare(self, student: nn.Module) -> None:
        device = next(student.parameters()).device
        if getattr(self.model, "quantization_method", None) is None and not hasattr(self.model, "hf_device_map"):
            self.model.to(device)
        ours, theirs = r.shifts_labels(student), r.shifts_labels(self.model)
        if ours != theirs:
            kinds = {True: "a decoder, whose rows predict the next token", False: "one whose rows predict their own"}
            raise InputError(f"teacher: {kinds[theirs]}, allowed: as the student, {kinds[ours]}")

    def check(self, args: DivergenceArgs) -> None:
        """Every divergence works."""

    def signal(self, batch: Batch, rows: HiddenRows) -> DenseSignal:
        return self.run(batch, rows)[0]

    def run(self, batch: Batch, rows: HiddenRows, **inputs: Any) -> tuple[DenseSignal, Any]:
        """The signal and the body's output; `inputs` as output_hidden_states=True go to the teacher."""
        from kd_llm.engine.objective import run_body

        with torch.no_grad():
            found = run_body(self.model, batch, rows.index, r.shifts_labels(self.model), **inputs)
        return _dense(found), found.output


def _dense(found: HiddenRows) -> DenseSignal:
    if not found.head.linear:
        return DenseSignal(found.hidden, None)
    weight, bias = found.head.weight.detach(), found.head.bias
    return DenseSignal(found.hidden.detach(), weight, None if bias is None else bias.detach(), found.head.spec)


class AdapterOffTeacher(LocalTeacher):
    """The student itself without its adapters: self-distillation from the base model without a second copy of it."""

    def __init__(self, student: nn.Module):
        if not hasattr(student, "disable_adapter"):
            raise InputError(f"teacher: {type(student).__name__} has no adapters to switch off, allowed: a peft model")
        self.model = student

    def prepare(self, student: nn.Module) -> None:
        if student is not self.model:
            raise InputError("teacher: another peft model than the student, allowed: the student itself")

    def run(self, batch: Batch, rows: HiddenRows, **inputs: Any) -> tuple[DenseSignal, Any]:
        from kd_llm.engine.objective import run_body

        # Inside the student's forward pass its own `forward` is the objective: call the class's.
        forward = type(self.model).forward.__get__(self.model)
        training = {name: part.training for name, part in self.model.named_modules()}
        self.model.eval()
        try:
            with torch.no_grad(), self.model.disable_adapter():
                shift = r.shifts_labels(self.model)
                found = run_body(self.model, batch, rows.index, shift, forward, **inputs)
                return _dense(found), found.output
        finally:
            for name, part in self.model.named_modules():
                part.training = training[name]


class CachedTeacher:
    """The top-k of a finished cache; no teacher in memory.

    `teacher` (the model, its state dict or its fingerprint) and `data` (`data_identity(...)`) are what the run has;
    None leaves that check out. `verify` reads the whole cache and compares SHA-256.
    Raises: InputError for a foreign, unfinished, damaged or stale cache.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        teacher: nn.Module | Mapping[str, Tensor] | str | None = None,
        data: str | None = None,
        verify: bool = False,
    ):
        self.cache = TeacherCache.open(folder, teacher=teacher, data=data, verify=verify)
        header = self.cache.header
        if header["kind"] != "topk" or not header["sequences"]:
            given = f"{header['kind']}, {'sequences' if header['sequences'] else 'single rows'}"
            raise InputError(f"cache {folder}: given {given}, allowed: topk of sequences, as `kd cache` writes it")

    @property
    def num_outputs(self) -> int:
        return self.cache.header["num_outputs"]

    def prepare(self, student: nn.Module) -> None:
        """Nothing is on a device."""

    def check(self, args: DivergenceArgs) -> None:
        require_forward(args, f"cache {self.cache.folder}")

    def signal(self, batch: Batch, rows: HiddenRows) -> TopK:
        if "example" not in batch:
            raise InputError("batch: no 'example' column, which is the key of the teacher cache")
        keys, counts = batch["example"].tolist(), rows.index[:, 0].bincount(minlength=len(batch["example"])).tolist()
        used = [(key, count) for key, count in zip(keys, counts, strict=True) if count]
        lengths = self.cache.lengths([key for key, _ in used]) if used else []
        for (key, count), length in zip(used, lengths, strict=True):
            if count != length:
                raise InputError(
                    f"cache {self.cache.folder}: example {key} has {length} rows there and {count} in the batch; it "
                    "was written for other texts, another length or another tokenizer"
                )
        if not used:
            k = self.cache.header["k"]
            return TopK(torch.zeros(0, k, dtype=torch.int64), torch.zeros(0, k), torch.zeros(0))
        return self.cache[[key for key, _ in used]].to(rows.hidden.device)


def require_forward(args: DivergenceArgs, where: str) -> None:
    """Top-k signals give the forward KL alone: the others need the teacher's probability of every token."""
    if args.divergence != "forward":
        raise InputError(f"divergence: given {args.divergence!r}, allowed with {where}: 'forward' (top-k)")


# ---------------------------------------------------------------- writing a cache


def data_identity(batches: Iterable[Batch]) -> str:
    """Hash of examples, token ids and labels in their order: what a cache is checked against besides the teacher."""
    from kdcore.gpu import data_fingerprint

    parts = []
    for batch in batches:
        mask = batch.get("attention_mask")
        for i, example in enumerate(batch["example"].tolist()):
            kept = slice(None) if mask is None else mask[i].bool()
            parts.append([example, batch["input_ids"][i][kept], batch["labels"][i][batch["labels"][i] != r.IGNORE]])
    return data_fingerprint(*sorted(parts, key=lambda part: part[0]))


def write_cache(
    folder: str | Path,
    teacher: nn.Module,
    batches: Callable[[], Iterable[Batch]],
    *,
    k: int = 64,
    shard_size: int = 256,
    chunk_bytes: int = 2**28,
) -> dict[str, Any]:
    """The teacher's top-k on every predicting row, for `CachedTeacher`; goes on where a killed one stopped.

    `batches()` starts a pass over the data: dicts of input_ids, attention_mask, labels, example; each example once, no
    packing. Returns counts: examples, rows, k, bytes, folder. Raises: InputError for a folder of another cache.
    """
    from kdcore.gpu import module_fingerprint

    source, folder = LocalTeacher(teacher), Path(folder)
    device, shift, num_outputs = next(teacher.parameters()).device, r.shifts_labels(teacher), source.num_outputs
    if not 1 <= k <= num_outputs:
        raise InputError(f"k: given {k}, allowed: 1 to the teacher's {num_outputs} outputs")
    rows = 0
    with TeacherCache.create(
        folder,
        kind="topk",
        num_outputs=num_outputs,
        teacher=module_fingerprint(teacher),
        data=data_identity(batches()),
        k=k,
        sequences=True,
        shard_size=shard_size,
    ) as writer:
        for batch in batches():
            if "position_ids" in batch:
                raise InputError("batch: packed (position_ids), allowed: one example per row")
            found = r.predicted(batch, shift).nonzero()
            rows += len(found)
            keys = batch["example"].tolist()
            new = torch.tensor([key not in writer for key in keys])
            if bool(new.any()):
                part = {key: value[new].to(device) for key, value in batch.items() if isinstance(value, Tensor)}
                _write(writer, source, part, shift, max(1, chunk_bytes // (4 * num_outputs)))
    size = sum(path.stat().st_size for path in folder.iterdir())
    return {"examples": len(writer), "rows": rows, "k": k, "bytes": size, "folder": str(folder)}


def _write(writer: Any, source: LocalTeacher, batch: Batch, shift: bool, chunk: int) -> None:
    from kd_llm.engine.objective import run_body

    index = r.predicted(batch, shift).nonzero()
    if not len(index):
        return
    with torch.no_grad():
        found = run_body(source.model, batch, index, shift)
        k = writer.header["k"]
        tops = [TopK.from_logits(_logits(found, rows), k) for rows in found.hidden.split(chunk)]
    ids, logp, missing = (torch.cat([getattr(top, x) for top in tops]) for x in ("ids", "logp", "log_missing"))
    lengths = index[:, 0].bincount(minlength=len(batch["example"])).tolist()
    parts = zip(batch["example"].tolist(), ids.split(lengths), logp.split(lengths), missing.split(lengths), strict=True)
    kept = [(key, TopK(*top)) for key, *top in parts if len(top[0])]
    writer.add_topk([key for key, _ in kept], [top for _, top in kept])


def _logits(found: HiddenRows, rows: Tensor) -> Tensor:
    return (found.head.logits(rows) if found.head.linear else rows).float()
