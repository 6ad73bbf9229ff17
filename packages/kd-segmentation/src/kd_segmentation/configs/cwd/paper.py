# ruff: noqa: C408
# PSPNet-ResNet101 -> PSPNet-ResNet18 on Cityscapes, logits.
# "release" is irfanICMLL/TorchDistiller, SemSeg-distill: its README and exp_cwd.sh; PSPNet as in mmseg's own configs.
_base_ = ["../_base_/cityscapes.py"]
method = "cwd"

norm_cfg = dict(type="SyncBN", requires_grad=True)  # source: mmseg pspnet_r50-d8
student = dict(
    type="EncoderDecoder",
    data_preprocessor={{_base_.data_preprocessor}},
    backbone=dict(
        type="ResNetV1c",
        depth=18,  # source: release README (ResNet-18 pre-trained on ImageNet)
        num_stages=4,  # source: mmseg pspnet_r50-d8
        out_indices=(0, 1, 2, 3),  # source: mmseg pspnet_r50-d8
        dilations=(1, 1, 2, 4),  # source: mmseg pspnet_r50-d8
        strides=(1, 2, 1, 1),  # source: mmseg pspnet_r50-d8
        norm_cfg=norm_cfg,  # source: mmseg pspnet_r50-d8
        contract_dilation=True,  # source: mmseg pspnet_r50-d8
        init_cfg=dict(type="Pretrained", checkpoint="open-mmlab://resnet18_v1c"),  # source: release README
    ),
    decode_head=dict(  # source: mmseg pspnet_r18-d8
        type="PSPHead",
        in_channels=512,
        in_index=3,
        channels=128,
        pool_scales=(1, 2, 3, 6),
        dropout_ratio=0.1,
        num_classes=19,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0),
    ),
    auxiliary_head=dict(  # source: mmseg pspnet_r18-d8
        type="FCNHead",
        in_channels=256,
        in_index=2,
        channels=64,
        num_convs=1,
        concat_input=False,
        dropout_ratio=0.1,
        num_classes=19,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=0.4),
    ),
    train_cfg=dict(),
    test_cfg=dict(mode="whole"),  # not confirmed
)
teacher = dict(
    type="EncoderDecoder",
    data_preprocessor={{_base_.data_preprocessor}},
    backbone=dict(  # source: mmseg pspnet_r101-d8
        type="ResNetV1c",
        depth=101,
        num_stages=4,
        out_indices=(0, 1, 2, 3),
        dilations=(1, 1, 2, 4),
        strides=(1, 2, 1, 1),
        norm_cfg=norm_cfg,
        contract_dilation=True,
    ),
    decode_head=dict(  # source: mmseg pspnet_r101-d8
        type="PSPHead",
        in_channels=2048,
        in_index=3,
        channels=512,
        pool_scales=(1, 2, 3, 6),
        dropout_ratio=0.1,
        num_classes=19,
        norm_cfg=norm_cfg,
        align_corners=False,
    ),
    auxiliary_head=dict(  # source: mmseg pspnet_r101-d8
        type="FCNHead",
        in_channels=1024,
        in_index=2,
        channels=256,
        num_convs=1,
        concat_input=False,
        num_classes=19,
        norm_cfg=norm_cfg,
        align_corners=False,
    ),
    train_cfg=dict(),
    test_cfg=dict(mode="whole"),  # not confirmed
)
# The checkpoint: pspnet_r101-d8 on Cityscapes from mmseg's model zoo, with its state dict alone.
checkpoint = "{{$TEACHER:pspnet_r101-d8_cityscapes.pth}}"
model = dict(
    type="DistilledSegmentor",
    student=student,
    teachers=dict(teacher=dict(model=teacher, checkpoint=checkpoint)),  # source: release README (PSPNet, ResNet-101)
    distiller=dict(
        type="CWD",
        losses=dict(channel=dict(type="ChannelKL", weight=3.0, temperature=4.0)),  # source: release README
    ),
)

optim_wrapper = dict(
    type="OptimWrapper", optimizer=dict(type="SGD", lr=0.01, momentum=0.9, weight_decay=5e-4)
)  # not confirmed
param_scheduler = [
    dict(type="PolyLR", eta_min=0.0, power=0.9, begin=0, end=40000, by_epoch=False),  # not confirmed
]
train_cfg = dict(
    type="IterBasedTrainLoop",
    max_iters=40000,  # source: release exp_cwd.sh (city_39999_G.pth)
    val_interval=4000,  # not confirmed
)

compare = {
    "ce": {"method_args.losses": {}},
    "pixel_kl": {"method_args.losses": {"kl": {"type": "PixelKL", "temperature": 1.0}}},
}
