"""Memory and time of head + divergence, forward and backward: kdcore against full logits and named peers, on CPU.

Contenders, all from hidden states and heads in float32, mean over the tokens, gradients for the student's states and
head:

    kdcore             kdcore.gpu.linear_divergence, default chunk
    naive              full logits of both models, torch.nn.functional.kl_div (or the definition of js)
    torchtune          the formulation of torchtune's ForwardKLLoss: softmax of all teacher logits, log-softmax of all
                       student logits, their product summed over the vocabulary
    torchtune-chunked  the same over 8 chunks of existing logits (its ForwardKLWithChunkedOutputLoss)
    liger              liger_kernel.chunked_loss.LigerFusedLinearJSDLoss without its label term, its default chunk of
                       1024 tokens, not compiled; liger-128 with 128 tokens, about kdcore's chunk; liger-compiled with
                       --compile

Peak memory: a subprocess per contender builds the inputs, runs a small problem once (libraries allocate their buffers),
resets the kernel's high-water mark of resident memory (Linux, /proc/self/clear_refs) and runs once: VmHWM - VmRSS
before. It includes the gradients, which every contender must produce. Time: one process, contenders interleaved,
medians of the repeats after a small warm-up problem each: wall-clock seconds, and CPU seconds of the process, which
other processes on the machine disturb less (the load average before and after stands in the JSON file). Ratios are
contender / kdcore.
Liger runs where `liger-kernel` is importable; else the reason is printed.

    python tools/bench/linear_divergence.py --output runs/bench/linear_divergence.json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from measure import MIB, PeakMemory, environment

CONTENDERS = {
    "forward": ["kdcore", "naive", "torchtune", "torchtune-chunked"],
    "js": ["kdcore", "naive", "liger", "liger-128"],
}


def make_inputs(tokens: int, hidden: int, vocab: int):
    """Student states and head (with gradients), teacher states and head; filled in place, so no hidden peak."""
    import torch

    generator = torch.Generator().manual_seed(0)
    h_s, w_s, h_t, w_t = (torch.empty(n, hidden) for n in (tokens, vocab, tokens, vocab))
    for x, std in ((h_s, 1.0), (w_s, 2 / hidden**0.5), (h_t, 1.0), (w_t, 2 / hidden**0.5)):
        x.normal_(0.0, std, generator=generator)
    return h_s.requires_grad_(), w_s.requires_grad_(), h_t, w_t


def naive(kind, h_s, w_s, h_t, w_t):
    import torch
    import torch.nn.functional as F

    z = h_s @ w_s.t()
    with torch.no_grad():
        t = h_t @ w_t.t()
    if kind == "forward":
        return F.kl_div(z.log_softmax(-1), t.softmax(-1), reduction="batchmean")
    lq, lp = z.log_softmax(-1), t.log_softmax(-1)
    lm = torch.logsumexp(torch.stack([lq, lp]), 0) - 0.6931471805599453
    both = F.kl_div(lm, lp, reduction="batchmean", log_target=True) + F.kl_div(
        lm, lq, reduction="batchmean", log_target=True
    )
    return both / 2


def torchtune_forward(h_s, w_s, h_t, w_t, chunks: int):
    import torch

    z = h_s @ w_s.t()
    with torch.no_grad():
        t = h_t @ w_t.t()
    total = 0.0
    for z_part, t_part in zip(z.chunk(chunks), t.chunk(chunks)):
        p = t_part.softmax(-1, dtype=torch.float32)
        log_q = z_part.log_softmax(-1, dtype=torch.float32)
        total = total - (p * log_q).sum(-1).sum()
    return total / len(h_s)  # the cross-entropy: the teacher's entropy, a constant, is left out there too


def liger(h_s, w_s, h_t, w_t, chunk: int, compiled: bool):
    import torch
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, compiled=compiled, chunk_size=chunk)
    return loss(h_s, w_s, h_t, w_t, torch.zeros(len(h_s), dtype=torch.long))


def loss_of(contender: str, kind: str, inputs):
    if contender == "kdcore":
        from kdcore.gpu.linear_divergence import linear_divergence

        return linear_divergence(*inputs, kind=kind)
    if contender == "naive":
        return naive(kind, *inputs)
    if contender.startswith("torchtune"):
        return torchtune_forward(*inputs, chunks=8 if contender.endswith("chunked") else 1)
    return liger(*inputs, chunk=128 if contender == "liger-128" else 1024, compiled=contender == "liger-compiled")


def step(contender: str, kind: str, inputs) -> tuple[float, float, float]:
    """Wall-clock seconds of forward and backward, CPU seconds, and the loss."""
    for x in inputs:
        x.grad = None
    wall, cpu = time.perf_counter(), time.process_time()
    loss = loss_of(contender, kind, inputs)
    loss.backward()
    return time.perf_counter() - wall, time.process_time() - cpu, loss.item()


def measure_memory(contender: str, kind: str, tokens: int, hidden: int, vocab: int) -> int:
    """Extra peak bytes of one step in this process."""
    step(contender, kind, make_inputs(16, hidden, 256))
    inputs = make_inputs(tokens, hidden, vocab)
    with PeakMemory() as peak:
        step(contender, kind, inputs)
    return peak.extra


def in_subprocess(arguments: argparse.Namespace, contender: str, kind: str, vocab: int) -> int:
    command = [sys.executable, __file__, "--child", contender, kind, str(vocab)]
    command += ["--tokens", str(arguments.tokens), "--hidden", str(arguments.hidden)]
    command += ["--threads", str(arguments.threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{contender} {kind} {vocab}: {done.stderr.strip()[-2000:]}")
    return int(done.stdout.split()[-1])


def liger_missing() -> str | None:
    """Why Liger's loss cannot run here, None if it can."""
    try:
        value = step("liger", "js", make_inputs(8, 4, 16))[-1]
    except Exception as error:  # a library absent, or one that wants a GPU: the reason goes into the table
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return None if value == value else "NaN loss"


def measure(arguments: argparse.Namespace, kind: str, vocab: int, contenders: list[str]) -> list[dict]:
    for contender in contenders:
        step(contender, kind, make_inputs(16, arguments.hidden, 256))
    inputs = make_inputs(arguments.tokens, arguments.hidden, vocab)
    wall, cpu, losses = ({contender: [] for contender in contenders} for _ in range(3))
    for _ in range(arguments.repeats):
        for contender in contenders:
            for values, value in zip((wall, cpu, losses), step(contender, kind, inputs)):
                values[contender].append(value)
    del inputs
    rows = [
        {
            "kind": kind,
            "vocab": vocab,
            "contender": contender,
            "seconds": wall[contender],
            "median_seconds": statistics.median(wall[contender]),
            "cpu_seconds": cpu[contender],
            "median_cpu_seconds": statistics.median(cpu[contender]),
            "peak_extra_mib": in_subprocess(arguments, contender, kind, vocab) / MIB,
            "loss": losses[contender][-1],
        }
        for contender in contenders
    ]
    for row in rows:
        row["memory_over_kdcore"] = row["peak_extra_mib"] / rows[0]["peak_extra_mib"]
        row["time_over_kdcore"] = row["median_seconds"] / rows[0]["median_seconds"]
        row["cpu_time_over_kdcore"] = row["median_cpu_seconds"] / rows[0]["median_cpu_seconds"]
    return rows


def table(rows: list[dict]) -> str:
    columns = ("peak MiB", "x kdcore", "wall s", "x kdcore", "CPU s", "x kdcore", "loss")
    lines = [f"{'divergence':10} {'vocab':>7} {'contender':18}" + "".join(f" {name:>8}" for name in columns)]
    for row in rows:
        values = f" {row['peak_extra_mib']:8.0f} {row['memory_over_kdcore']:8.2f}"
        for name in ("", "cpu_"):
            values += f" {row[f'median_{name}seconds']:8.2f} {row[f'{name}time_over_kdcore']:8.2f}"
        lines.append(f"{row['kind']:10} {row['vocab']:7d} {row['contender']:18}{values} {row['loss']:8.4f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024, help="N (default %(default)s)")
    parser.add_argument("--hidden", type=int, default=256, help="d of student and teacher (default %(default)s)")
    parser.add_argument(
        "--vocab", type=int, nargs="+", default=[32768, 131072], help="vocabularies (default %(default)s)"
    )
    parser.add_argument("--repeats", type=int, default=3, help="timed repeats (default %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch (default %(default)s)")
    parser.add_argument("--compile", action="store_true", help="time Liger's torch.compile variant too")
    parser.add_argument("--output", type=Path, default=Path("runs/bench/linear_divergence.json"), help="JSON file")
    parser.add_argument("--child", nargs=3, metavar=("CONTENDER", "KIND", "VOCAB"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()

    os.environ.setdefault("OMP_NUM_THREADS", str(arguments.threads))
    import torch

    torch.set_num_threads(arguments.threads)
    if arguments.child:
        contender, kind, vocab = arguments.child
        print(measure_memory(contender, kind, arguments.tokens, arguments.hidden, int(vocab)))
        return
    missing, load = liger_missing(), [os.getloadavg()]
    if missing:
        print(f"liger: left out, {missing}")
    rows = []
    for vocab in arguments.vocab:
        for kind, names in CONTENDERS.items():
            names = [n for n in names if not (missing and n.startswith("liger"))]
            if kind == "js" and arguments.compile and not missing:
                names = [*names, "liger-compiled"]
            rows += measure(arguments, kind, vocab, names)
            print(table(rows[-len(names) :]), flush=True)
    report(arguments, rows, missing, [*load, os.getloadavg()])


def report(arguments: argparse.Namespace, rows: list[dict], missing: str | None, load: list) -> None:
    """The goal's two lines, and the JSON file."""
    for row in rows:
        if row["contender"] == "naive" and row["vocab"] == max(arguments.vocab):
            met = row["memory_over_kdcore"] >= 8 and row["time_over_kdcore"] >= 1
            print(
                f"{row['kind']} at {row['vocab']}: full logits take {row['memory_over_kdcore']:.1f} x the extra peak "
                f"memory and {row['time_over_kdcore']:.2f} x the time ({row['cpu_time_over_kdcore']:.2f} x the CPU "
                f"time) of kdcore; goal (8 x, 1 x): {'met' if met else 'MISSED'}"
            )
    settings = {name: value for name, value in vars(arguments).items() if name not in ("child", "output")}
    result = {
        "settings": settings,
        "environment": {
            **environment("liger-kernel"),
            "liger_left_out": missing,
            "load_average_before_and_after": load,
        },
        "memory": "VmHWM after a reset minus VmRSS before the step, own process per contender",
        "rows": rows,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {arguments.output}")


if __name__ == "__main__":
    main()
