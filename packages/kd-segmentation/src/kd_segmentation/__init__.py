"""Knowledge distillation of semantic segmentation networks, on mmsegmentation."""

__version__ = "0.1.0"
