"""The diffusers side: pipelines in and out, attention processors."""
