"""Networks of mmdet3d from stock config dicts and checkpoints, and students as stock checkpoints.

A saved network is a folder with `config.py`, a config of the network and of the data set that its inference reads, and
`model.pth`, its state dict and meta of plain types: `mmdet3d.apis.init_model(folder / "config.py", folder /
"model.pth")` opens it. One with detectors or transforms of this package also holds these two files, under
`kd_detection3d/integrations/`, which is all that it needs of it: the folder goes on the Python path.
"""

from __future__ import annotations

import copy
import pprint
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import mmdet3d
import mmengine
import torch
from mmdet3d.registry import MODELS
from mmengine.config import Config
from mmengine.registry import init_default_scope
from torch import nn

from kd_detection3d.integrations import detectors, transforms
from kdcore.distiller import freeze
from kdcore.errors import InputError
from kdcore.state_files import load_strictly, plain

CONFIG, WEIGHTS = "config.py", "model.pth"
OURS = (detectors, transforms)
"""Files of this package that a saved network may need; they stand on mmdet3d alone."""


def build(config: Mapping[str, Any], field: str) -> nn.Module:
    """The detector of a stock config dict. Raises InputError that names the config's field."""
    init_default_scope("mmdet3d")
    if "type" not in config:
        raise InputError(f"{field}: expected a network's config with a 'type', got the keys {', '.join(config)}")
    try:
        return MODELS.build(Config(copy.deepcopy(dict(config)))._cfg_dict)
    except (KeyError, TypeError, ValueError, AssertionError, RuntimeError, FileNotFoundError, AttributeError) as error:
        raise InputError(f"{field}: the network cannot be built ({' '.join(str(error).split())})") from None


def class_names(network: nn.Module) -> list[str] | None:
    """The classes of a detector's centre-based head, in the order of its labels; None where it has none."""
    tasks = getattr(getattr(network, "pts_bbox_head", None), "class_names", None)
    return None if tasks is None else [name for task in tasks for name in task]


def sensors(network: nn.Module) -> set[str]:
    """What a detector reads: points, img."""
    found = {"points"} if getattr(network, "pts_voxel_encoder", None) is not None else set()
    return found | ({"img"} if getattr(network, "img_backbone", None) is not None else set())


# ---------------------------------------------------------------- teachers


def build_teacher(config: Mapping[str, Any], field: str) -> nn.Module:
    """The frozen teacher of `dict(model=..., checkpoint=...)`; `config=` names a stock config file instead of `model`.

    Raises InputError: no weights, a file that is not there, a checkpoint of another network.
    """
    allowed = {"model", "config", "checkpoint"}
    for key in config:
        if key not in allowed:
            raise InputError(f"{field}.{key}: unknown; allowed: {', '.join(sorted(allowed))}")
    if not config.get("checkpoint"):
        raise InputError(
            f"{field}.checkpoint: the teacher has no weights; give a checkpoint, or train it by `kd train`"
        )
    network = build(without_initialisation(teacher_model(config, field)), field)
    load_strictly(network, config["checkpoint"], f"{field}.checkpoint")
    return freeze(network)


def teacher_model(config: Mapping[str, Any], field: str) -> dict[str, Any]:
    """The network's config dict of a teacher's section."""
    if ("model" in config) == ("config" in config):
        raise InputError(f"{field}: give one of model (a stock config dict) and config (a stock config file)")
    return dict(config["model"]) if "model" in config else model_of(config["config"], f"{field}.config")


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
        if kept.get("pretrained"):
            kept["pretrained"] = None
        return kept
    if isinstance(config, list | tuple):
        return type(config)(without_initialisation(value) for value in config)
    return config


# ---------------------------------------------------------------- saving


def save(
    folder: Path,
    network: nn.Module,
    model: Mapping[str, Any],
    dataset: Mapping[str, Any],
    *,
    dataset_meta: Mapping[str, Any] | None = None,
) -> None:
    """Writes the network as a stock checkpoint and config.

    model: the network's config dict. dataset: the config of a stock data set, with the pipeline that
    `mmdet3d.apis.inference_detector` runs. dataset_meta: at least `classes`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    meta = {"mmdet3d_version": mmdet3d.__version__, "mmengine_version": mmengine.__version__}
    if dataset_meta is not None:
        meta["dataset_meta"] = {
            name: plain(dataset_meta[name]) for name in ("classes", "palette") if name in dataset_meta
        }
    weights = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in network.state_dict().items()}
    torch.save({"state_dict": weights, "meta": meta}, folder / WEIGHTS)
    sections: dict[str, Any] = {
        "default_scope": "mmdet3d",
        "model": without_initialisation(model),
        "test_dataloader": {"dataset": dict(dataset)},
    }
    needed = [module for module in OURS if uses(module, [model, dataset])]
    if needed:
        sections["custom_imports"] = {"imports": [module.__name__ for module in needed], "allow_failed_imports": False}
    for module in needed:
        target = folder.joinpath(*module.__name__.split(".")).with_suffix(".py")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(str(module.__file__), target)
    text = "\n".join(
        f"{name} = {pprint.pformat(plain_config(value), width=110, sort_dicts=False)}"
        for name, value in sections.items()
    )
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")


def plain_config(value: Any) -> Any:
    """mmengine's own mappings as dicts, tuples kept."""
    if isinstance(value, Mapping):
        return {key: plain_config(item) for key, item in value.items()}
    return type(value)(plain_config(item) for item in value) if isinstance(value, list | tuple) else value


def uses(module: ModuleType, config: Any) -> bool:
    """Whether a config names a class of a module."""
    if isinstance(config, Mapping):
        kind = config.get("type")
        found = getattr(module, kind, None) if isinstance(kind, str) else None
        ours = getattr(found, "__module__", None) == module.__name__
        return ours or any(uses(module, value) for value in config.values())
    return isinstance(config, list | tuple) and any(uses(module, value) for value in config)


def open_saved(folder: Path, device: str = "cpu") -> nn.Module:
    """The network of a saved folder, as `mmdet3d.apis.init_model` opens it."""
    from mmdet3d.apis import init_model

    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise InputError(f"network '{folder}': {name} is missing")
    return init_model(str(folder / CONFIG), str(folder / WEIGHTS), device=device)
