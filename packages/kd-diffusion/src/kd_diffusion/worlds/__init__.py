"""Embedded worlds: small teachers that are built and trained on the spot, as stock diffusers pipeline folders."""
