"""mmsegmentation's side: importing this registers distillers, losses, data sets, hooks and samplers with mmseg.

    custom_imports = dict(imports=["kd_segmentation.integrations"])

in a config does it for mmengine's own Runner. Works with mmcv-lite: see `mmcv_ext`.
"""

from kd_segmentation.integrations import mmcv_ext

mmcv_ext.provide()  # before anything imports mmcv.ops, as mmseg does

from kd_segmentation.integrations import datasets, hooks, necks, registration, segmentor  # noqa: E402

registration.register()

__all__ = ["datasets", "hooks", "mmcv_ext", "necks", "registration", "segmentor"]
