"""mmdet3d's side: importing this registers detectors, distillers, data sets, transforms, hooks and samplers with it.

    custom_imports = dict(imports=["kd_detection3d.integrations"])

in a config does it for mmengine's own Runner. Works with mmcv-lite and without CUDA: see `mmcv_ext`.
"""

from kd_detection3d.integrations import mmcv_ext

mmcv_ext.provide()  # before anything imports mmcv.ops, as mmdet3d does

from kd_detection3d.integrations import (  # noqa: E402
    datasets,
    detector,
    detectors,
    evaluation,
    hooks,
    registration,
    stage,
    transforms,
)

mmcv_ext.provide_kitti_evaluation()
registration.register()

__all__ = [
    "datasets",
    "detector",
    "detectors",
    "evaluation",
    "hooks",
    "mmcv_ext",
    "registration",
    "stage",
    "transforms",
]
