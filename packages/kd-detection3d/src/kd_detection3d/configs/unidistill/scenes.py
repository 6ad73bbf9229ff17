# ruff: noqa: C408
# small.py with a longer training of teacher and student: about 25 minutes of one CPU core a seed for all arms; a seed's
# teacher is trained once.
_base_ = ["small.py"]
method = "unidistill"

steps = 800


def schedule():
    return [
        dict(type="LinearLR", start_factor=0.1, begin=0, end=15, by_epoch=False),
        dict(type="CosineAnnealingLR", T_max=steps - 15, eta_min=1e-5, begin=15, end=steps, by_epoch=False),
    ]


train_cfg = dict(max_iters=steps, val_interval=steps)
param_scheduler = schedule()
teacher_training = dict(train_cfg=dict(max_iters=steps, val_interval=steps), param_scheduler=schedule())
