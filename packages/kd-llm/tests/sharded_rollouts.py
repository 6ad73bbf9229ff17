"""A model sharded by FSDP2 over two CPU processes samples what the whole one does, for prompts of different lengths."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch.distributed.fsdp import fully_shard

from kd_llm.engine.rollouts import HFRollouts, Sampling
from kd_llm.testing import tiny_model

torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
rollouts = HFRollouts(SimpleNamespace(eos_token_id=1, pad_token_id=0))
prompts = [torch.tensor([4, 5, 6][: 1 + rank]), torch.tensor([7])]
whole, sharded = tiny_model("llama"), tiny_model("llama")
for layer in sharded.model.layers:
    fully_shard(layer)
fully_shard(sharded)
lengths, sampling = [], Sampling(max_new_tokens=4 * (1 + rank))  # one process ends before the other
for seed in range(4):
    expected = rollouts.generate(whole, prompts, 1, sampling, seed + 10 * rank)
    found = rollouts.generate(sharded, prompts, 1, sampling, seed + 10 * rank)
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a.ids, b.ids)
        torch.testing.assert_close(a.logp, b.logp, rtol=1e-4, atol=1e-5)
    lengths.append(max(len(r.logp) for r in found))
everyone: list = [None, None]
torch.distributed.all_gather_object(everyone, lengths)
assert everyone[0] != everyone[1]
torch.distributed.destroy_process_group()
