"""Knowledge distillation of language models, on transformers."""

__version__ = "0.1.0"
