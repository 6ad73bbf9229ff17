"""Time and peak memory of a training step of language-model distillation: `kd_llm` against a plain trainer and TRL.

A step is forward, loss, backward and AdamW on one batch, driven through each trainer's own `training_step`, for a Llama
student of --layers layers and width d, embedding and head tied, and a teacher --teacher-scale times as wide and deep.
All in float32, forward KL on the completion (the last three quarters of every sequence), same weights, same batches.

    naive              transformers' Trainer with the loss one would write by hand: logits of both models for all
                       positions, torch.nn.functional.kl_div, masked mean
    kd                 kd_llm's DistillTrainer with the teacher in the process
    kd-cached          kd_llm's DistillTrainer with the teacher's --top-k outputs from a cache on disk (written before
                       the measurement; reading it is measured); the divergence keeps the tail as one outcome
    trl-gkd            TRL's GKDTrainer (lmbda 0: the data set's completions; beta 0: forward KL), logits of both models
    trl-distillation   TRL's DistillationTrainer, whose loss works in tiles. It generates its completions; here it is
                       given them, so its `_prepare_inputs` is replaced, and nothing else

TRL runs where `trl` is importable, in an environment with the packages of this workspace; else the reason is printed.

Time: one process, contenders interleaved in a new random order each round; a ratio is the median over the rounds of a
contender against `kd` in the same round, of wall-clock seconds and of the process's CPU seconds, which other processes
on the machine disturb less. Peak memory: a subprocess each, the kernel's high-water mark (Linux) or the
allocator's maximum (CUDA) over a step after a warm-up: `step` is what it exceeds the state before it by (gradients,
activations, logits), `whole` adds the weights of student and teacher and the optimiser's states.

Goals: `kd` below half of TRL's peak memory of a step and never slower; `kd-cached` at most 60 % of `kd`'s time.

    python tools/bench/llm.py --vocab 32768 151936 --hidden 512 1024 --output runs/bench/llm.json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from measure import MIB, PeakMemory, environment, in_subprocess, interleaved, pick_device, seconds_per_step

REFERENCE, TRL = "kd", ["trl-gkd", "trl-distillation"]
CONTENDERS = ["kd", "kd-cached", "naive", *TRL]
SETTINGS = ("layers", "teacher_scale", "batch", "length", "top_k", "threads")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")


# ---------------------------------------------------------------- models and batches


def model(arguments: argparse.Namespace, device: Any, scale: int = 1) -> Any:
    """A Llama with random weights, the same every time."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(scale)
    width = scale * arguments.hidden
    config = LlamaConfig(
        vocab_size=arguments.vocab,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=scale * arguments.layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        max_position_embeddings=arguments.length,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config).to(device)


def teacher_of(arguments: argparse.Namespace, device: Any) -> Any:
    return model(arguments, device, arguments.teacher_scale).eval().requires_grad_(False)


def batches(arguments: argparse.Namespace, device: Any) -> list[dict[str, Any]]:
    """Two batches of random tokens; the first quarter of a sequence is the prompt."""
    import torch

    generator = torch.Generator().manual_seed(0)
    made = []
    for number in range(2):
        ids = torch.randint(2, arguments.vocab, (arguments.batch, arguments.length), generator=generator)
        labels = ids.clone()
        labels[:, : arguments.length // 4] = -100
        example = torch.arange(arguments.batch) + number * arguments.batch
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "example": example}
        made.append({key: value.to(device) for key, value in batch.items()})
    return made


def tokenizer(vocab: int) -> Any:
    """A tokenizer of the models' size, which TRL asks for."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<eos>": 1} | {f"t{i}": i for i in range(2, vocab)}
    inner = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", padding_side="left", truncation_side="left"
    )


# ---------------------------------------------------------------- contenders


def common_options(folder: str, arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "output_dir": folder,
        "per_device_train_batch_size": arguments.batch,
        "max_steps": 10**6,
        "learning_rate": 1e-5,
        "use_cpu": arguments.cpu,
        "report_to": [],
        "bf16": False,
        "gradient_checkpointing": False,  # TRL's configs have it on
        "save_strategy": "no",
        "disable_tqdm": True,
        "remove_unused_columns": False,
    }


def naive(arguments: argparse.Namespace, device: Any, folder: str, teacher: Any) -> Any:
    import torch
    import torch.nn.functional as F
    from transformers import Trainer, TrainingArguments

    class Naive(Trainer):
        loss_is_scaled_for_ga = True

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            given = {key: inputs[key] for key in ("input_ids", "attention_mask")}
            z = model(**given).logits[:, :-1]
            with torch.no_grad():
                t = teacher(**given).logits[:, :-1]
            rows = F.kl_div(z.log_softmax(-1), t.softmax(-1), reduction="none").sum(-1)
            mask = inputs["labels"][:, 1:] != -100
            return (rows * mask).sum() / mask.sum()

    return Naive(model(arguments, device), TrainingArguments(**common_options(folder, arguments)))


def kd(arguments: argparse.Namespace, device: Any, folder: str, teacher: Any, cached: bool = False) -> Any:
    from transformers import TrainingArguments

    from kd_llm.engine.teachers import CachedTeacher, write_cache
    from kd_llm.integrations.trainer import DistillTrainer

    if cached:
        cache = Path(folder) / "cache"
        write_cache(cache, teacher, lambda: batches(arguments, device), k=arguments.top_k)
        teacher = CachedTeacher(cache, teacher=teacher)
    options = TrainingArguments(**common_options(folder, arguments))
    return DistillTrainer(model(arguments, device), options, teacher=teacher)


def trl_gkd(arguments: argparse.Namespace, device: Any, folder: str, teacher: Any) -> Any:
    from datasets import Dataset
    from transformers import default_data_collator
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    return GKDTrainer(
        model(arguments, device),
        teacher_model=teacher,
        args=GKDConfig(**common_options(folder, arguments), lmbda=0.0, beta=0.0, temperature=1.0),
        data_collator=default_data_collator,
        train_dataset=Dataset.from_dict({"input_ids": [[2, 3]]}),
        processing_class=tokenizer(arguments.vocab),
    )


def trl_distillation(arguments: argparse.Namespace, device: Any, folder: str, teacher: Any) -> Any:
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer

    class GivenCompletions(DistillationTrainer):
        def _prepare_inputs(self, generation_batch):
            start = arguments.length // 4
            made = {"num_items_in_batch": (generation_batch["labels"] != -100).sum()}
            for new, old in (("ids", "input_ids"), ("mask", "attention_mask")):
                made[f"prompt_{new}"] = generation_batch[old][:, :start]
                made[f"completion_{new}"] = generation_batch[old][:, start:]
            return made

    return GivenCompletions(
        model(arguments, device),
        teacher_model=teacher,
        args=DistillationConfig(**common_options(folder, arguments), beta=0.0, temperature=1.0),
        train_dataset=Dataset.from_dict({"prompt": ["t2 t3"]}),
        processing_class=tokenizer(arguments.vocab),
    )


MAKERS: dict[str, Callable[..., Any]] = {
    "naive": naive,
    "kd": kd,
    "kd-cached": lambda *given: kd(*given, cached=True),
    "trl-gkd": trl_gkd,
    "trl-distillation": trl_distillation,
}


class Contender:
    """Steps of one trainer, without its loop around them; `loss` is the last step's."""

    def __init__(self, name: str, arguments: argparse.Namespace, device: Any, folder: str, teacher: Any):
        self.trainer = MAKERS[name](arguments, device, folder, teacher)
        self.batches, self.loss = batches(arguments, device), float("nan")
        self.cpu: list[float] = []  # CPU seconds of every step
        trainer = self.trainer
        trainer.create_optimizer_and_scheduler(num_training_steps=10**6)
        self.model, self.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
        trainer.current_gradient_accumulation_steps = 1

    def steps(self) -> Iterator[None]:
        number = 0
        while True:
            start = time.process_time()
            batch = dict(self.batches[number % len(self.batches)])
            items = (batch["labels"][:, 1:] != -100).sum()
            loss = self.trainer.training_step(self.model, batch, items)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.loss = loss
            self.cpu.append(time.process_time() - start)
            number += 1
            yield


# ---------------------------------------------------------------- measurements


def trl_missing() -> str | None:
    """Why TRL's trainers cannot run here, None if they can."""
    try:
        import trl
        from trl import DistillationTrainer
        from trl.experimental.gkd import GKDTrainer
    except Exception as error:  # absent, or one that does not fit the installed transformers: the reason is printed
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return None if trl and DistillationTrainer and GKDTrainer else "incomplete"


def measure_memory(name: str, arguments: argparse.Namespace) -> dict[str, int]:
    """Peak bytes of a step beyond the state before it, and with weights and optimiser states, in this process."""
    import torch

    device = pick_device(threads=arguments.threads, cpu=arguments.cpu)
    with tempfile.TemporaryDirectory() as folder:
        teacher = teacher_of(arguments, device)
        contender = Contender(name, arguments, device, folder, teacher)
        steps = contender.steps()
        seconds_per_step(steps, 1, device)
        with PeakMemory(device.type) as peak:
            seconds_per_step(steps, 1, device)
    trainer = contender.trainer
    held: list[Any] = [*contender.model.parameters(), *contender.model.buffers()]
    held += [x for state in trainer.optimizer.state.values() for x in state.values() if isinstance(x, torch.Tensor)]
    held += [] if name == "kd-cached" else list(teacher.parameters())
    unique = {id(x): x.numel() * x.element_size() for x in held}
    return {"step_bytes": peak.extra, "whole_bytes": peak.extra + sum(unique.values())}


def memory_in_subprocess(name: str, arguments: argparse.Namespace) -> dict[str, int]:
    options = [f"--{key.replace('_', '-')}={getattr(arguments, key)}" for key in (*SETTINGS, "vocab", "hidden")]
    return in_subprocess(__file__, name, [*options, *(["--cpu"] if arguments.cpu else [])])


def measure(arguments: argparse.Namespace, names: list[str]) -> list[dict[str, Any]]:
    """One row a contender, for one vocabulary and one width."""
    device = pick_device(threads=arguments.threads, cpu=arguments.cpu)
    teacher = teacher_of(arguments, device)  # one for all: a copy each would be most of a small machine's memory
    with tempfile.TemporaryDirectory() as folder:
        contenders = {}
        for name in names:
            (Path(folder) / name).mkdir()
            contenders[name] = Contender(name, arguments, device, str(Path(folder) / name), teacher)
        running = {name: contender.steps() for name, contender in contenders.items()}
        seconds = interleaved(running, device, warmup=1, rounds=arguments.rounds, size=arguments.block)
        losses = {name: float(contender.loss) for name, contender in contenders.items()}
        cpu = {name: contender.cpu[1:] for name, contender in contenders.items()}  # without the warm-up
    del contenders, running, teacher
    rows = []
    for name in names:
        memory, middle = memory_in_subprocess(name, arguments), statistics.median(seconds[name])
        rows.append(
            {
                "vocab": arguments.vocab,
                "hidden": arguments.hidden,
                "contender": name,
                "seconds_per_step": middle,
                "seconds": seconds[name],
                "tokens_per_second": arguments.batch * arguments.length / middle,
                "cpu_seconds": cpu[name],
                "time_over_kd": ratio(seconds[name], seconds[REFERENCE]),
                "cpu_time_over_kd": ratio(cpu[name], cpu[REFERENCE]),
                "loss": losses[name],
                **memory,
            }
        )
    for row in rows:
        for key in ("step", "whole"):
            row[f"{key}_memory_over_kd"] = row[f"{key}_bytes"] / rows[0][f"{key}_bytes"]
    return rows


def ratio(ours: list[float], theirs: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def table(rows: list[dict[str, Any]]) -> str:
    head = f"{'vocab':>7} {'d':>5} {'contender':17}"
    head += "".join(
        f" {name:>9}" for name in ("s/step", "tokens/s", "x kd", "CPU x kd", "step MiB", "x kd", "whole MiB", "x kd")
    )
    lines = [head + f" {'loss':>8}"]
    for row in rows:
        line = f"{row['vocab']:7d} {row['hidden']:5d} {row['contender']:17} {row['seconds_per_step']:9.3f}"
        line += f" {row['tokens_per_second']:9.0f} {row['time_over_kd']:9.2f} {row['cpu_time_over_kd']:9.2f}"
        for key in ("step", "whole"):
            line += f" {row[f'{key}_bytes'] / MIB:9.0f} {row[f'{key}_memory_over_kd']:9.2f}"
        lines.append(f"{line} {row['loss']:8.4f}")
    return "\n".join(lines)


def goals(rows: list[dict[str, Any]]) -> list[str]:
    """A line a goal: TRL's memory of a step over twice ours, no faster, and the cache's time."""
    lines = []
    for row in rows:
        where = f"{row['contender']} at vocabulary {row['vocab']}, width {row['hidden']}"
        time_ratio = f"{row['time_over_kd']:.2f} x the time ({row['cpu_time_over_kd']:.2f} x the CPU time)"
        if row["contender"] in TRL:
            met = row["step_memory_over_kd"] > 2 and row["time_over_kd"] >= 1
            memory = f"{row['step_memory_over_kd']:.2f} x the memory of a step"
            lines.append(f"{where}: {memory} and {time_ratio} of kd; goal (2 x, 1 x): {'met' if met else 'MISSED'}")
        if row["contender"] == "kd-cached":
            met = row["time_over_kd"] <= 0.6
            lines.append(f"{where}: {time_ratio} of kd; goal (0.6 x the time): {'met' if met else 'MISSED'}")
    return lines


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, nargs="+", default=[32768, 151936], help="(default %(default)s)")
    parser.add_argument("--hidden", type=int, nargs="+", default=[512, 1024], help="the student's width")
    parser.add_argument("--layers", type=int, default=2, help="of the student (default %(default)s)")
    parser.add_argument("--teacher-scale", type=int, default=2, help="times wider and deeper (default %(default)s)")
    parser.add_argument("--batch", type=int, default=4, help="sequences (default %(default)s)")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence (default %(default)s)")
    parser.add_argument("--top-k", type=int, default=64, help="outputs in the cache (default %(default)s)")
    parser.add_argument("--block", type=int, default=1, help="steps in a block")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu", action="store_true", help="leave an accelerator alone")
    parser.add_argument("--only", nargs="*", choices=CONTENDERS, help="contenders besides kd")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    import torch

    arguments.cpu = arguments.cpu or not torch.cuda.is_available()
    pairs = [(vocab, hidden) for vocab in arguments.vocab for hidden in arguments.hidden]
    at = [argparse.Namespace(**{**vars(arguments), "vocab": vocab, "hidden": hidden}) for vocab, hidden in pairs]
    if arguments.child:
        print(json.dumps(measure_memory(arguments.child, at[0])))
        return
    missing, load = trl_missing(), [os.getloadavg()]
    names = [n for n in CONTENDERS if n == REFERENCE or not arguments.only or n in arguments.only]
    if missing and set(names) & set(TRL):
        print(f"trl: left out, {missing}")
        names = [name for name in names if name not in TRL]
    rows: list[dict[str, Any]] = []
    kept = {name: value for name, value in vars(arguments).items() if name not in ("child", "output")}
    found = environment("transformers", "accelerate", "trl") | {"trl_left_out": missing}
    for one in at:
        rows += measure(one, names)
        print(table(rows[-len(names) :]), flush=True)
        if arguments.output:  # after every size, the next may not fit the machine
            found["load_average_before_and_after"] = [*load, os.getloadavg()]
            written = json.dumps({"settings": kept, "environment": found, "rows": rows}, indent=1)
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            arguments.output.write_text(written + "\n")
    print("\n".join(goals(rows)))
    if arguments.output:
        print(f"written to {arguments.output}")


if __name__ == "__main__":
    main()
