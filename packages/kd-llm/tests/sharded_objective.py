"""A student sharded by FSDP2 over two CPU processes: the objective's loss and gradients are those of the whole one."""

from __future__ import annotations

import sys

import torch
from torch.distributed.fsdp import fully_shard
from transformers import TrainingArguments

from kd_llm.engine.objective import DivergenceArgs
from kd_llm.integrations.trainer import DistillTrainer
from kd_llm.testing import collate, examples, tiny_model

torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()


def make():
    args = TrainingArguments(sys.argv[1], report_to="none", use_cpu=True, average_tokens_across_devices=False)
    teacher = tiny_model("llama", width=24, seed=2)
    distill = DivergenceArgs(hard_weight=0.5)
    return DistillTrainer(tiny_model("llama").eval(), args, teacher=teacher, distill=distill, data_collator=collate)


whole, sharded = make(), make()
for layer in sharded.model.model.layers:
    fully_shard(layer)
fully_shard(sharded.model)
batch = collate(examples(4, seed=rank))
expected = whole.compute_loss(whole.model, batch)
expected.backward()
found = sharded.compute_loss(sharded.model, batch)
found.backward()
torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
for (name, a), (_, b) in zip(whole.model.named_parameters(), sharded.model.named_parameters(), strict=True):
    torch.distributed.all_reduce(a.grad)
    torch.testing.assert_close(b.grad.full_tensor(), a.grad / 2, rtol=1e-4, atol=1e-6, msg=name)
print("equal", type(sharded.model).__name__)
torch.distributed.destroy_process_group()
