# ruff: noqa: C408
# The paper's detectors of LiDAR, cameras and both on 180 x 180 cells of 0.6 m. The sparse convolutions of the LiDAR
# branch need mmcv with its compiled operators, or spconv.
limits = [-54.0, -54.0, -5.0, 54.0, 54.0, 3.0]
voxel_size = [0.075, 0.075, 0.2]

bev_backbone = dict(
    type="SECOND",
    in_channels=256,
    out_channels=[128, 256],
    layer_nums=[5, 5],
    layer_strides=[1, 2],
    norm_cfg=dict(type="BN", eps=1e-3, momentum=0.01),
    conv_cfg=dict(type="Conv2d", bias=False),
)
bev_neck = dict(
    type="SECONDFPN",
    in_channels=[128, 256],
    out_channels=[256, 256],
    upsample_strides=[1, 2],
    norm_cfg=dict(type="BN", eps=1e-3, momentum=0.01),
    upsample_cfg=dict(type="deconv", bias=False),
    use_conv_for_no_stride=True,
)
head = dict(
    type="CenterHead",
    in_channels=512,
    tasks=[
        dict(num_class=1, class_names=["car"]),
        dict(num_class=2, class_names=["truck", "construction_vehicle"]),
        dict(num_class=2, class_names=["bus", "trailer"]),
        dict(num_class=1, class_names=["barrier"]),
        dict(num_class=2, class_names=["motorcycle", "bicycle"]),
        dict(num_class=2, class_names=["pedestrian", "traffic_cone"]),
    ],
    common_heads=dict(reg=(2, 2), height=(1, 2), dim=(3, 2), rot=(2, 2), vel=(2, 2)),
    share_conv_channel=64,
    bbox_coder=dict(
        type="CenterPointBBoxCoder",
        pc_range=limits[:2],
        post_center_range=[-61.2, -61.2, -10.0, 61.2, 61.2, 10.0],
        max_num=500,
        score_threshold=0.1,
        out_size_factor=8,
        voxel_size=voxel_size[:2],
        code_size=9,
    ),
    separate_head=dict(type="SeparateHead", init_bias=-2.19, final_kernel=3),
    loss_cls=dict(type="mmdet.GaussianFocalLoss", reduction="mean"),
    loss_bbox=dict(type="mmdet.L1Loss", reduction="mean", loss_weight=0.25),
    norm_bbox=True,
)
head_train_cfg = dict(
    pts=dict(
        grid_size=[1440, 1440, 40],
        voxel_size=voxel_size,
        out_size_factor=8,
        point_cloud_range=limits,
        dense_reg=1,
        gaussian_overlap=0.1,
        max_objs=500,
        min_radius=2,
        code_weights=[1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.2, 0.2],
    )
)
head_test_cfg = dict(
    pts=dict(
        post_center_limit_range=[-61.2, -61.2, -10.0, 61.2, 61.2, 10.0],
        max_per_img=500,
        max_pool_nms=False,
        min_radius=[4, 12, 10, 1, 0.85, 0.175],
        score_threshold=0.1,
        out_size_factor=8,
        voxel_size=voxel_size[:2],
        pc_range=limits[:2],
        nms_type="rotate",
        pre_max_size=1000,
        post_max_size=83,
        nms_thr=0.2,
    )
)
voxel_layer = dict(max_num_points=10, voxel_size=voxel_size, max_voxels=(120000, 160000), point_cloud_range=limits)
image_mean = [123.675, 116.28, 103.53]
image_std = [58.395, 57.12, 57.375]
voxel_encoder = dict(type="HardSimpleVFE", num_features=5)
middle_encoder = dict(
    type="SparseEncoder",
    in_channels=5,
    sparse_shape=[41, 1440, 1440],
    output_channels=128,
    order=("conv", "norm", "act"),
    encoder_channels=((16, 16, 32), (32, 32, 64), (64, 64, 128), (128, 128)),
    encoder_paddings=((0, 0, 1), (0, 0, 1), (0, 0, [0, 1, 1]), (0, 0)),
    block_type="basicblock",
)
image_backbone = dict(
    type="mmdet.ResNet",
    depth=50,
    frozen_stages=0,
    out_indices=(0, 1, 2, 3),
    norm_cfg=dict(type="BN", requires_grad=True),
    norm_eval=False,
    style="pytorch",
    init_cfg=dict(type="Pretrained", checkpoint="torchvision://resnet50"),
)
image_neck = dict(
    type="SECONDFPN",
    in_channels=[256, 512, 1024, 2048],
    out_channels=[128, 128, 128, 128],
    upsample_strides=[0.25, 0.5, 1, 2],
)
view_transform = dict(
    type="LiftSplat",
    in_channels=512,
    mid_channels=512,
    out_channels=256,
    point_cloud_range=limits,
    bev_shape=(180, 180),
    depth=(2.0, 58.0, 0.5),
)
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
    data_preprocessor=dict(type="Det3DDataPreprocessor", mean=image_mean, std=image_std, bgr_to_rgb=True),
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
        mean=image_mean,
        std=image_std,
        bgr_to_rgb=True,
        voxel=True,
        voxel_layer=voxel_layer,
    ),
    img_backbone=image_backbone,
    img_neck=image_neck,
    view_transform=view_transform,
    pts_voxel_encoder=voxel_encoder,
    pts_middle_encoder=middle_encoder,
    fusion=dict(type="ChannelAttentionFusion", in_channels=[256, 256], out_channels=256),
    pts_backbone=bev_backbone,
    pts_neck=bev_neck,
    pts_bbox_head=head,
    train_cfg=head_train_cfg,
    test_cfg=head_test_cfg,
)
