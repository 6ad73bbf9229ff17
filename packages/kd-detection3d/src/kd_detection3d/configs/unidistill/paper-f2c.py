# ruff: noqa: C408
# LiDAR and cameras -> cameras on nuScenes.
# "release" is megvii-research/CVPR2023-UniDistill; the detectors are in _base_/nuscenes_detectors.py and follow its
# base_nuscenes_cfg.py and BEVFusion_nuscenes_centerhead_fusion_exp.py, with mmdet3d's CenterHead in the place of a head
# with an IoU branch. The images are not rotated; the release turns them by up to 5.4 degrees.
_base_ = ["../_base_/nuscenes.py", "../_base_/nuscenes_detectors.py"]
method = "unidistill"

# The checkpoint: the teacher's state dict alone, trained by the same schedule; `teacher_training` trains one.
model = dict(
    type="DistilledDetector3D",
    student={{_base_.camera}},
    teachers=dict(
        teacher=dict(
            model={{_base_.fusion}},
            checkpoint="{{$TEACHER:unidistill_fusion.pth}}",
        )
    ),
    distiller=dict(
        type="UniDistill",
        path="F2C",  # source: release camera_exp_distill_fusion.py; its weights are the defaults of the path
        point_cloud_range=[-54.0, -54.0, -5.0, 54.0, 54.0, 3.0],  # source: release base_nuscenes_cfg.py
        student_temperature=1.0,  # source: release camera_exp_distill_fusion.py
        teacher_temperature=2.0,  # source: release camera_exp_distill_fusion.py
    ),
)

# 20 epochs of 123580 class-balanced samples in batches of 20, on 4 processes of 5.
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(
        type="AdamW",
        lr=2e-4,  # source: release camera_exp_distill_fusion.py
        weight_decay=1e-7,  # source: release BEVFusion_nuscenes_base_exp.py
    ),
    clip_grad=dict(max_norm=0.1),  # source: release base_cli.py and BEVFusion_nuscenes_base_exp.py
)
param_scheduler = [
    dict(
        type="MultiStepLR",
        milestones=[61790, 92685],  # source: release BEVFusion_nuscenes_base_exp.py (epochs 10 and 15)
        gamma=0.1,  # source: release BEVFusion_nuscenes_base_exp.py
        by_epoch=False,  # not confirmed
    ),
]
train_cfg = dict(
    type="IterBasedTrainLoop",
    max_iters=123580,  # source: release README (20 epochs); the batch of 20 is not confirmed
    val_interval=123580,  # not confirmed
)

off = {"method_args.feature": 0.0, "method_args.relation": 0.0, "method_args.response": 0.0}  # not confirmed
compare = {
    "ce": off,
    "crucial_points": {**off, "method_args.feature": None},
    "relations": {**off, "method_args.relation": None},
    "responses": {**off, "method_args.response": None},
    "release": {"method_args.axis_order": "release", "method_args.teacher_norm": "batch"},
}
