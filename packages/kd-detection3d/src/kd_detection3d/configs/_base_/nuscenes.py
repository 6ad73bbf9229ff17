# ruff: noqa: C408
# nuScenes in mmdet3d's layout under $NUSCENES (or data/nuscenes), with its info files; 10 sweeps of LiDAR, 6 cameras.
_base_ = ["runtime.py"]

data_root = "{{$NUSCENES:data/nuscenes}}"
point_cloud_range = [-54.0, -54.0, -5.0, 54.0, 54.0, 3.0]
classes = [
    "car",
    "truck",
    "construction_vehicle",
    "bus",
    "trailer",
    "barrier",
    "motorcycle",
    "bicycle",
    "pedestrian",
    "traffic_cone",
]
cameras = ["CAM_BACK", "CAM_BACK_LEFT", "CAM_BACK_RIGHT", "CAM_FRONT", "CAM_FRONT_LEFT", "CAM_FRONT_RIGHT"]
data_prefix = dict(
    pts="samples/LIDAR_TOP",
    sweeps="sweeps/LIDAR_TOP",
    CAM_BACK="samples/CAM_BACK",
    CAM_BACK_LEFT="samples/CAM_BACK_LEFT",
    CAM_BACK_RIGHT="samples/CAM_BACK_RIGHT",
    CAM_FRONT="samples/CAM_FRONT",
    CAM_FRONT_LEFT="samples/CAM_FRONT_LEFT",
    CAM_FRONT_RIGHT="samples/CAM_FRONT_RIGHT",
)
load_points = [
    dict(type="LoadPointsFromFile", coord_type="LIDAR", load_dim=5, use_dim=5),
    dict(
        type="LoadPointsFromMultiSweeps",
        sweeps_num=9,
        use_dim=[0, 1, 2, 3, 4],
        pad_empty_sweeps=True,
        remove_close=True,
    ),
]
train_pipeline = [
    *load_points,
    dict(type="LoadAnnotations3D", with_bbox_3d=True, with_label_3d=True),
    dict(
        type="GlobalRotScaleTrans",
        rot_range=[-0.7854, 0.7854],
        scale_ratio_range=[0.9, 1.1],
        translation_std=[0.5, 0.5, 0.5],
    ),
    dict(type="RandomFlip3D", sync_2d=False, flip_ratio_bev_horizontal=0.5, flip_ratio_bev_vertical=0.5),
    dict(type="PointsRangeFilter", point_cloud_range=point_cloud_range),
    dict(type="ObjectRangeFilter", point_cloud_range=point_cloud_range),
    dict(type="ObjectNameFilter", classes=classes),
    dict(type="PointShuffle"),
    dict(type="LoadCameras", cameras=cameras),
    dict(type="ResizeCropImages", size=(256, 704), resize=(0.877, 1.25), flip=0.5),
    dict(type="Pack3DDetInputs", keys=["points", "img", "gt_bboxes_3d", "gt_labels_3d"]),
]
test_pipeline = [
    *load_points,
    dict(type="PointsRangeFilter", point_cloud_range=point_cloud_range),
    dict(type="LoadCameras", cameras=cameras),
    dict(type="ResizeCropImages", size=(256, 704)),
    dict(type="Pack3DDetInputs", keys=["points", "img"]),
]
modality = dict(use_lidar=True, use_camera=True)
train_dataloader = dict(
    batch_size=5,
    num_workers=8,
    persistent_workers=True,
    sampler=dict(type="InfiniteSampler", shuffle=True),
    dataset=dict(
        type="CBGSDataset",
        dataset=dict(
            type="NuScenesDataset",
            data_root=data_root,
            ann_file="nuscenes_infos_train.pkl",
            data_prefix=data_prefix,
            modality=modality,
            metainfo=dict(classes=classes),
            use_valid_flag=True,
            box_type_3d="LiDAR",
            pipeline=train_pipeline,
        ),
    ),
)
test_dataloader = dict(
    batch_size=1,
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type="NuScenesDataset",
        data_root=data_root,
        ann_file="nuscenes_infos_val.pkl",
        data_prefix=data_prefix,
        modality=modality,
        metainfo=dict(classes=classes),
        test_mode=True,
        box_type_3d="LiDAR",
        pipeline=test_pipeline,
    ),
)
val_dataloader = test_dataloader
val_evaluator = dict(
    _delete_=True,
    type="NuScenesMetric",
    data_root=data_root,
    ann_file=data_root + "/nuscenes_infos_val.pkl",
    metric="bbox",
    modality=modality,
)
test_evaluator = val_evaluator
