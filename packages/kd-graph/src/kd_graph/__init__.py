"""Knowledge distillation of graph neural networks, on PyTorch Geometric; no method yet."""

__version__ = "0.1.0"
