"""The package's side of other frameworks: timm's training tasks, scikit-learn's estimators."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kd_classification.integrations.kernel_estimator import KernelSelfDistillationClassifier, KernelSelfDistiller
    from kd_classification.integrations.timm_task import DistillerTask, as_timm_task

__all__ = ["DistillerTask", "KernelSelfDistillationClassifier", "KernelSelfDistiller", "as_timm_task"]


def __getattr__(name: str) -> Any:
    # each framework is loaded only for who asks for its part
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    module = "kernel_estimator" if name.startswith("Kernel") else "timm_task"
    return getattr(import_module(f"{__name__}.{module}"), name)
