"""Networks of mmseg from stock config dicts and checkpoints, and students as stock checkpoints.

A saved network is a folder with `config.py`, a stock config of the network alone, and `model.pth`, its state dict and
meta of plain types: `mmseg.apis.init_model(folder / "config.py", folder / "model.pth")` opens it.
"""

from __future__ import annotations

import copy
import io
import pprint
from collections.abc import Iterable, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import mmengine
import mmseg
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmseg.registry import MODELS
from torch import Tensor, nn

from kdcore.distiller import freeze
from kdcore.errors import InputError
from kdcore.state_files import load_strictly, plain

CONFIG, WEIGHTS = "config.py", "model.pth"


def build(config: Mapping[str, Any], field: str) -> nn.Module:
    """The segmentor of a stock config dict. Raises InputError that names the config's field."""
    init_default_scope("mmseg")
    if "type" not in config:
        raise InputError(f"{field}: expected a network's config with a 'type', got the keys {', '.join(config)}")
    try:
        return MODELS.build(Config(dict(copy.deepcopy(dict(config))))._cfg_dict)
    except (KeyError, TypeError, ValueError, AssertionError, RuntimeError, FileNotFoundError) as error:
        raise InputError(f"{field}: the network cannot be built ({' '.join(str(error).split())})") from None


def num_classes(network: nn.Module) -> int | None:
    """Number of classes of a segmentor's decode head; None where it has none."""
    head = getattr(network, "decode_head", None)
    head = head[-1] if isinstance(head, nn.ModuleList) else head
    return getattr(head, "num_classes", None)


# ---------------------------------------------------------------- teachers


class Teacher(nn.Module):
    """A frozen segmentor behind the student's normalisation: `teacher(images) -> logits`, without gradient.

    Images come normalised as the student wants them; where the teacher's own preprocessor differs in mean, std or the
    order of colours, they are changed into what it was trained on.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self, network: nn.Module, student_preprocessor: Mapping[str, Any] | None = None, *, preprocessor: Any = None
    ):
        super().__init__()
        self.network = network
        own = _normalisation(preprocessor or getattr(network, "data_preprocessor", None))
        theirs = _normalisation(student_preprocessor)
        self.flip = own[2] != theirs[2]
        if self.flip:
            theirs = (theirs[0].flip(0), theirs[1].flip(0), own[2])
        self.same = not self.flip and all(torch.allclose(a, b) for a, b in zip(own[:2], theirs[:2]))
        self.register_buffer("scale", (theirs[1] / own[1]).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("shift", ((theirs[0] - own[0]) / own[1]).view(1, -1, 1, 1), persistent=False)
        freeze(self)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        return self.network(self.prepare(images))

    def prepare(self, images: Tensor) -> Tensor:
        """The student's images as the teacher was trained on them."""
        if self.flip:
            images = images.flip(1)
        return images if self.same else images * self.scale + self.shift


def _normalisation(preprocessor: Any) -> tuple[Tensor, Tensor, bool]:
    """(mean, std, whether colours are swapped) of a SegDataPreProcessor or of its config."""
    if preprocessor is None:
        return torch.zeros(3), torch.ones(3), False
    if isinstance(preprocessor, Mapping):
        mean, std = preprocessor.get("mean"), preprocessor.get("std")
        swapped = bool(preprocessor.get("bgr_to_rgb") or preprocessor.get("rgb_to_bgr"))
    else:
        mean, std = getattr(preprocessor, "mean", None), getattr(preprocessor, "std", None)
        swapped = bool(getattr(preprocessor, "channel_conversion", False))
    if mean is None or std is None:
        return torch.zeros(3), torch.ones(3), swapped
    return torch.as_tensor(mean).float().flatten(), torch.as_tensor(std).float().flatten(), swapped


def build_teacher(config: Mapping[str, Any], field: str, student_preprocessor: Mapping[str, Any] | None) -> Teacher:
    """The frozen teacher of `dict(model=..., checkpoint=...)`; `config=` names a stock config file instead of `model`.

    Raises InputError: no weights, a file that is not there, a checkpoint of another network.
    """
    model = teacher_model(config, field)
    if not config.get("checkpoint"):
        raise InputError(
            f"{field}.checkpoint: the teacher has no weights; give a checkpoint, or train it by `kd train`"
        )
    network = build(without_initialisation(model), field)
    load_strictly(network, config["checkpoint"], f"{field}.checkpoint")
    return Teacher(network, student_preprocessor)


def teacher_model(config: Mapping[str, Any], field: str) -> Mapping[str, Any]:
    """The teacher's stock config dict. Raises InputError for other keys, or where not exactly one names a network."""
    allowed = {"model", "config", "checkpoint"}
    for key in config:
        if key not in allowed:
            raise InputError(f"{field}.{key}: unknown; allowed: {', '.join(sorted(allowed))}")
    if ("model" in config) == ("config" in config):
        raise InputError(f"{field}: give one of model (a stock config dict) and config (a stock config file)")
    return config["model"] if "model" in config else model_of(config["config"], f"{field}.config")


def model_of(path: str | Path, field: str) -> dict[str, Any]:
    """The `model` of a stock config file."""
    if not Path(path).is_file():
        raise InputError(f"{field} = '{path}': no such file")
    model = Config.fromfile(path, import_custom_modules=False).get("model")
    if model is None:
        raise InputError(f"{field} = '{path}': has no 'model'")
    return model.to_dict()


def without_initialisation(config: Any) -> Any:
    """A copy of a config without `init_cfg` and `pretrained`: weights come from a checkpoint."""
    if isinstance(config, Mapping):
        skip = {"init_cfg"} if "type" in config else set()
        kept = {key: without_initialisation(value) for key, value in config.items() if key not in skip}
        if isinstance(kept.get("pretrained"), str):
            kept["pretrained"] = None
        if kept.get("pretrained") is True or kept.get("type") == "TIMMBackbone":  # there True is the default
            kept["pretrained"] = False
        return kept
    if isinstance(config, list | tuple):
        return type(config)(without_initialisation(value) for value in config)
    return config


# ---------------------------------------------------------------- saving


def save(
    folder: Path,
    network: nn.Module,
    model: Mapping[str, Any],
    *,
    dataset_meta: Mapping[str, Any] | None = None,
    test_pipeline: Iterable[Mapping[str, Any]] | None = None,
    state: Mapping[str, Tensor] | None = None,
    modules: Sequence[str] = (),
) -> None:
    """Writes the network as a stock checkpoint and config.

    model: the network's config dict. dataset_meta: at least `classes` and `palette`. test_pipeline: what
    `mmseg.apis.inference_model` runs on an image. state: weights in the place of the network's (an average of them).
    modules: what a config with classes from outside mmseg imports.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = network.state_dict() if state is None else state
    meta = {"mmseg_version": mmseg.__version__, "mmengine_version": mmengine.__version__}
    if dataset_meta is not None:
        meta["dataset_meta"] = {
            name: plain(dataset_meta[name]) for name in ("classes", "palette") if name in dataset_meta
        }
    weights = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    torch.save({"state_dict": weights, "meta": meta}, folder / WEIGHTS)
    sections: dict[str, Any] = {"default_scope": "mmseg", "model": without_initialisation(model)}
    if test_pipeline is not None:
        sections["test_pipeline"] = [dict(step) for step in test_pipeline]
    if modules:
        sections["custom_imports"] = {"imports": list(modules), "allow_failed_imports": False}
    text = "\n".join(
        f"{name} = {pprint.pformat(value, width=110, sort_dicts=False)}" for name, value in sections.items()
    )
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")


def open_saved(folder: Path, device: str = "cpu") -> nn.Module:
    """The network of a saved folder, as `mmseg.apis.init_model` opens it."""
    from mmseg.apis import init_model

    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise InputError(f"network '{folder}': {name} is missing")
    with redirect_stdout(io.StringIO()):  # mmengine prints where it loads from
        return init_model(str(folder / CONFIG), str(folder / WEIGHTS), device=device)
