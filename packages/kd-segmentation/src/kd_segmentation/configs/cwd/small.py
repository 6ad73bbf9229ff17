# ruff: noqa: C408
# Runs anywhere without a download: texture mosaics, a teacher trained on the spot, a student of a tenth of its size.
_base_ = ["../_base_/textures.py"]
method = "cwd"

norm_cfg = dict(type="BN", requires_grad=True)
student = dict(
    type="EncoderDecoder",
    data_preprocessor={{_base_.data_preprocessor}},
    backbone=dict(
        type="ResNetV1c",
        depth=18,
        base_channels=8,
        stem_channels=8,
        num_stages=4,
        out_indices=(0, 3),
        strides=(1, 2, 1, 1),
        dilations=(1, 1, 2, 4),
        norm_cfg=norm_cfg,
    ),
    decode_head=dict(
        type="FCNHead",
        in_channels=64,
        in_index=1,
        channels=32,
        num_convs=1,
        concat_input=False,
        dropout_ratio=0.1,
        num_classes=6,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(type="CrossEntropyLoss", use_sigmoid=False, avg_non_ignore=True, loss_weight=1.0),
    ),
    train_cfg=dict(),
    test_cfg=dict(mode="whole"),
)
teacher = dict(
    type="EncoderDecoder",
    data_preprocessor={{_base_.data_preprocessor}},
    backbone=dict(
        type="ResNetV1c",
        depth=18,
        base_channels=24,
        stem_channels=24,
        num_stages=4,
        out_indices=(0, 3),
        strides=(1, 2, 1, 1),
        dilations=(1, 1, 2, 4),
        norm_cfg=norm_cfg,
    ),
    decode_head=dict(
        type="DepthwiseSeparableASPPHead",
        in_channels=192,
        in_index=1,
        channels=48,
        dilations=(1, 2, 4),
        c1_in_channels=24,
        c1_channels=16,
        dropout_ratio=0.1,
        num_classes=6,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(type="CrossEntropyLoss", use_sigmoid=False, avg_non_ignore=True, loss_weight=1.0),
    ),
    train_cfg=dict(),
    test_cfg=dict(mode="whole"),
)
model = dict(
    type="DistilledSegmentor",
    student=student,
    teachers=dict(teacher=dict(model=teacher)),
    distiller=dict(
        type="CWD",
        losses=dict(channel=dict(type="ChannelKL", weight=3.0, temperature=4.0)),
    ),
)

optim_wrapper = dict(type="OptimWrapper", optimizer=dict(type="AdamW", lr=3e-3, weight_decay=0.01))
param_scheduler = [dict(type="PolyLR", eta_min=0.0, power=0.9, begin=0, end=150, by_epoch=False)]
train_cfg = dict(type="IterBasedTrainLoop", max_iters=150, val_interval=150)
teacher_training = dict(
    train_cfg=dict(type="IterBasedTrainLoop", max_iters=200, val_interval=200),
    optim_wrapper=dict(type="OptimWrapper", optimizer=dict(type="AdamW", lr=3e-3, weight_decay=0.01)),
    param_scheduler=[dict(type="PolyLR", eta_min=0.0, power=0.9, begin=0, end=200, by_epoch=False)],
)

compare = {
    "ce": {"method_args.losses": {}},
    "pixel_kl": {"method_args.losses": {"kl": {"type": "PixelKL", "temperature": 1.0}}},
    "feature_mse": {
        "method_args.losses": {
            "feature": {
                "type": "FeatureMSE",
                "normalise": True,
                "student": "decode_head.convs",
                "teacher": "decode_head.sep_bottleneck",
                "connector": "conv1x1",
            }
        }
    },
}
