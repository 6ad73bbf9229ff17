"""Knowledge distillation of semantic segmentation networks, on mmsegmentation; no method yet."""

__version__ = "0.1.0"
