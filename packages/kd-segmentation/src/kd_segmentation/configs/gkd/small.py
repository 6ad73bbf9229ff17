# ruff: noqa: C408
# Runs anywhere without a download: texture mosaics, measured on the same scenes under five shifts of the domain.
# No foundation model comes along, so the teacher is trained on the spot to be robust: a larger transformer that sees
# the labelled mosaics under the kinds of shift that the student never sees.
_base_ = ["../_base_/textures.py"]
method = "gkd"

loss_decode = dict(type="CrossEntropyLoss", use_sigmoid=False, avg_non_ignore=True, loss_weight=1.0)


def network(dim, depth, heads, channels):
    """A segmentor on timm's vision transformer, patches of 8 pixels."""
    return dict(
        type="EncoderDecoder",
        data_preprocessor=_base_.data_preprocessor,
        backbone=dict(
            type="TIMMBackbone",
            model_name="vit_tiny_patch16_224",
            pretrained=False,
            img_size=64,
            patch_size=8,
            embed_dim=dim,
            depth=depth,
            num_heads=heads,
            out_indices=(depth // 2 - 1, depth - 1),
        ),
        decode_head=dict(
            type="SegformerHead",
            in_channels=[dim, dim],
            in_index=[0, 1],
            channels=channels,
            dropout_ratio=0.1,
            num_classes=6,
            norm_cfg=dict(type="BN", requires_grad=True),
            align_corners=False,
            loss_decode=loss_decode,
        ),
        train_cfg=dict(),
        test_cfg=dict(mode="whole"),
    )


model = dict(
    type="DistilledSegmentor",
    student=network(48, 4, 3, 48),
    teachers=dict(teacher=dict(model=network(96, 4, 4, 64))),
    distiller=dict(type="GKD", token=1.0, feature=1.0, patch=1.0),
)


def pipeline(*more):
    return [
        dict(type="LoadImageFromFile"),
        dict(type="LoadAnnotations"),
        dict(type="RandomFlip", prob=0.5),
        dict(type="RandomFlip", prob=0.5, direction="vertical"),
        *more,
        dict(type="PackSegInputs"),
    ]


def adamw(lr, steps):
    return dict(
        optim_wrapper=dict(type="OptimWrapper", optimizer=dict(type="AdamW", lr=lr, weight_decay=0.05)),
        param_scheduler=[
            dict(type="LinearLR", start_factor=0.1, by_epoch=False, begin=0, end=20),
            dict(type="CosineAnnealingLR", eta_min=1e-5, by_epoch=False, begin=20, end=steps),
        ],
    )


jitter = dict(type="PhotoMetricDistortion", brightness_delta=16, contrast_range=(0.8, 1.2), hue_delta=6)
train_dataloader = dict(batch_size=16, dataset=dict(pipeline=pipeline(jitter)))
optim_wrapper = adamw(2e-3, 120)["optim_wrapper"]
param_scheduler = adamw(2e-3, 120)["param_scheduler"]
train_cfg = dict(type="IterBasedTrainLoop", max_iters=120, val_interval=120)
teacher_training = dict(
    train_cfg=dict(type="IterBasedTrainLoop", max_iters=300, val_interval=300),
    train_dataloader=dict(
        batch_size=16,
        num_workers=0,
        sampler=dict(type="InfiniteSampler", shuffle=True),
        dataset=dict(
            type="TextureMosaicDataset", split="train", pipeline=pipeline(dict(type="RandomShift", prob=0.7), jitter)
        ),
    ),
    **adamw(2e-3, 300),
)
method_args = dict(
    representation=[
        dict(
            name="representation",
            train_cfg=dict(type="IterBasedTrainLoop", max_iters=200),
            train_dataloader=dict(
                batch_size=16,
                num_workers=0,
                sampler=dict(type="InfiniteSampler", shuffle=True),
                dataset=dict(type="TextureMosaicDataset", split="train", pipeline=pipeline(jitter)),
            ),
            **adamw(2e-3, 200),
        )
    ]
)
domains = {name: dict(split=f"val_{name}") for name in ("illumination", "blur", "noise", "colour", "scale")}

compare = {
    "ce": {"method": "cwd", "method_args.losses": {}},
    "kd": {"method": "cwd", "method_args.losses": {"kl": {"type": "PixelKL"}}},
    "joint": {"method_args.joint": True},
    "mse": {"method_args.query": False},
    "finetuned": {"method_args.freeze": False},
}
