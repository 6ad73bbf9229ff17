# ruff: noqa: C408
# CamVid with 1/8 of the labels: 46 labelled, 321 unlabelled street scenes; up to a quarter of an hour of one CPU core a
# student, and 20 minutes for each teacher. As in the paper the teachers see the same labels, but nothing was
# pre-trained: they are larger than the student, learn for longer, and from the labels alone first. One pair serves all
# seeds.
_base_ = ["../_base_/camvid.py"]
method = "mgd"

norm_cfg = dict(type="BN", requires_grad=True)
loss_decode = dict(type="CrossEntropyLoss", use_sigmoid=False, avg_non_ignore=True, loss_weight=1.0)

steps, teacher_steps = 2000, 2500


def network(depth, width, channels):
    """DeepLabV3+ on a ResNetV1c of a base width, output stride 8."""
    return dict(
        type="EncoderDecoder",
        data_preprocessor=_base_.data_preprocessor,
        backbone=dict(
            type="ResNetV1c",
            depth=depth,
            base_channels=width,
            stem_channels=width,
            num_stages=4,
            out_indices=(0, 3),
            strides=(1, 2, 1, 1),
            dilations=(1, 1, 2, 4),
            norm_cfg=norm_cfg,
        ),
        decode_head=dict(
            type="DepthwiseSeparableASPPHead",
            in_channels=8 * width,
            in_index=1,
            channels=channels,
            dilations=(1, 2, 4),
            c1_in_channels=width,
            c1_channels=24,
            dropout_ratio=0.1,
            num_classes=11,
            norm_cfg=norm_cfg,
            align_corners=False,
            loss_decode=loss_decode,
        ),
        train_cfg=dict(),
        test_cfg=dict(mode="whole"),
    )


model = dict(
    type="DistilledSegmentor",
    student=network(18, 12, 48),
    teachers=dict(wide=dict(model=network(18, 24, 64)), deep=dict(model=network(34, 16, 64))),
    distiller=dict(type="MGD", lambda_image=1e-3, lambda_region=5.0, regions=7),
)

train_dataloader = dict(
    batch_size=4,
    dataset=dict(
        _delete_=True,
        type="StreamDataset",
        labelled=dict(type="CamVidDataset", ann_file=_base_.labelled, pipeline=_base_.train_pipeline),
        unlabelled=dict(type="CamVidDataset", ann_file=_base_.unlabelled, pipeline=_base_.train_pipeline),
    ),
)
optim_wrapper = dict(type="OptimWrapper", optimizer=dict(type="AdamW", lr=3e-3, weight_decay=0.01))
param_scheduler = [dict(type="PolyLR", eta_min=0.0, power=0.9, begin=0, end=steps, by_epoch=False)]
train_cfg = dict(type="IterBasedTrainLoop", max_iters=steps, val_interval=500)
teacher_training = dict(
    algorithm="cps",
    cps_start=1500,
    seed=0,
    train_cfg=dict(type="IterBasedTrainLoop", max_iters=teacher_steps, val_interval=500),
    optim_wrapper=dict(type="OptimWrapper", optimizer=dict(type="AdamW", lr=3e-3, weight_decay=0.01)),
    param_scheduler=[dict(type="PolyLR", eta_min=0.0, power=0.9, begin=0, end=teacher_steps, by_epoch=False)],
)

nothing = {
    "method_args.pixel_labelled": 0.0,
    "method_args.pixel_unlabelled": 0.0,
    "method_args.lambda_image": 0.0,
    "method_args.lambda_region": 0.0,
}
compare = {
    "ce": nothing,
    "kd": {"method": "cwd", "method_args.losses": {"kl": {"type": "PixelKL", "source": "deep"}}},
    "cps": {"method_args.baseline": "cps", "method_args.cps_start": 1200},
    "pixel": {"method_args.lambda_image": 0.0, "method_args.lambda_region": 0.0},
    "no_image": {"method_args.lambda_image": 0.0},
    "no_region": {"method_args.lambda_region": 0.0},
}
