# ruff: noqa: C408
# Pascal VOC 2012 with the augmented list, 1/8 labelled: what differs from Cityscapes. Data in mmseg's layout under
# $VOC: JPEGImages, SegmentationClassAug, and the two lists of names, as `python -m kd_segmentation.splits` writes them.
# "release" is JayQine/MGD-SSSS, exp.voc/voc8.resnet18_deeplabv3plus: train.py, config.py, script.sh.
_base_ = ["paper.py"]
method = "mgd"

data_root = "{{$VOC:data/VOCdevkit/VOC2012}}"
crop_size = (512, 512)  # source: release config.py
preprocessor = dict(size=crop_size)  # source: release config.py
network = dict(  # source: release config.py
    data_preprocessor=preprocessor,
    decode_head=dict(num_classes=21),
    test_cfg=dict(mode="slide", crop_size=crop_size, stride=(341, 341)),
)
model = dict(
    student=network,
    teachers=dict(wide=dict(model=network), deep=dict(model=network)),  # source: release config.py
    distiller=dict(
        lambda_image=2e-3,  # source: release config.py
        lambda_region=100.0,  # source: release config.py
        supervised="ce",  # source: release train.py
    ),
)

voc = dict(
    type="PascalVOCDataset",
    data_root=data_root,
    data_prefix=dict(img_path="JPEGImages", seg_map_path="SegmentationClassAug"),
    pipeline=[  # source: release config.py
        dict(type="LoadImageFromFile"),
        dict(type="LoadAnnotations"),
        dict(type="RandomFlip", prob=0.5),
        dict(
            type="RandomChoice",
            transforms=[[dict(type="Resize", scale_factor=factor)] for factor in (0.5, 0.75, 1.0, 1.5, 1.75, 2.0)],
        ),
        dict(type="RandomCrop", crop_size=crop_size),
        dict(type="PackSegInputs"),
    ],
)
train_dataloader = dict(
    batch_size=2,  # source: release script.sh (8 on 4 GPUs)
    dataset=dict(
        _delete_=True,
        type="StreamDataset",
        labelled=dict(**voc, ann_file="splits/1_8/labelled.txt"),  # source: release config.py (1/8)
        unlabelled=dict(**voc, ann_file="splits/1_8/unlabelled.txt"),  # source: release config.py
    ),
)
test_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type="PascalVOCDataset",
        data_root=data_root,
        data_prefix=dict(img_path="JPEGImages", seg_map_path="SegmentationClass"),
        ann_file="ImageSets/Segmentation/val.txt",  # source: release config.py
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="LoadAnnotations"),
            dict(type="PackSegInputs"),
        ],
    ),
)
val_dataloader = test_dataloader
optim_wrapper = dict(optimizer=dict(lr=0.01))  # source: release script.sh, train.py (.0025 times 4 GPUs)
# 34 epochs of the 9260 unlabelled images in batches of 8.
param_scheduler = [
    dict(type="PolyLR", eta_min=0.0, power=0.9, begin=0, end=39338, by_epoch=False),  # source: release config.py
]
train_cfg = dict(max_iters=39338)  # source: release config.py
teacher_training = dict(
    train_cfg=dict(max_iters=39338),  # source: release config.py
    optim_wrapper=optim_wrapper,
    param_scheduler=param_scheduler,
)
