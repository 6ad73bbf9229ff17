"""Speed and memory: head and divergence in one, relations over all pairs in chunks, teacher outputs on disk.

    linear_divergence    divergence between two language-model heads without a (tokens, vocabulary) tensor;
    linear_loss          cross-entropy and distillation terms of one head from a single pass over it, the same way;
    CrossEntropy, Dense, Sparse         its terms: labels, a teacher's hidden rows and head, a teacher's top k
    HeadSpec             the logit scale and softcap of such a head
    chunked_pairwise     sum over all pairs of samples, a block of rows at a time
    relation_mse         mean squared difference of two relation matrices, by chunked_pairwise
    TeacherCache         teacher outputs in memory-mapped shards: `create` gives a writer, `open` a reader
    TopK, topk_kl        a teacher's k most probable outputs, and the divergence to them
    module_fingerprint, data_fingerprint    content hashes that a cache is checked against

`linear_divergence` and `linear_loss` here are the functions; their modules are reached by
`from kdcore.gpu.linear_divergence import ...`.
"""

from kdcore.gpu.linear_divergence import HeadSpec, linear_divergence
from kdcore.gpu.linear_loss import CrossEntropy, Dense, LinearLoss, Sparse, linear_loss
from kdcore.gpu.pairwise import chunked_pairwise, relation_mse
from kdcore.gpu.teacher_cache import TeacherCache, TopK, data_fingerprint, module_fingerprint, topk_kl

__all__ = [
    "CrossEntropy",
    "Dense",
    "HeadSpec",
    "LinearLoss",
    "Sparse",
    "TeacherCache",
    "TopK",
    "chunked_pairwise",
    "data_fingerprint",
    "linear_divergence",
    "linear_loss",
    "module_fingerprint",
    "relation_mse",
    "topk_kl",
]
