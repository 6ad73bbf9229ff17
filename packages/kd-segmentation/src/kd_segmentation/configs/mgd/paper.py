# ruff: noqa: C408
# Cityscapes, 1/8 labelled: DeepLabV3+ of ResNet-18 from a wide and a deep teacher.
# "release" is JayQine/MGD-SSSS, exp.city/city8.resnet18_deeplabv3plus: train.py, config.py, script.sh.
# The labelled and the unlabelled list are text files of names under $CITYSCAPES, as `python -m kd_segmentation.splits`
# writes them (the release's own lists name the same shares).
_base_ = ["../_base_/cityscapes.py"]
method = "mgd"

norm_cfg = dict(type="SyncBN", requires_grad=True)  # source: release train.py
crop_size = (800, 800)  # source: release config.py
data_preprocessor = dict(size=crop_size)  # source: release config.py
train_pipeline = [  # source: release config.py
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(type="RandomFlip", prob=0.5),
    dict(
        type="RandomChoiceResize", scales=[(2048 * k // 4, 1024 * k // 4) for k in (2, 3, 4, 6, 7, 8)], keep_ratio=True
    ),
    dict(type="RandomCrop", crop_size=crop_size),
    dict(type="PackSegInputs"),
]


def head(in_channels, c1_in_channels):
    return dict(
        type="DepthwiseSeparableASPPHead",
        in_channels=in_channels,
        in_index=3,  # source: release network.py
        channels=256,  # source: release network.py
        dilations=(1, 6, 12, 18),  # source: release network.py
        c1_in_channels=c1_in_channels,
        c1_channels=48,  # not confirmed
        dropout_ratio=0.1,  # not confirmed
        num_classes=19,  # source: release config.py
        norm_cfg=norm_cfg,
        align_corners=True,  # source: release network.py
        loss_decode=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0),  # source: release train.py
    )


def segmentor(backbone, decode_head):
    return dict(
        type="EncoderDecoder",
        data_preprocessor={**_base_.data_preprocessor, "size": crop_size},  # source: release config.py
        backbone=backbone,
        decode_head=decode_head,
        train_cfg=dict(),
        test_cfg=dict(mode="slide", crop_size=crop_size, stride=(533, 533)),  # source: release config.py (stride 2/3)
    )


def resnet(depth, **more):
    return dict(
        type="ResNetV1c",  # the deep stem of 32, 32 and 64 channels
        depth=depth,
        num_stages=4,  # source: release network.py
        out_indices=(0, 1, 2, 3),  # source: release network.py
        strides=(1, 2, 2, 1),  # source: release network.py (output stride 16)
        dilations=(1, 1, 1, 2),  # source: release network.py
        norm_cfg=norm_cfg,
        **more,
    )


wide_resnet = dict(
    type="TIMMBackbone",
    model_name="wide_resnet50_2",  # not confirmed: stands in for the paper's Wide-ResNet-34, which no library has
    features_only=True,  # not confirmed
    pretrained=True,  # source: release network.py (ImageNet weights)
    output_stride=16,  # source: release network.py
    out_indices=(1, 2, 3, 4),  # not confirmed
)
imagenet = dict(type="Pretrained", checkpoint="open-mmlab://resnet18_v1c")  # source: release network.py
imagenet_deep = dict(type="Pretrained", checkpoint="open-mmlab://resnet101_v1c")  # source: release network.py
model = dict(
    type="DistilledSegmentor",
    student=segmentor(resnet(18, init_cfg=imagenet), head(512, 64)),  # source: release network.py
    teachers=dict(
        wide=dict(model=segmentor(wide_resnet, head(2048, 256))),  # not confirmed: see above
        deep=dict(model=segmentor(resnet(101, init_cfg=imagenet_deep), head(2048, 256))),  # source: release network.py
    ),
    distiller=dict(
        type="MGD",
        lambda_image=1e-3,  # source: release config.py
        lambda_region=100.0,  # source: release config.py
        regions=7,  # source: release train.py
        supervised="ohem",  # source: release train.py
        ohem_threshold=0.7,  # source: release train.py
        ohem_kept=50_000,  # source: release train.py
    ),
)

cityscapes = dict(
    type="CityscapesDataset",
    data_root=_base_.data_root,
    data_prefix=dict(img_path="leftImg8bit/train", seg_map_path="gtFine/train"),
    pipeline=train_pipeline,
)
train_dataloader = dict(
    batch_size=2,  # source: release script.sh (16 on 8 GPUs)
    num_workers=8,
    dataset=dict(
        _delete_=True,
        type="StreamDataset",
        labelled=dict(**cityscapes, ann_file="splits/1_8/labelled.txt"),  # source: release config.py (1/8)
        unlabelled=dict(**cityscapes, ann_file="splits/1_8/unlabelled.txt"),  # source: release config.py
    ),
)
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="SGD", lr=0.02, momentum=0.9, weight_decay=1e-4),  # source: release script.sh, config.py
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0),  # source: release train.py
)
# 137 epochs of the 2604 unlabelled images in batches of 16.
param_scheduler = [
    dict(type="PolyLR", eta_min=0.0, power=0.9, begin=0, end=22194, by_epoch=False),  # source: release config.py
]
train_cfg = dict(
    type="IterBasedTrainLoop",
    max_iters=22194,  # source: release config.py
    val_interval=3240,  # not confirmed
)
teacher_training = dict(
    algorithm="cps",  # source: release README
    train_cfg=dict(
        type="IterBasedTrainLoop", max_iters=22194
    ),  # source: release exp.city/city8.resnet101_deeplabv3plus
    optim_wrapper=optim_wrapper,
    param_scheduler=param_scheduler,
)

compare = {
    "ce": {
        "method_args.pixel_labelled": 0.0,
        "method_args.pixel_unlabelled": 0.0,
        "method_args.lambda_image": 0.0,
        "method_args.lambda_region": 0.0,
    },
    "cps": {"method_args.baseline": "cps"},
    "pixel": {"method_args.lambda_image": 0.0, "method_args.lambda_region": 0.0},
    "no_image": {"method_args.lambda_image": 0.0},
    "no_region": {"method_args.lambda_region": 0.0},
}
