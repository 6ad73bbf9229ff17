"""Knowledge distillation of radiance fields, on nerfstudio; no method yet."""

__version__ = "0.1.0"
