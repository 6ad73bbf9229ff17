# ruff: noqa: C408
# Rendered scenes in KITTI's layout: 300 frames to train on, 100 to test on; a camera and a LiDAR.
_base_ = ["runtime.py"]

classes = ["Pedestrian", "Cyclist", "Car"]
point_cloud_range = [0.0, -12.8, -3.0, 25.6, 12.8, 1.0]
train_pipeline = [
    dict(type="LoadPointsFromFile", coord_type="LIDAR", load_dim=4, use_dim=4),
    dict(type="LoadAnnotations3D", with_bbox_3d=True, with_label_3d=True),
    dict(type="ZeroVelocity"),
    dict(type="GlobalRotScaleTrans", rot_range=[-0.2, 0.2], scale_ratio_range=[0.95, 1.05], translation_std=[0, 0, 0]),
    dict(type="RandomFlip3D", sync_2d=False, flip_ratio_bev_horizontal=0.5),
    dict(type="PointsRangeFilter", point_cloud_range=point_cloud_range),
    dict(type="ObjectRangeFilter", point_cloud_range=point_cloud_range),
    dict(type="LoadCameras"),
    dict(type="Pack3DDetInputs", keys=["points", "img", "gt_bboxes_3d", "gt_labels_3d"]),
]
test_pipeline = [
    dict(type="LoadPointsFromFile", coord_type="LIDAR", load_dim=4, use_dim=4),
    dict(type="PointsRangeFilter", point_cloud_range=point_cloud_range),
    dict(type="LoadCameras"),
    dict(type="Pack3DDetInputs", keys=["points", "img"]),
]
train_dataloader = dict(
    batch_size=8,
    num_workers=0,
    sampler=dict(type="InfiniteSampler", shuffle=True),
    dataset=dict(type="RenderedScenes", split="train", pipeline=train_pipeline),
)
test_dataloader = dict(
    batch_size=10,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type="RenderedScenes", split="val", test_mode=True, pipeline=test_pipeline, metainfo=dict(classes=classes)
    ),
)
val_dataloader = test_dataloader
