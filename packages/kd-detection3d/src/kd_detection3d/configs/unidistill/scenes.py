# ruff: noqa: C408
# small.py with a longer training of teacher and student: about 25 minutes of one CPU core a seed for all arms; a seed's
# teacher is trained once.
_base_ = ["small.py"]
method = "unidistill"

steps = 800

warmup, cosine = _base_.param_scheduler
train_cfg = dict(max_iters=steps, val_interval=steps)
param_scheduler = [warmup, dict(cosine, T_max=steps - warmup["end"], end=steps)]
teacher_training = dict(train_cfg=train_cfg, param_scheduler=param_scheduler)
