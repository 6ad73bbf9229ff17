"""Knowledge distillation of radiance fields, on nerfstudio."""

__version__ = "0.1.0"
