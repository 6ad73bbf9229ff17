"""Speed and memory: head and divergence in one, relations over all pairs in chunks, teacher outputs on disk.

    linear_divergence    divergence between two language-model heads without a (tokens, vocabulary) tensor;
    HeadSpec             the logit scale and softcap of such a head
    chunked_pairwise     sum over all pairs of samples, a block of rows at a time
    relation_mse         mean squared difference of two relation matrices, by chunked_pairwise
    TeacherCache         teacher outputs in memory-mapped shards: `create` gives a writer, `open` a reader
    TopK, topk_kl        a teacher's k most probable outputs, and the divergence to them
    module_fingerprint, data_fingerprint    content hashes that a cache is checked against

`linear_divergence` here is the function; its module is reached by `from kdcore.gpu.linear_divergence import ...`.
"""

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
