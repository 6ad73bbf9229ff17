# ruff: noqa: C408
# Runs anywhere without a download: texture mosaics, measured on the same scenes under five shifts of the domain.
# No foundation model comes along, so a larger transformer is trained on the spot on what stands for its data: mosaics
# with other photographs, of all sizes and under shifts. As in the paper the student meets those images without labels
# (task-agnostic), then the images of its own domain without labels (domain-agnostic), then the labels of its domain.
# Arms of one stage take as many steps as all stages together.
_base_ = ["../_base_/textures.py", "../_base_/small_vits.py"]
method = "gkd"


def of(network):
    return {**network, "data_preprocessor": _base_.data_preprocessor}


model = dict(
    type="DistilledSegmentor",
    student=of(_base_.small_vit),
    teachers=dict(teacher=dict(model=of(_base_.large_vit))),
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
proxy, own, task = 300, 100, 150  # steps
together = proxy + own + task


def images(split, *more):
    return dict(
        batch_size=16,
        num_workers=0,
        sampler=dict(type="InfiniteSampler", shuffle=True),
        dataset=dict(type="TextureMosaicDataset", split=split, pipeline=pipeline(*more)),
    )


strong = dict(type="PhotoMetricDistortion")  # for representation, as the paper's random augmentation
shifted = dict(type="RandomShift", prob=0.5)  # the teacher's data again


def stage(name, split, steps, *more):
    return dict(
        name=name,
        train_cfg=dict(type="IterBasedTrainLoop", max_iters=steps),
        train_dataloader=images(split, *more, strong),
        **adamw(2e-3, steps),
    )


train_dataloader = dict(batch_size=16, dataset=dict(pipeline=pipeline(jitter)))
optim_wrapper = adamw(2e-3, task)["optim_wrapper"]
param_scheduler = adamw(2e-3, task)["param_scheduler"]
train_cfg = dict(type="IterBasedTrainLoop", max_iters=task, val_interval=task)
broad = images("broad", shifted, jitter)
broad["dataset"] = dict(type="ConcatDataset", datasets=[broad["dataset"], images("train", jitter)["dataset"]])
teacher_training = dict(
    train_cfg=dict(type="IterBasedTrainLoop", max_iters=800, val_interval=800),
    train_dataloader=broad,
    **adamw(2e-3, 800),
)
method_args = dict(
    representation=[
        stage("task_agnostic", "broad", proxy, shifted),
        stage("domain_agnostic", "train", own),
    ]
)
domains = {name: dict(split=f"val_{name}") for name in ("illumination", "blur", "noise", "colour", "scale")}

one_stage = {
    "train_cfg.max_iters": together,
    "train_cfg.val_interval": together,
    "param_scheduler": adamw(2e-3, together)["param_scheduler"],
}
compare = {
    "ce": {"method": "cwd", "method_args.losses": {}, **one_stage},
    "kd": {"method": "cwd", "method_args.losses": {"kl": {"type": "PixelKL"}}, **one_stage},
    "joint": {"method_args.joint": True, **one_stage},
    "mse": {"method_args.query": False},
    "finetuned": {"method_args.freeze": False},
    "domain_alone": {"method_args.representation": [stage("domain_agnostic", "train", proxy + own)]},
}
