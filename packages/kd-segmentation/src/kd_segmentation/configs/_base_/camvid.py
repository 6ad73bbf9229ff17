# ruff: noqa: C408
# CamVid at 160 x 120 under $KD_DATA/camvid, 11 classes; void is ignored.
_base_ = ["runtime.py"]

crop_size = (96, 96)
data_preprocessor = dict(
    type="SegDataPreProcessor",
    mean=[123.675, 116.28, 103.53],
    std=[58.395, 57.12, 57.375],
    bgr_to_rgb=True,
    pad_val=0,
    seg_pad_val=255,
    size=crop_size,
    test_cfg=dict(size_divisor=32),
)
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(type="RandomResize", scale=(160, 120), ratio_range=(0.9, 1.6), keep_ratio=True),
    dict(type="RandomCrop", crop_size=crop_size),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(type="PackSegInputs"),
]
train_dataloader = dict(
    batch_size=8,
    num_workers=0,
    sampler=dict(type="InfiniteSampler", shuffle=True),
    dataset=dict(type="CamVidDataset", split="train", pipeline=train_pipeline),
)
test_dataloader = dict(
    batch_size=8,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(type="CamVidDataset", split="val", pipeline=test_pipeline),
)
val_dataloader = test_dataloader
labelled = "{{fileDirname}}/camvid_1_8/labelled.txt"
unlabelled = "{{fileDirname}}/camvid_1_8/unlabelled.txt"
