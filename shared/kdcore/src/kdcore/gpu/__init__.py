"""Speed and memory: head and divergence in one, relations over all pairs in chunks, teacher outputs on disk."""

from kdcore.gpu.linear_divergence import HeadSpec, linear_divergence
from kdcore.gpu.pairwise import chunked_pairwise, relation_mse
from kdcore.gpu.teacher_cache import TeacherCache, TopK, data_fingerprint, module_fingerprint, topk_kl

__all__ = [
    "HeadSpec",
    "TeacherCache",
    "TopK",
    "chunked_pairwise",
    "data_fingerprint",
    "linear_divergence",
    "module_fingerprint",
    "relation_mse",
    "topk_kl",
]
