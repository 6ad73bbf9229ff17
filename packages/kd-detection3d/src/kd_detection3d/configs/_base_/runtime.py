# ruff: noqa: C408
# What every config shares: registration, log and checkpoints, the loops of validation and test.
default_scope = "mmdet3d"
custom_imports = dict(imports=["kd_detection3d.integrations"], allow_failed_imports=False)
default_hooks = dict(
    logger=dict(type="LoggerHook", interval=10, log_metric_by_epoch=False),
    checkpoint=dict(type="SafeCheckpointHook", interval=100),
)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
val_evaluator = dict(type="CenterDistanceMetric")
test_evaluator = dict(type="CenterDistanceMetric")
