# ruff: noqa: C408
# Small detectors on the rendered scenes: LiDAR, camera and both, on maps of 32 x 32 cells of 0.8 m.
limits = [0.0, -12.8, -3.0, 25.6, 12.8, 1.0]
voxel_size = [0.8, 0.8, 4.0]
norm_cfg = dict(type="BN", eps=1e-3, momentum=0.1)

bev_backbone = dict(
    type="SECOND",
    in_channels=32,
    out_channels=[32, 48],
    layer_nums=[1, 2],
    layer_strides=[1, 2],
    norm_cfg=norm_cfg,
    conv_cfg=dict(type="Conv2d", bias=False),
)
bev_neck = dict(
    type="SECONDFPN",
    in_channels=[32, 48],
    out_channels=[32, 32],
    upsample_strides=[1, 2],
    norm_cfg=norm_cfg,
    upsample_cfg=dict(type="deconv", bias=False),
    use_conv_for_no_stride=True,
)
head = dict(
    type="CenterHead",
    in_channels=64,
    tasks=[dict(num_class=3, class_names=["Pedestrian", "Cyclist", "Car"])],
    common_heads=dict(reg=(2, 2), height=(1, 2), dim=(3, 2), rot=(2, 2), vel=(2, 2)),
    share_conv_channel=32,
    norm_cfg=norm_cfg,
    bbox_coder=dict(
        type="CenterPointBBoxCoder",
        pc_range=limits[:2],
        post_center_range=[-5.0, -15.0, -5.0, 30.0, 15.0, 5.0],
        max_num=50,
        score_threshold=0.05,
        out_size_factor=1,
        voxel_size=voxel_size[:2],
        code_size=9,
    ),
    separate_head=dict(type="SeparateHead", init_bias=-2.19, final_kernel=3, head_conv=32, norm_cfg=norm_cfg),
    loss_cls=dict(type="mmdet.GaussianFocalLoss", reduction="mean"),
    loss_bbox=dict(type="mmdet.L1Loss", reduction="mean", loss_weight=0.25),
    norm_bbox=True,
)
head_train_cfg = dict(
    pts=dict(
        grid_size=[32, 32, 1],
        voxel_size=voxel_size,
        out_size_factor=1,
        point_cloud_range=limits,
        dense_reg=1,
        gaussian_overlap=0.1,
        max_objs=30,
        min_radius=1,
        code_weights=[1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.2, 0.2],
    )
)
head_test_cfg = dict(
    pts=dict(
        post_center_limit_range=[-5.0, -15.0, -5.0, 30.0, 15.0, 5.0],
        min_radius=[1.0],
        score_threshold=0.05,
        out_size_factor=1,
        voxel_size=voxel_size[:2],
        pc_range=limits[:2],
        nms_type="rotate",
        pre_max_size=50,
        post_max_size=30,
        nms_thr=0.2,
    )
)
image_preprocessor = dict(
    type="Det3DDataPreprocessor", mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True
)
voxel_layer = dict(max_num_points=20, voxel_size=voxel_size, max_voxels=(1024, 1024), point_cloud_range=limits)
voxel_encoder = dict(
    type="PillarFeatureNet",
    in_channels=4,
    feat_channels=[32],
    voxel_size=voxel_size,
    point_cloud_range=limits,
    norm_cfg=dict(type="BN1d", eps=1e-3, momentum=0.1),
)
middle_encoder = dict(type="PointPillarsScatter", in_channels=32, output_shape=[32, 32])
image_backbone = dict(
    type="mmdet.ResNet",
    depth=18,
    base_channels=16,
    stem_channels=16,
    num_stages=3,
    strides=(1, 2, 2),
    dilations=(1, 1, 1),
    out_indices=(0, 1, 2),
    norm_cfg=dict(type="BN", requires_grad=True),
    norm_eval=False,
    style="pytorch",
)
image_neck = dict(
    type="SECONDFPN",
    in_channels=[16, 32, 64],
    out_channels=[16, 16, 16],
    upsample_strides=[1, 2, 4],
    norm_cfg=norm_cfg,
    upsample_cfg=dict(type="deconv", bias=False),
    use_conv_for_no_stride=True,
)
view_transform = dict(
    type="LiftSplat",
    in_channels=48,
    out_channels=32,
    point_cloud_range=limits,
    bev_shape=(32, 32),
    depth=(2.0, 26.0, 0.8),
)
# The low-level map of a LiDAR is read behind its first two convolutions: the pillars themselves say where every point
# fell, which no camera can tell. (The paper's is behind a sparse convolutional encoder.)
lidar_taps = dict(low="pts_backbone.blocks.0")
lidar = dict(
    type="CenterPoint",
    data_preprocessor=dict(type="Det3DDataPreprocessor", voxel=True, voxel_layer=voxel_layer),
    pts_voxel_encoder=voxel_encoder,
    pts_middle_encoder=middle_encoder,
    pts_backbone=bev_backbone,
    pts_neck=bev_neck,
    pts_bbox_head=head,
    train_cfg=head_train_cfg,
    test_cfg=head_test_cfg,
)
camera = dict(
    type="BEVDetector",
    data_preprocessor=image_preprocessor,
    img_backbone=image_backbone,
    img_neck=image_neck,
    view_transform=view_transform,
    pts_backbone=bev_backbone,
    pts_neck=bev_neck,
    pts_bbox_head=head,
    train_cfg=head_train_cfg,
    test_cfg=head_test_cfg,
)
fusion = dict(
    type="BEVDetector",
    data_preprocessor=dict(
        type="Det3DDataPreprocessor",
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        voxel=True,
        voxel_layer=voxel_layer,
    ),
    img_backbone=image_backbone,
    img_neck=image_neck,
    view_transform=view_transform,
    pts_voxel_encoder=voxel_encoder,
    pts_middle_encoder=middle_encoder,
    fusion=dict(type="ChannelAttentionFusion", in_channels=[32, 32], out_channels=32, norm_cfg=norm_cfg),
    pts_backbone=bev_backbone,
    pts_neck=bev_neck,
    pts_bbox_head=head,
    train_cfg=head_train_cfg,
    test_cfg=head_test_cfg,
)
