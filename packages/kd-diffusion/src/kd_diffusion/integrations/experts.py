"""NoiseLevelExperts: several networks of one class that share the noise levels among them, in one diffusers model.

A pipeline that holds one such model where it had one network samples from a mixture of experts without knowing. A
pipeline with places for two networks (`transformer`, `transformer_2` and `boundary_ratio`, as WanPipeline) gets them
there instead: `place` knows the layout that a pipeline takes.

A pipeline folder names the module of a component's class, and diffusers imports none by itself: `import
kd_diffusion.integrations.experts` before `DiffusionPipeline.from_pretrained`.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, FrozenDict, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from kdcore.errors import InputError


class NoiseLevelExperts(ModelMixin, ConfigMixin):
    """`experts[i]` owns the timesteps t with boundaries[i] <= t / num_train_timesteps < boundaries[i - 1].

    network_class: name of a model class of diffusers; network_config: its config, the same of every expert.
    boundaries: falling, in (0, 1); one expert more than boundaries. Called like one of its networks, with a time for
    the batch or one for each sample; samples at different levels may belong to different experts. `config` shows the
    experts' config beside its own. Raises InputError for a class that diffusers does not have or boundaries that do
    not fall.
    """

    @register_to_config
    def __init__(
        self,
        network_class: str,
        network_config: dict[str, Any],
        boundaries: Sequence[float],
        num_train_timesteps: int = 1000,
    ):
        super().__init__()
        edges = [1.0, *boundaries, 0.0]
        if any(low >= high for high, low in pairwise(edges)):
            raise InputError(f"boundaries = {list(boundaries)}: allowed: falling numbers between 1 and 0")
        network = _class(network_class)
        self.experts = nn.ModuleList(network.from_config(dict(network_config)) for _ in range(len(boundaries) + 1))
        self.call = inspect.signature(network.forward)

    @classmethod
    def of(cls, networks: Sequence[nn.Module], boundaries: Sequence[float]) -> NoiseLevelExperts:
        """The networks themselves (not copies) as experts, the noisiest first."""
        if len(networks) != len(boundaries) + 1 or len({type(network) for network in networks}) != 1:
            raise InputError(f"{len(networks)} experts with {len(boundaries)} boundaries: allowed: one class, one less")
        plain = {name: value for name, value in networks[0].config.items() if not name.startswith("_")}
        with torch.device("meta"):  # its own networks are replaced at once
            model = cls(type(networks[0]).__name__, plain, [float(boundary) for boundary in boundaries])
        model.experts = nn.ModuleList(networks)
        return model

    @property
    def config(self) -> Any:
        own = self._internal_dict
        experts = getattr(self, "_modules", {}).get("experts")
        return FrozenDict({**experts[0].config, **own}) if experts else own

    def owner(self, timestep: Tensor) -> Tensor:
        """Index of the expert of each timestep, int64."""
        edges = torch.tensor(self.config.boundaries, dtype=torch.float64, device=timestep.device)
        return (timestep.double()[..., None] < edges * self.config.num_train_timesteps).sum(-1)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = self.call.bind(self, *args, **kwargs).arguments
        given.pop("self")
        rows = len(next(iter(given.values())))
        first = next(iter(given.values()))
        time = torch.as_tensor(given["timestep"], device=first.device).reshape(-1).expand(rows)
        owner = self.owner(time)
        present = owner.unique().tolist()
        if len(present) == 1:
            return self.experts[present[0]](**given)
        given["timestep"] = time
        parts = [(owner == index).nonzero()[:, 0] for index in present]
        outputs = [self.experts[index](**_rows(given, part, rows)) for index, part in zip(present, parts, strict=True)]
        place = torch.cat(parts).argsort()
        if isinstance(outputs[0], tuple):
            return (torch.cat([output[0] for output in outputs])[place],)
        return type(outputs[0])(sample=torch.cat([output.sample for output in outputs])[place])

    def enable_gradient_checkpointing(self, *args: Any, **kwargs: Any) -> None:
        for expert in self.experts:
            expert.enable_gradient_checkpointing(*args, **kwargs)


def _rows(given: dict[str, Any], part: Tensor, rows: int) -> dict[str, Any]:
    """The arguments of some samples: tensors with the batch first, also inside dicts."""

    def take(value: Any) -> Any:
        if isinstance(value, Tensor) and value.ndim > 0 and len(value) == rows:
            return value[part]
        return {name: take(item) for name, item in value.items()} if isinstance(value, dict) else value

    return {name: take(value) for name, value in given.items()}


def _class(name: str) -> Any:
    import diffusers

    found = getattr(diffusers, name, None)
    if not (isinstance(found, type) and issubclass(found, ModelMixin)):
        raise InputError(f"network_class = '{name}': allowed: the name of a model class of diffusers")
    return found


# ---------------------------------------------------------------- networks and pipelines


def experts_of(network: nn.Module) -> tuple[list[nn.Module], list[float]]:
    """(networks, boundaries); a network that is no mixture is its only expert."""
    if isinstance(network, NoiseLevelExperts):
        return list(network.experts), list(network.config.boundaries)
    return [network], []


def joined(networks: Sequence[nn.Module], boundaries: Sequence[float]) -> nn.Module:
    """One model of them; the network itself where there is one."""
    return networks[0] if len(networks) == 1 else NoiseLevelExperts.of(networks, boundaries)


def above(network: nn.Module, level: float) -> nn.Module:
    """The part of a mixture that owns levels in [level, 1]; of one network, itself."""
    networks, boundaries = experts_of(network)
    count = 1 + sum(boundary > level for boundary in boundaries)
    return joined(networks[:count], boundaries[: count - 1])


def at_level(network: nn.Module, level: float) -> nn.Module:
    """The expert that owns a level in [0, 1]."""
    networks, boundaries = experts_of(network)
    return networks[sum(boundary > level for boundary in boundaries)]


def has_two_places(pipe: Any) -> bool:
    """Whether the pipeline's class has `transformer_2` and `boundary_ratio`."""
    return {"transformer_2", "boundary_ratio"} <= inspect.signature(type(pipe).__init__).parameters.keys()


def network_of(pipe: Any, slot: str) -> nn.Module:
    """The pipeline's network, its two as one model."""
    second, ratio = getattr(pipe, "transformer_2", None), pipe.config.get("boundary_ratio")
    if second is None or ratio is None:
        return getattr(pipe, slot)
    return NoiseLevelExperts.of([getattr(pipe, slot), second], [ratio])


def place(pipe: Any, slot: str, network: nn.Module) -> Any:
    """A copy of the pipeline with this network in the layout that its class has.

    Raises InputError for more than two experts where the class has two places.
    """
    pipe = shallow(pipe)
    if not has_two_places(pipe):
        pipe.register_modules(**{slot: network})
        return pipe
    networks, boundaries = experts_of(network)
    if len(networks) > 2:
        raise InputError(f"{len(networks)} experts: {type(pipe).__name__} has places for two")
    pipe.register_modules(**{slot: networks[0], "transformer_2": networks[1] if boundaries else None})
    pipe.register_to_config(boundary_ratio=boundaries[0] if boundaries else None)
    return pipe


def shallow(pipe: Any) -> Any:
    """A pipeline of the same components whose registry may change alone."""
    pipe = copy.copy(pipe)
    pipe._internal_dict = copy.deepcopy(dict(pipe._internal_dict))
    return pipe
