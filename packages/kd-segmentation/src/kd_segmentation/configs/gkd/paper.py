# ruff: noqa: C408
# DINOv2-B -> DeiT-S ("foundation to local"): ImageNet, then unlabelled GTA5, then Mask2Former on labelled GTA5;
# tested on Cityscapes, BDD100K and Mapillary. Data under $GTA5, $CITYSCAPES, $BDD100K, $MAPILLARY with 19 train ids;
# $IMAGENET holds images. "release" is Younger-hua/GKD: scripts, main.py, convert_gkd and task_learning/configs.
# The release resizes patch embeddings by bicubic interpolation, timm by its pseudo-inverse. Mask2Former needs mmdet.
_base_ = ["../_base_/runtime.py"]
method = "gkd"

crop_size = (512, 512)  # source: release task_learning/configs (dg_*_512x512)
data_preprocessor = dict(
    type="SegDataPreProcessor",
    mean=[123.675, 116.28, 103.53],  # source: release task_learning/configs
    std=[58.395, 57.12, 57.375],  # source: release task_learning/configs
    bgr_to_rgb=True,  # source: release task_learning/configs
    pad_val=0,  # source: release task_learning/configs
    seg_pad_val=255,  # source: release task_learning/configs
    size=crop_size,
)
dims = 384  # source: release scripts (DeiT-S)
student = dict(
    type="EncoderDecoder",
    data_preprocessor=data_preprocessor,
    backbone=dict(
        type="TIMMBackbone",
        model_name="deit_small_patch16_224",  # source: release scripts
        pretrained=True,  # source: release scripts
        img_size=512,  # source: release convert_gkd
        patch_size=16,  # source: release convert_gkd
        out_indices=(3, 5, 7, 11),  # source: release task_learning/configs
    ),
    neck=dict(type="BilinearPyramid", scales=(4, 2, 1, 0.5)),  # source: release task_learning (frozen segmentor)
    decode_head=dict(  # source: release task_learning/configs (mmseg's mask2former, 19 classes of the urban benchmarks)
        type="Mask2FormerHead",
        in_channels=[dims, dims, dims, dims],
        strides=[4, 8, 16, 32],
        feat_channels=256,
        out_channels=256,
        num_classes=19,
        num_queries=100,
        num_transformer_feat_level=3,
        align_corners=False,
        pixel_decoder=dict(
            type="mmdet.MSDeformAttnPixelDecoder",
            num_outs=3,
            norm_cfg=dict(type="GN", num_groups=32),
            act_cfg=dict(type="ReLU"),
            encoder=dict(
                num_layers=6,
                layer_cfg=dict(
                    self_attn_cfg=dict(embed_dims=256, num_heads=8, num_levels=3, num_points=4, batch_first=True),
                    ffn_cfg=dict(embed_dims=256, feedforward_channels=1024, num_fcs=2, act_cfg=dict(type="ReLU")),
                ),
            ),
            positional_encoding=dict(num_feats=128, normalize=True),
        ),
        enforce_decoder_input_project=False,
        positional_encoding=dict(num_feats=128, normalize=True),
        transformer_decoder=dict(
            return_intermediate=True,
            num_layers=9,
            layer_cfg=dict(
                self_attn_cfg=dict(embed_dims=256, num_heads=8, batch_first=True),
                cross_attn_cfg=dict(embed_dims=256, num_heads=8, batch_first=True),
                ffn_cfg=dict(embed_dims=256, feedforward_channels=2048, num_fcs=2, act_cfg=dict(type="ReLU")),
            ),
        ),
        loss_cls=dict(
            type="mmdet.CrossEntropyLoss", loss_weight=2.0, reduction="mean", class_weight=[1.0] * 19 + [0.1]
        ),
        loss_mask=dict(type="mmdet.CrossEntropyLoss", use_sigmoid=True, reduction="mean", loss_weight=5.0),
        loss_dice=dict(
            type="mmdet.DiceLoss", activate=True, reduction="mean", naive_dice=True, eps=1.0, loss_weight=5.0
        ),
        train_cfg=dict(
            num_points=12544,
            oversample_ratio=3.0,
            importance_sample_ratio=0.75,
            assigner=dict(
                type="mmdet.HungarianAssigner",
                match_costs=[
                    dict(type="mmdet.ClassificationCost", weight=2.0),
                    dict(type="mmdet.CrossEntropyLossCost", weight=5.0, use_sigmoid=True),
                    dict(type="mmdet.DiceCost", weight=5.0, pred_act=True, eps=1.0),
                ],
            ),
            sampler=dict(type="mmdet.MaskPseudoSampler"),
        ),
    ),
    train_cfg=dict(),
    test_cfg=dict(mode="slide", crop_size=crop_size, stride=(341, 341)),  # source: release task_learning/configs
)
model = dict(
    type="DistilledSegmentor",
    student=student,
    distiller=dict(
        type="GKD",
        token=1.0,  # source: release scripts
        feature=1.0,  # source: release scripts
        patch=1.0,  # source: release scripts
        mask_probability=0.5,  # source: release scripts
        mask_ratio=0.5,  # source: release scripts
    ),
)


def images(size):
    """Random resized crops; RandAugment and erasing of timm's train transform have no counterpart in mmseg."""
    return [
        dict(type="LoadImageFromFile"),
        dict(type="RandomResize", scale=(2 * size, size), ratio_range=(1.0, 2.0), keep_ratio=True),  # not confirmed
        dict(type="RandomCrop", crop_size=(size, size)),  # source: release main.py
        dict(type="RandomFlip", prob=0.5),  # source: release main.py
        dict(type="PhotoMetricDistortion"),  # source: release main.py (jitter .3)
        dict(type="PackSegInputs"),
    ]


def training(batch, steps, lr, dataset):
    return dict(
        train_cfg=dict(type="IterBasedTrainLoop", max_iters=steps),  # source: release scripts (epochs)
        optim_wrapper=dict(
            type="AmpOptimWrapper",  # source: release main.py
            optimizer=dict(type="AdamW", lr=lr, weight_decay=0.05, eps=1e-8),  # source: release main.py
        ),
        param_scheduler=[
            dict(type="CosineAnnealingLR", eta_min=1e-5, by_epoch=False, begin=0, end=steps),  # source: release main.py
        ],
        train_dataloader=dict(
            batch_size=batch,  # source: release scripts (on each of 4 GPUs)
            num_workers=8,
            sampler=dict(type="InfiniteSampler", shuffle=True),  # source: release main.py
            dataset=dataset,
        ),
    )


method_args = dict(
    foundation=dict(
        name="vit_base_patch14_dinov2.lvd142m",  # source: release scripts (DINOv2-B)
        pretrained=True,
    ),
    representation=[
        dict(
            name="task_agnostic",  # source: release scripts
            student=dict(img_size=224, patch_size=14),  # source: release scripts
            teacher=dict(img_size=224, patch_size=14),  # source: release scripts
            **training(  # source: release scripts (128 x 4, 100 epochs of 1281167 images)
                128,  # source: release scripts
                250228,  # source: release scripts
                5e-4,  # source: release scripts
                dict(
                    type="BaseSegDataset",
                    data_root="{{$IMAGENET:data/imagenet}}",
                    data_prefix=dict(img_path="train"),
                    img_suffix=".JPEG",
                    metainfo=dict(classes=["image"]),
                    pipeline=images(224),  # source: release scripts
                ),
            ),
        ),
        dict(
            name="domain_agnostic",  # source: release scripts
            student=dict(img_size=512, patch_size=16),  # source: release scripts
            teacher=dict(img_size=512, patch_size=16),  # source: release scripts
            **training(  # source: release scripts (32 x 4, 300 epochs of 24966 images)
                32,  # source: release scripts
                58514,  # source: release scripts
                1.25e-4,  # source: release scripts
                dict(
                    type="CityscapesDataset",
                    data_root="{{$GTA5:data/gta}}",
                    data_prefix=dict(img_path="images"),
                    img_suffix=".png",
                    pipeline=images(512),  # source: release scripts
                ),
            ),
        ),
    ],
)

train_dataloader = dict(
    batch_size=4,  # source: release task_learning/configs
    num_workers=8,
    sampler=dict(type="InfiniteSampler", shuffle=True),  # source: release task_learning/configs
    dataset=dict(  # source: release task_learning/configs (resize .5 to 2 x 512, crop 512); layout not confirmed
        type="CityscapesDataset",
        data_root="{{$GTA5:data/gta}}",
        data_prefix=dict(img_path="images", seg_map_path="labels"),
        img_suffix=".png",
        seg_map_suffix="_labelTrainIds.png",
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="LoadAnnotations"),
            dict(
                type="RandomChoiceResize",
                scales=[512 * k // 10 for k in range(5, 21)],
                resize_type="ResizeShortestEdge",
            ),
            dict(type="RandomCrop", crop_size=crop_size, cat_max_ratio=0.75),
            dict(type="RandomFlip", prob=0.5),
            dict(type="PhotoMetricDistortion"),
            dict(type="PackSegInputs"),
        ],
    ),
)
test_dataloader = dict(
    batch_size=1,  # source: release task_learning/configs
    num_workers=4,
    sampler=dict(type="DefaultSampler", shuffle=False),  # source: release task_learning/configs
    dataset=dict(
        type="CityscapesDataset",
        data_root="{{$CITYSCAPES:data/cityscapes}}",
        data_prefix=dict(img_path="leftImg8bit/val", seg_map_path="gtFine/val"),
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="Resize", scale=(1024, 512), keep_ratio=True),  # source: release task_learning/configs
            dict(type="LoadAnnotations"),
            dict(type="PackSegInputs"),
        ],
    ),
)
val_dataloader = test_dataloader
domains = dict(  # not confirmed: the usual layouts
    bdd100k=dict(
        data_root="{{$BDD100K:data/bdd100k}}",
        data_prefix=dict(img_path="images/10k/val", seg_map_path="labels/sem_seg/masks/val"),
        img_suffix=".jpg",
        seg_map_suffix=".png",
    ),
    mapillary=dict(
        data_root="{{$MAPILLARY:data/mapillary}}",
        data_prefix=dict(img_path="half/val_img", seg_map_path="half/val_label"),
        img_suffix=".jpg",
        seg_map_suffix="_labelTrainIds.png",
    ),
)
optim_wrapper = dict(  # source: release task_learning/configs
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=1e-4, weight_decay=0.05),
    paramwise_cfg=dict(custom_keys={"query_embed": dict(decay_mult=0.0)}, norm_decay_mult=0.0),
)
param_scheduler = [dict(type="PolyLR", eta_min=0.0, power=0.9, begin=0, end=40000, by_epoch=False)]  # source: release
train_cfg = dict(
    type="IterBasedTrainLoop",
    max_iters=40000,  # source: release task_learning/configs
    val_interval=4000,  # not confirmed
)

compare = {
    "mse": {"method_args.query": False},
    "finetuned": {"method_args.freeze": False},
}
