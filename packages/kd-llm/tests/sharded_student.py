"""A student sharded by FSDP2 over two CPU processes: loss and gradients of the whole one; a training and its resume.

accelerate turns FSDP on for accelerators only, so the state it keeps is set by hand for the training.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, TrainingArguments

from kd_llm.engine.objective import DivergenceArgs
from kd_llm.integrations.trainer import DistillTrainer
from kd_llm.testing import collate, examples, tiny_model

torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
rank, folder = torch.distributed.get_rank(), Path(sys.argv[1])


# ---------------------------------------------------------------- one batch


def make():
    args = TrainingArguments(str(folder), report_to="none", use_cpu=True, average_tokens_across_devices=False)
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
assert type(sharded.model).__name__ == "FSDPLlamaForCausalLM"


# ---------------------------------------------------------------- a training


class Sharded(DistillTrainer):
    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        for state in (PartialState, AcceleratorState):
            state._shared_state["distributed_type"] = DistributedType.FSDP
        self.accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            cpu_ram_efficient_loading=False,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
            state_dict_type="FULL_STATE_DICT",
        )
        self.is_fsdp_enabled = True


def trained(name: str, resume: str | None = None) -> tuple[DistillTrainer, dict[str, torch.Tensor]]:
    args = TrainingArguments(
        str(folder / name),
        max_steps=4,
        save_steps=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        log_level="error",
    )
    trainer = Sharded(
        tiny_model("llama"),
        args,
        teacher=tiny_model("llama", width=24, seed=2),
        distill=DivergenceArgs(divergence="js", hard_weight=0.5),
        train_dataset=examples(40),
        data_collator=collate,
    )
    trainer.train(resume_from_checkpoint=resume)
    parameters = dict(trainer.model.named_parameters())
    assert all(isinstance(p, DTensor) for p in parameters.values())
    return trainer, {name: p.full_tensor().detach() for name, p in parameters.items()}


_, straight = trained("straight")
resumed, weights = trained("resumed", str(folder / "straight" / "checkpoint-2"))
assert resumed.state.global_step == 4
for name, value in tiny_model("llama").named_parameters():
    assert torch.equal(weights[name], straight[name]), name
    assert not torch.equal(weights[name], value), name
resumed.save_model(str(folder / "student"))
torch.distributed.barrier()
student = AutoModelForCausalLM.from_pretrained(folder / "student")
for name, value in student.named_parameters():
    assert torch.equal(value, straight[name]), name
assert sorted(path.name for path in (folder / "straight").iterdir()) == ["checkpoint-2", "checkpoint-4"]
torch.distributed.destroy_process_group()
