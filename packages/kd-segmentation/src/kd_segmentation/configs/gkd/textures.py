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


def longer(stage, steps):
    """A stage of small.py with another length."""
    return {
        **stage,
        "train_cfg": dict(type="IterBasedTrainLoop", max_iters=steps),
        "param_scheduler": cosine(steps),
    }


train_cfg = loop(task)
param_scheduler = cosine(task)
teacher_training = dict(train_cfg=loop(5000), param_scheduler=cosine(5000))
method_args = dict(
    representation=[
        longer(_base_.method_args.representation[0], proxy),
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
