"""A trained `nerfacto` student as a run of nerfstudio's own method `nerfacto`: config.yml and checkpoint name stock
classes alone, so that eval_setup, ns-viewer, ns-render and ns-eval open it where kd-nerf is not installed.

The field's weights are the student's, under other names. A nerfacto looks for density with a proposal network; here
that is a second copy of the field's own density.
"""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import torch
import yaml
from nerfstudio.cameras.camera_optimizers import CameraOptimizerConfig
from nerfstudio.data.datamanagers.parallel_datamanager import ParallelDataManagerConfig
from nerfstudio.engine.optimizers import AdamOptimizerConfig
from nerfstudio.engine.schedulers import ExponentialDecaySchedulerConfig
from nerfstudio.engine.trainer import TrainerConfig
from nerfstudio.fields.density_fields import HashMLPDensityField
from nerfstudio.models.nerfacto import NerfactoModelConfig
from nerfstudio.pipelines.base_pipeline import VanillaPipelineConfig
from torch import Tensor

from kd_nerf.engine.stock_fields import NerfactoRadiance, density_sizes
from kd_nerf.integrations.model import RadianceModelConfig
from kd_nerf.integrations.teachers import find_checkpoint, own_field, read_state
from kdcore.errors import InputError
from kdcore.stages import replace_folder

RUN_NAME = "nerfstudio"


def export_nerfacto(checkpoint: Path, config: TrainerConfig, target: Path, *, data: Path | None = None) -> Path:
    """Writes `target`/nerfacto/nerfstudio/, a stock nerfacto run, and returns its config.yml.

    Args:
        checkpoint: of a kd-pvd training, or the folder of its run; read by its weights alone.
        config: the training's config, of which data, samples and rays are taken.
        data: what config.yml says of the photographs; None: what `config` says.

    Raises:
        InputError: no such checkpoint, or one whose field is another one than `nerfacto`.
    """
    path = find_checkpoint(checkpoint, "checkpoint")
    state = read_state(path, "checkpoint")
    field = own_field(state)
    if not isinstance(field, NerfactoRadiance):
        name = field.config.architecture
        raise InputError(f"export: student.architecture = '{name}': nerfstudio has no such field; allowed: nerfacto")
    stock = stock_config(config, field, target.name, data)
    content = {"step": int(path.stem.split("-")[1]), "pipeline": stock_state(field)}

    def write(folder: Path) -> None:
        inside = folder / "nerfacto" / RUN_NAME
        (inside / stock.relative_model_dir).mkdir(parents=True)
        torch.save(content, inside / stock.relative_model_dir / path.name)
        (inside / "config.yml").write_text(yaml.dump(stock), encoding="utf-8")

    replace_folder(target, write)
    return target / "nerfacto" / RUN_NAME / "config.yml"


def stock_state(field: NerfactoRadiance) -> dict[str, Tensor]:
    """The pipeline's part of a nerfacto checkpoint."""
    weights = {name: value.detach().cpu().clone() for name, value in field.field.state_dict().items()}
    proposal = HashMLPDensityField(field.field.aabb.cpu(), implementation="torch", **density_sizes(field.config))
    prefix = "mlp_base.model." if any(name.startswith("mlp_base.model.") for name in weights) else "mlp_base."
    ours = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    table = next(value for name, value in ours.items() if name.endswith("hash_table"))
    layers = {name.partition("layers.")[2]: value for name, value in ours.items() if "layers." in name}
    found = {}
    for name, value in proposal.state_dict().items():
        if name.endswith("hash_table"):
            found[name] = table
        elif "layers." in name:
            found[name] = layers[name.partition("layers.")[2]][: len(value)]  # of the last layer the density alone
        else:
            found[name] = value
    return {
        "_model.device_indicator_param": torch.empty(0),
        **{f"_model.field.{name}": value for name, value in weights.items()},
        **{f"_model.proposal_networks.0.{name}": value for name, value in found.items()},
    }


def stock_config(made: TrainerConfig, field: NerfactoRadiance, name: str, data: Path | None) -> TrainerConfig:
    """The config of a stock nerfacto run that draws the field."""
    model, sizes = model_of(made), field.config
    manager: Any = made.pipeline.datamanager
    settings = {one.name: getattr(manager, one.name) for one in dataclasses.fields(manager) if one.name != "_target"}
    stock_manager = ParallelDataManagerConfig(**copy.deepcopy(settings))
    if data is not None:
        stock_manager.data = stock_manager.dataparser.data = data
    near, far = reach(made, field)
    group = {
        "optimizer": AdamOptimizerConfig(lr=1e-2, eps=1e-15),
        "scheduler": ExponentialDecaySchedulerConfig(lr_final=1e-4, max_steps=200000),
    }
    return TrainerConfig(
        method_name="nerfacto",
        experiment_name=name,
        output_dir=Path("."),
        timestamp=RUN_NAME,
        max_num_iterations=made.max_num_iterations,
        mixed_precision=made.mixed_precision,
        vis="viewer",
        pipeline=VanillaPipelineConfig(
            datamanager=stock_manager,
            model=NerfactoModelConfig(
                near_plane=near,
                far_plane=far,
                background_color="white" if model.background >= 0.5 else "black",
                hidden_dim_color=sizes.colour_width,
                num_proposal_iterations=1,
                num_proposal_samples_per_ray=(2 * model.samples,),
                num_nerf_samples_per_ray=model.samples,
                proposal_net_args_list=[density_sizes(sizes)],
                proposal_initial_sampler="piecewise" if sizes.contraction else "uniform",
                disable_scene_contraction=not sizes.contraction,
                use_appearance_embedding=False,
                average_init_density=1.0,
                implementation="torch",
                camera_optimizer=CameraOptimizerConfig(mode="off"),
                eval_num_rays_per_chunk=model.eval_num_rays_per_chunk,
                **density_sizes(sizes),
            ),
        ),
        optimizers={"proposal_networks": copy.deepcopy(group), "fields": group},
    )


def model_of(config: TrainerConfig) -> RadianceModelConfig:
    model = config.pipeline.model
    if not isinstance(model, RadianceModelConfig):
        raise InputError(f"export: the config's model is a {type(model).__name__}, not one of kd-pvd")
    return model


def reach(made: TrainerConfig, field: NerfactoRadiance) -> tuple[float, float]:
    """Where rays start and end. Stock samplers spread over all of it and know no box, so that without a contraction
    it is what the box can be of the rays of the photographs' cameras."""
    planes = model_of(made).collider_params or {"near_plane": 0.05, "far_plane": 1000.0}
    near, far = planes["near_plane"], planes["far_plane"]
    if field.config.contraction:
        return near, far
    parser: Any = made.pipeline.datamanager.dataparser.setup()  # type: ignore[union-attr]
    cameras = [parser.get_dataparser_outputs(split=split).cameras for split in ("train", "test")]
    centres = torch.cat([camera.camera_to_worlds[:, :, 3] for camera in cameras])
    box = field.box.cpu()
    distance, half = (centres - box.mean(0)).norm(dim=1), float((box[1] - box[0]).norm()) / 2
    return max(near, float(distance.min()) - half), min(far, float(distance.max()) + half)
