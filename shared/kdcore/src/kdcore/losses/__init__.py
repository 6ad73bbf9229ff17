"""Distillation losses: pure functions, tensors in, tensor out; they import torch and nothing of ours besides.

    from kdcore.losses import soft_target_kl
    loss = soft_target_kl(student(images), teacher_logits, temperature=4.0)

One file a family: logits, divergences, features, relations, mmd, attention, adversarial. Shared conventions: half
precision is computed in float32, float64 stays; nothing is detached (compute the teacher under no_grad); reduction
"batchmean" is the mean over rows and "none" gives one value a row; wrong arguments raise ValueError by name.
"""

from kdcore.losses.adversarial import (
    hinge_discriminator,
    hinge_generator,
    non_saturating_discriminator,
    non_saturating_generator,
    r1_penalty,
)
from kdcore.losses.attention import attention_map, attention_transfer
from kdcore.losses.divergences import (
    forward_kl,
    jensen_shannon,
    reverse_kl,
    skewed_kl,
    symmetric_kl,
    total_variation,
)
from kdcore.losses.features import cosine_distance, feature_norm, hint_mse, normalised_mse
from kdcore.losses.logits import (
    dist,
    dkd,
    focal_distillation,
    focal_weights,
    soft_target_kl,
    standardise_logits,
)
from kdcore.losses.mmd import mmd
from kdcore.losses.relations import (
    cka_linear,
    cka_minibatch,
    cka_unbiased,
    hsic_unbiased,
    pearson_correlation,
    rkd_angle,
    rkd_distance,
    similarity_preserving,
)

__all__ = [
    "attention_map",
    "attention_transfer",
    "cka_linear",
    "cka_minibatch",
    "cka_unbiased",
    "cosine_distance",
    "dist",
    "dkd",
    "feature_norm",
    "focal_distillation",
    "focal_weights",
    "forward_kl",
    "hinge_discriminator",
    "hinge_generator",
    "hint_mse",
    "hsic_unbiased",
    "jensen_shannon",
    "mmd",
    "non_saturating_discriminator",
    "non_saturating_generator",
    "normalised_mse",
    "pearson_correlation",
    "r1_penalty",
    "reverse_kl",
    "rkd_angle",
    "rkd_distance",
    "similarity_preserving",
    "skewed_kl",
    "soft_target_kl",
    "standardise_logits",
    "symmetric_kl",
    "total_variation",
]
