"""Knowledge distillation of 3D object detectors, on mmdet3d."""

__version__ = "0.1.0"
