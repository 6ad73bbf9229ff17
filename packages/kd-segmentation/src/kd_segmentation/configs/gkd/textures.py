# ruff: noqa: C408
# small.py with a longer training: a teacher that has seen more, and stages that have time to follow it. About 35
# minutes of one CPU core a seed for all arms; a seed's teacher is trained once.
_base_ = ["small.py"]
method = "gkd"

proxy, own, task = 1500, 250, 300  # steps
together = proxy + own + task


def cosine(steps):
    return [
        dict(type="LinearLR", start_factor=0.1, by_epoch=False, begin=0, end=50),
        dict(type="CosineAnnealingLR", eta_min=1e-5, by_epoch=False, begin=50, end=steps),
    ]


def loop(steps):
    return dict(type="IterBasedTrainLoop", max_iters=steps, val_interval=steps)


adamw = dict(type="OptimWrapper", optimizer=dict(type="AdamW", lr=2e-3, weight_decay=0.05))


def stage(name, split, steps, *more):
    """Images of a split without their labels, augmented as in small.py."""
    pipeline = [
        dict(type="LoadImageFromFile"),
        dict(type="LoadAnnotations"),
        dict(type="RandomFlip", prob=0.5),
        dict(type="RandomFlip", prob=0.5, direction="vertical"),
        *more,
        dict(type="PhotoMetricDistortion"),
        dict(type="PackSegInputs"),
    ]
    return dict(
        name=name,
        train_cfg=dict(type="IterBasedTrainLoop", max_iters=steps),
        train_dataloader=dict(
            batch_size=16,
            num_workers=0,
            sampler=dict(type="InfiniteSampler", shuffle=True),
            dataset=dict(type="TextureMosaicDataset", split=split, pipeline=pipeline),
        ),
        optim_wrapper=adamw,
        param_scheduler=cosine(steps),
    )


train_cfg = loop(task)
param_scheduler = cosine(task)
teacher_training = dict(train_cfg=loop(5000), param_scheduler=cosine(5000))
method_args = dict(
    representation=[
        stage("task_agnostic", "broad", proxy, dict(type="RandomShift", prob=0.5)),
        stage("domain_agnostic", "train", own),
    ]
)

one_stage = {
    "train_cfg.max_iters": together,
    "train_cfg.val_interval": together,
    "param_scheduler": cosine(together),
}
compare = {
    "_delete_": True,
    "ce": {"method": "cwd", "method_args.losses": {}, **one_stage},
    "kd": {"method": "cwd", "method_args.losses": {"kl": {"type": "PixelKL"}}, **one_stage},
    "joint": {"method_args.joint": True, **one_stage},
    "mse": {"method_args.query": False},
    "finetuned": {"method_args.freeze": False},
    "domain_alone": {"method_args.representation": [stage("domain_agnostic", "train", proxy + own)]},
}
