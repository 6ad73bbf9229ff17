"""FF-G2M's step against hand-written loops, its memory over the edges, and Mirage's mining against its release.

Step: full batch on a random graph of a given size, Adam, interleaved in blocks (see measure.py). The loops without
`kdcore` are what one writes by hand in the way of the public GNN-to-MLP code: forward, log_softmax, NLLLoss on the
labelled nodes, KLDivLoss on all nodes or gathered over the edges, backward, step.

    glnn-bare, ff_g2m-bare         by hand: node-wise, and both edge terms on (E, C) tensors
    glnn-kdcore, ff_g2m-kdcore     kdcore.training.Loop with our Distiller, which sums the low term's targets once and
                                   takes the high term over one direction of every edge, in chunks
    ff_g2m-sampled                 the same on batches of sampled edges, the part of the features that they need

Memory: the kernel's high-water mark over two steps after a warm-up in a process of its own, on graphs of growing size.

Mining: trees of two hops (one hop for PROTEINS), their labels and the frequent sets of each class on a TU data set,
ours against the functions of the release's Python variant and the miner it uses. `--release` names its script, which
is read at run time and not part of this project (get_MPTree, get_labels, to_nx, get_can_lab_tree; needs networkx, and
pyfpgrowth for the sets). Theta is a share of the class. pyfpgrowth misses sets, so the counts of sets are given, too.

    python tools/bench/graph.py --release graph-nci-finalize-reduce-curr.py --data $KD_DATA/tu \\
        --output tools/bench/results/graph.json
"""

from __future__ import annotations

import argparse
import ast
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from measure import MIB, PeakMemory, environment, in_subprocess, interleaved, pick_device, seconds_per_step

STEPS = ["glnn-bare", "glnn-kdcore", "ff_g2m-bare", "ff_g2m-kdcore", "ff_g2m-sampled"]
# nodes, directed edges, features, classes, hidden width, layers
SIZES = {"cora": (2708, 10_556, 1433, 7, 128, 3), "large": (40_000, 500_000, 128, 40, 128, 3)}
GROWING = {"ff_g2m-bare": [500_000, 1_000_000], "ff_g2m-kdcore": [1_000_000, 2_500_000, 5_000_000, 10_000_000]}
GROWING["ff_g2m-sampled"] = GROWING["ff_g2m-kdcore"]
LAM, TAU, OPTIMIZER = 0.4, 1.5, {"lr": 0.01, "weight_decay": 5e-4}
# hops, thresholds, graphs: the release takes minutes for all of PROTEINS
MINING = {"MUTAG": (2, [0.5, 0.35], None), "PROTEINS": (1, [0.4, 0.3], 200)}


# ---------------------------------------------------------------- steps


def shape_of(name: str) -> tuple[int, int, int, int, int, int]:
    """A named size, or `edges-N`: N directed edges, a node for twenty of them, narrow features."""
    if name in SIZES:
        return SIZES[name]
    edges = int(name.removeprefix("edges-"))
    return edges // 20, edges, 16, 10, 32, 2


def graph(name: str) -> dict[str, Any]:
    """x, y, labelled, edge_index (both directions, no self loops), teacher logits."""
    import torch

    nodes, edges, features, classes, _, _ = shape_of(name)
    generator = torch.Generator().manual_seed(0)
    one_way = torch.randint(nodes, (2, edges // 2), generator=generator)
    one_way = one_way[:, one_way[0] != one_way[1]].sort(0).values
    return {
        "x": torch.randn(nodes, features, generator=generator),
        "y": torch.randint(classes, (nodes,), generator=generator),
        "labelled": torch.randperm(nodes, generator=generator)[: max(140, nodes // 20)],
        "edge_index": torch.cat([one_way, one_way.flip(0)], 1),
        "teacher": torch.randn(nodes, classes, generator=generator),
    }


def student(name: str) -> Any:
    import torch
    from torch_geometric.nn import MLP

    _, _, features, classes, width, layers = shape_of(name)
    torch.manual_seed(0)
    return MLP(
        in_channels=features, hidden_channels=width, out_channels=classes, num_layers=layers, dropout=0.5, norm=None
    )


def by_hand(kind: str, size: str) -> Iterator[None]:
    import torch

    data, model = graph(size), student(size).train()
    optimizer = torch.optim.Adam(model.parameters(), **OPTIMIZER)
    nll, kl = torch.nn.NLLLoss(), torch.nn.KLDivLoss(reduction="batchmean", log_target=True)
    loops = torch.arange(len(data["x"])).expand(2, -1)
    i, j = data["edge_index"]
    i_low, j_low = torch.cat([data["edge_index"], loops], 1)
    log_t = data["teacher"].log_softmax(1)

    def pattern(logits: Any) -> Any:
        return ((logits[i] - logits[j]).abs() / TAU).log_softmax(1)

    while True:
        logits = model(data["x"])
        out = logits.log_softmax(1)
        loss = LAM * nll(out[data["labelled"]], data["y"][data["labelled"]])
        if kind == "glnn":
            loss = loss + (1 - LAM) * kl(out, log_t)
        else:
            high = kl(pattern(logits), pattern(data["teacher"]))
            loss = loss + (1 - LAM) * (kl(out[i_low], log_t[j_low]) + high)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield


def in_loop(kind: str, size: str, *, batch_edges: int | None = None) -> Iterator[None]:
    """`kdcore.training.Loop`, one iteration at a time."""
    from kd_graph.engine.edges import WholeGraph, edge_loader, full_batch
    from kd_graph.methods.ff_g2m import FFG2M
    from kdcore.config import OptimizerConfig, RunConfig, TrainConfig
    from kdcore.stages import RunContext
    from kdcore.training import Loop, TrainSetup, make_accelerator

    data, options = graph(size), {"low": "node", "high": False} if kind == "glnn" else {}
    parts = [data[name] for name in ("x", "y", "labelled", "edge_index", "teacher")]
    loader = WholeGraph(full_batch(*parts)) if batch_edges is None else edge_loader(*parts, batch_edges=batch_edges)
    train = TrainConfig(steps=10**6, batch_size=8, optimizer=OptimizerConfig(name="adam", **OPTIMIZER))
    folder = Path(tempfile.mkdtemp())
    context = RunContext(RunConfig(method="ff_g2m", train=train), folder, make_accelerator(train, cpu=True), quiet=True)
    distiller = FFG2M(student(size), lam=LAM, tau=TAU, **options)
    loop = Loop("student", context, TrainSetup(distiller, loader), train)
    with loop.log:
        while True:
            for window in loop._windows():
                loop.window += 1
                loop._iteration(window)
                yield
            loop.epoch, loop.window = loop.epoch + 1, 0


def contender(name: str, size: str) -> Iterator[None]:
    kind, _, how = name.partition("-")
    if how == "bare":
        return by_hand(kind, size)
    return in_loop(kind, size, batch_edges=65_536 if how == "sampled" else None)


def steps(arguments: argparse.Namespace, size: str) -> dict[str, Any]:
    device = pick_device(threads=arguments.threads, cpu=True)
    names = [name for name in STEPS if name != "ff_g2m-sampled" or size != "cora"]
    running = {name: contender(name, size) for name in names}
    rounds, block = (arguments.rounds, 5) if size == "cora" else (max(3, arguments.rounds // 3), 1)
    seconds = interleaved(running, device, warmup=1, rounds=rounds, size=block)
    found = {}
    for name in names:
        reference = name.split("-")[0] + "-bare"
        over = statistics.median(a / b for a, b in zip(seconds[name], seconds[reference], strict=True))
        found[name] = {"seconds": statistics.median(seconds[name]), "over_bare": over}
        print(f"{size:8} {name:16} {1e3 * found[name]['seconds']:9.1f} ms/step {over:7.3f} x bare", flush=True)
    over = statistics.median(a / b for a, b in zip(seconds["ff_g2m-kdcore"], seconds["glnn-bare"], strict=True))
    print(f"{size:8} ff_g2m-kdcore over glnn-bare: {over:.3f}")
    return {**found, "ff_g2m-kdcore_over_glnn-bare": over}


def child(name: str, size: str, threads: int) -> dict[str, float]:
    """Extra peak bytes and seconds of two steps, after one, in this process."""
    device = pick_device(threads=threads, cpu=True)
    running = contender(name, size)
    seconds_per_step(running, 1, device)
    with PeakMemory() as peak:
        seconds = seconds_per_step(running, 2, device)
    return {"peak_bytes": peak.extra, "seconds": seconds}


def memory(arguments: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, sizes in GROWING.items():
        for edges in sizes:
            options = [f"--size=edges-{edges}", f"--threads={arguments.threads}"]
            own = in_subprocess(__file__, name, options)
            found.setdefault(name, {})[edges] = own
            rate = own["peak_bytes"] / edges
            print(
                f"{edges:>10} edges {name:16} {own['peak_bytes'] / MIB:8.0f} MiB ({rate:.0f} bytes an edge), "
                f"{own['seconds']:.2f} s/step",
                flush=True,
            )
    return found


# ---------------------------------------------------------------- mining


def release_functions(script: Path) -> dict[str, Any]:
    """The functions of the release's script that make trees and labels, without running the rest of it."""
    import networkx as nx
    import numpy as np
    from torch_geometric.utils import to_networkx

    wanted = {"get_MPTree", "get_labels", "to_nx", "get_can_lab_tree"}
    tree = ast.parse(script.read_text(encoding="utf-8"))
    kept = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in wanted]
    if {node.name for node in kept} != wanted:
        raise SystemExit(f"--release {script}: lacks {', '.join(sorted(wanted - {node.name for node in kept}))}")
    space: dict[str, Any] = {"nx": nx, "np": np, "to_networkx": to_networkx}
    exec(compile(ast.Module(kept, []), str(script), "exec"), space)
    return space


def tu(name: str, folder: Path) -> list[Any]:
    from kd_graph.sources import tu_graphs

    graphs, _ = tu_graphs(name, folder, download=False, degree_features=64)
    for one in graphs:
        one.edge_attr = None
    return graphs


def ours_trees(graphs: list[Any], hops: int) -> Any:
    from kd_graph.methods.mirage import transactions

    return transactions(graphs, hops).classes


def release_trees(graphs: list[Any], hops: int, functions: dict[str, Any]) -> dict[int, list[set[int]]]:
    import torch

    classes: dict[int, list[set[int]]] = {}
    for one in graphs:
        labelled = one.clone()
        labelled.edge_attr = torch.ones(one.num_edges, 1)
        network = functions["get_labels"](functions["to_nx"](labelled))
        trees = [functions["get_MPTree"](network, node, hops) for node in network.nodes]
        classes.setdefault(int(one.y), []).append({functions["get_can_lab_tree"](t) for t in trees if len(t) > 1})
    return dict(sorted(classes.items()))


def thresholds(classes: dict[int, list[set[int]]], share: float) -> dict[int, int]:
    from kd_graph.methods.mirage import theta_of

    return theta_of(share, {label: len(sets) for label, sets in classes.items()})


def ours_sets(classes: dict[int, list[set[int]]], share: float) -> int:
    from kd_graph.engine.itemsets import frequent_sets

    theta = thresholds(classes, share)
    return sum(len(frequent_sets(sets, theta[label])) for label, sets in classes.items())


def release_sets(classes: dict[int, list[set[int]]], share: float) -> int:
    import pyfpgrowth

    theta = thresholds(classes, share)
    return sum(
        len(pyfpgrowth.find_frequent_patterns([list(s) for s in sets], theta[label])) for label, sets in classes.items()
    )


def timed(call: Callable[[], Any]) -> tuple[Any, float, int]:
    with PeakMemory() as peak:
        start = time.perf_counter()
        value = call()
        seconds = time.perf_counter() - start
    return value, seconds, peak.extra


def mine(name: str, who: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds and extra peak bytes of trees with labels, and of the sets at each theta, in this process."""
    hops, shares, count = MINING[name]
    graphs = tu(name, arguments.data)[:: max(1, 975 // count)][:count] if count else tu(name, arguments.data)
    if who == "ours":
        make, find = (lambda: ours_trees(graphs, hops)), ours_sets
    else:
        functions = release_functions(arguments.release)
        make, find = (lambda: release_trees(graphs, hops, functions)), release_sets
    ours_sets(ours_trees(graphs[:1], 1), 0.5)  # imports are not timed
    classes, seconds, peak = timed(make)
    found: dict[str, Any] = {
        "hops": hops,
        "graphs": len(graphs),
        "trees": len(set().union(*(s for sets in classes.values() for s in sets))),
    }
    found |= {"trees_seconds": seconds, "trees_peak_bytes": peak, "sets": {}}
    for share in shares:
        number, seconds, peak = timed(lambda share=share: find(classes, share))
        found["sets"][share] = {"found": number, "seconds": seconds, "peak_bytes": peak}
    return found


def mining(arguments: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in MINING:
        for who in ("ours", "release") if arguments.release else ("ours",):
            options = [f"--size={name}", f"--data={arguments.data}", f"--threads={arguments.threads}"]
            options += [f"--release={arguments.release}"] if arguments.release else []
            own = in_subprocess(__file__, f"mine-{who}", options)
            found.setdefault(name, {})[who] = own
            sets = ", ".join(f"{share}: {s['found']} sets {s['seconds']:.3f} s" for share, s in own["sets"].items())
            print(
                f"{name:9} {who:8} {own['trees']} trees {own['trees_seconds']:.2f} s "
                f"{own['trees_peak_bytes'] / MIB:.0f} MiB; {sets}",
                flush=True,
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", nargs="*", choices=["steps", "memory", "mining"])
    parser.add_argument("--data", type=Path, help="folder of the TU data sets")
    parser.add_argument("--release", type=Path, help="the release's Python script (NCI1 or bbbp)")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--size", help=argparse.SUPPRESS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        if arguments.child.startswith("mine-"):
            print(json.dumps(mine(arguments.size, arguments.child.removeprefix("mine-"), arguments)))
        else:
            print(json.dumps(child(arguments.child, arguments.size, arguments.threads)))
        return
    parts = arguments.only or ["steps", "memory", *(["mining"] if arguments.data else [])]
    if "mining" in parts and arguments.data is None:
        raise SystemExit("--data: mining needs the folder of the TU data sets")
    result: dict[str, Any] = {"environment": environment("torch_geometric", "networkx", "pyfpgrowth")}
    if "steps" in parts:
        result["steps"] = {size: steps(arguments, size) for size in SIZES}
    if "memory" in parts:
        result["memory"] = memory(arguments)
    if "mining" in parts:
        result["mining"] = mining(arguments)
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        before = json.loads(arguments.output.read_text()) if arguments.only and arguments.output.is_file() else {}
        arguments.output.write_text(json.dumps({**before, **result}, indent=2) + "\n")


if __name__ == "__main__":
    main()
