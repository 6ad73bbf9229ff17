# ruff: noqa: C408
# LiDAR and cameras -> cameras on the rendered scenes; see scenes.py.
_base_ = ["scenes.py"]
method = "unidistill"

model = dict(
    teachers=dict(teacher=dict(_delete_=True, model={{_base_.fusion}})),
    distiller=dict(path="F2C", teacher_taps=None),
)
