"""The shared core of the kd packages. Importing it is free: every heavy library is imported where it is used."""

__version__ = "0.1.0"
