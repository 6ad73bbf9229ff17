# ruff: noqa: C408
# small.py with what makes a foundation model one: 6000 broad images instead of 800, time to learn from them, and one
# network for the runs of all seeds; the stages of representation have time to follow. The teacher takes a quarter of an
# hour of one CPU core, all arms of a seed 40 minutes.
_base_ = ["small.py"]
method = "gkd"

proxy, own, task = 4000, 800, 500  # steps
together = proxy + own + task


def cosine(steps):
    return [
        dict(type="LinearLR", start_factor=0.1, by_epoch=False, begin=0, end=50),
        dict(type="CosineAnnealingLR", eta_min=1e-5, by_epoch=False, begin=50, end=steps),
    ]


def loop(steps):
    return dict(type="IterBasedTrainLoop", max_iters=steps, val_interval=steps)


def longer(stage, steps, lr=2e-3, images=None):
    """A stage of small.py with another length, rate, and number of images in its broad split."""
    dataset = {**stage["train_dataloader"]["dataset"], "broad": images}
    return {
        **stage,
        "train_cfg": dict(type="IterBasedTrainLoop", max_iters=steps),
        "train_dataloader": {**stage["train_dataloader"], "dataset": dataset},
        "optim_wrapper": dict(type="OptimWrapper", optimizer=dict(type="AdamW", lr=lr, weight_decay=0.05)),
        "param_scheduler": cosine(steps),
    }


train_cfg = loop(task)
param_scheduler = cosine(task)
generic, own_images = _base_.teacher_training.train_dataloader.dataset.datasets
mixture = [{**generic, "broad": 6000}, dict(type="RepeatDataset", times=8, dataset=own_images)]
teacher_training = dict(
    seed=0,
    train_cfg=loop(10000),
    param_scheduler=cosine(10000),
    train_dataloader=dict(dataset=dict(datasets=mixture)),
)
method_args = dict(
    representation=[
        longer(_base_.method_args.representation[0], proxy, lr=6e-3, images=6000),
        longer(_base_.method_args.representation[1], own),
    ]
)

one_stage = {
    "train_cfg.max_iters": together,
    "train_cfg.val_interval": together,
    "param_scheduler": cosine(together),
}
compare = {
    "ce": one_stage,
    "kd": one_stage,
    "joint": one_stage,
    "domain_alone": {"method_args.representation": [longer(_base_.method_args.representation[1], proxy + own)]},
}
