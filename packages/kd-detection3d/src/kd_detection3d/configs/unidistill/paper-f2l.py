# ruff: noqa: C408
# LiDAR and cameras -> LiDAR on nuScenes; the rest is in paper.py, which says what "release" is.
_base_ = ["paper.py"]
method = "unidistill"

model = dict(
    _delete_=True,
    type="DistilledDetector3D",
    student={{_base_.lidar}},
    teachers=dict(
        teacher=dict(
            model={{_base_.fusion}},
            checkpoint="{{$TEACHER:unidistill_fusion.pth}}",
        )
    ),
    distiller=dict(
        type="UniDistill",
        path="F2L",  # source: release lidar_exp_distill_fusion.py; its weights are the defaults of the path
        point_cloud_range=[-54.0, -54.0, -5.0, 54.0, 54.0, 3.0],  # source: release base_nuscenes_cfg.py
        student_temperature=1.0,  # source: release lidar_exp_distill_fusion.py
        teacher_temperature=2.0,  # source: release lidar_exp_distill_fusion.py
    ),
)

optim_wrapper = dict(optimizer=dict(lr=1e-3))  # source: release lidar_exp_distill_fusion.py
