"""Knowledge distillation of language models, on transformers; no method yet."""

__version__ = "0.1.0"
