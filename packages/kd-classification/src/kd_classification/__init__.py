"""Knowledge distillation of image classifiers, on timm."""

__version__ = "0.1.0"
