"""nerfstudio's side: fields, models, pipelines, `ns-train kd-pvd`, and the stage that `kd train` runs."""

import warnings

with warnings.catch_warnings():  # of torch, about nerfstudio's spelling of autocast
    warnings.simplefilter("ignore", FutureWarning)
    import nerfstudio.field_components.activations  # noqa: F401
