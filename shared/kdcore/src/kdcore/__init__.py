"""The shared core of the kd packages. Importing it is free: heavy libraries are imported where they are used."""

__version__ = "0.1.0"
