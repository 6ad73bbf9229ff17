"""Knowledge distillation of 3D object detectors, on mmdet3d; no method yet."""

__version__ = "0.1.0"
