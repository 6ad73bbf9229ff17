# ruff: noqa: C408
# Cameras -> LiDAR on the rendered scenes; see small.py.
_base_ = ["small.py"]
method = "unidistill"

model = dict(
    student=dict(_base_.lidar, _delete_=True),
    teachers=dict(teacher=dict(_delete_=True, model={{_base_.camera}})),
    distiller=dict(path="C2L", student_taps={{_base_.lidar_taps}}, teacher_taps=None),
)
