"""Embedded worlds: small teachers that are built and trained on the spot, as stock diffusers pipeline folders."""

from __future__ import annotations

from typing import Any

__all__ = ["WorldConfig", "world_stages"]


def __getattr__(name: str) -> Any:
    # Late, because the stages need the data module, which needs the mixtures of this package.
    if name in __all__:
        from kd_diffusion.worlds import stages

        return getattr(stages, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
