"""Knowledge distillation of diffusion models, on diffusers; no method yet."""

__version__ = "0.1.0"
