# ruff: noqa: C408
# Cameras -> LiDAR on the rendered scenes; see small.py.
_base_ = ["small.py"]
method = "unidistill"

model = dict(
    _delete_=True,
    type="DistilledDetector3D",
    student={{_base_.lidar}},
    teachers=dict(teacher=dict(model={{_base_.camera}})),
    distiller=dict(
        type="UniDistill",
        path="C2L",
        point_cloud_range=[0.0, -12.8, -3.0, 25.6, 12.8, 1.0],
        feature=1.0,
        relation=1.0,
        response=0.5,
    ),
)
