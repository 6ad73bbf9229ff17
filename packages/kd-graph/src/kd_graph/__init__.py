"""Knowledge distillation of graph neural networks, on PyTorch Geometric."""

__version__ = "0.1.0"
