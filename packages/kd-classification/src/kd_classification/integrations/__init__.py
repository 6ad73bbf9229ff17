"""The package's side of other training frameworks."""

from kd_classification.integrations.timm_task import DistillerTask, as_timm_task

__all__ = ["DistillerTask", "as_timm_task"]
