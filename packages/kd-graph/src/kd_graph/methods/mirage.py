"""Mirage: Model-Agnostic Graph Distillation for Graph Classification (arXiv 2310.09486, 2024).

An L-layer network of messages sees a graph as the set of its nodes' computation trees, and these repeat massively. So a
set of labelled graphs is distilled without any network: the sets of trees that frequently occur together in the graphs
of a class become its training graphs.

    Tr_0(v) = x_v,   Tr_h(v) = x_v over a child (e_uv, Tr_{h-1}(u)) for every neighbour u of v                      (1)
    T(g)   = { Tr_L(v) : v in g },   the set of trees up to isomorphism                                             (2)
    s_c(S) = | { g of class c : S in T(g) } |,   F_c = { S not empty : s_c(S) >= theta_c }                          (3)
    g_S    = disjoint union of the trees in S, edges from child to parent, |S| roots marked, label c                (4)
    h(g)   = readout over the marked roots, over all nodes of an ordinary graph                                     (5)
    L      = sum_c pi_c sum_{S in F_c} s_c(S) / (sum_{S' in F_c} s_c(S')) CE(head(h(g_S)), c)                       (6)

The neighbour one came from is a child again in (1). F_c holds all frequent sets, not only the closed ones; it is mined
exactly. Trees of one node count in (2) and (3) and are left out of (4). pi_c is the share of class c: (6) is the mean
of drawing a class in proportion, then a set by its frequency; `weighting` has the release's uniform one. Sets that are
frequent in another class too can be excluded (`patterns`), or trees that occur in another class at all (`trees`).

No teacher and no gradient distils: the result is a function of the training graphs, of L and of theta. Any network of
at most L layers trains on it; GCN, whose weights depend on the degrees of the leaves, is exact with L of one layer
more. Of several theta the one is taken whose student is best on the validation graphs. The distilled set and the
student ship. The equations' numbers are this file's.

    patterns = distill(graphs, hops=2, support=0.5)        # PyG graphs with x, edge_index, y
    graphs = unfold_patterns(patterns)                     # of kd_graph.engine.distilled; PyG graphs with root_mask
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from kd_graph import graph_runs as runs
from kd_graph.engine.distilled import (
    Patterns,
    graph_bytes,
    load_graphs,
    pattern_bytes,
    save_graphs,
    save_patterns,
    tensor_bytes,
    unfold_patterns,
)
from kd_graph.engine.itemsets import ItemSet, TooMany, bit_sets, exclude_shared, fitting_threshold, frequent_sets
from kd_graph.engine.selection import blind_patterns, random_graphs
from kd_graph.engine.trees import LabelledGraphs, TreeTable, discretise, graph_trees
from kd_graph.graph_data import GraphData
from kd_graph.graph_data import load_graphs as load_data
from kd_graph.graph_models import load_classifier
from kd_graph.graph_runs import GraphRun, Run, root_gap
from kdcore.config import MethodConfig
from kdcore.errors import InputError
from kdcore.method import Method
from kdcore.stages import Artefacts, Procedure, RunContext, Stage, write_atomically
from kdcore.training import TrainSetup, TrainStage

if TYPE_CHECKING:
    from torch_geometric.data import Data

Exclusion = Literal["none", "patterns", "trees"]
Weighting = Literal["frequency", "uniform", "balanced"]
Selection = Literal["mirage", "single", "blind", "random"]
Support = float | list[float]


class MirageConfig(MethodConfig):
    hops: int = Field(2, ge=1, le=6, description="L, depth of the computation trees; the layers of the network")
    support: list[Support] = Field(
        default_factory=lambda: [0.5],
        min_length=1,
        description="theta, one or several to choose from on validation graphs: a number, or one for each class; below "
        "1 a share of the class's graphs, else a count",
    )
    exclusion: Exclusion = Field("none", description="drop sets frequent in another class, or trees that occur in one")
    weighting: Weighting = Field("frequency", description="eq. (6), every graph alike, or classes alike")
    max_trees: int | None = Field(None, ge=1, description="largest set of trees; None: no limit, as published")
    most_sets: int = Field(20_000, ge=1, description="frequent sets over all classes beyond which mining is refused")
    selection: Selection = Field(
        "mirage",
        description="mirage; single: sets of one tree; blind: as many sets of random trees; random: real graphs. The "
        "last two stay within the bytes of Mirage's set",
    )

    @field_validator("support")
    @classmethod
    def _are_thresholds(cls, value: list[Support]) -> list[Support]:
        for theta in value:
            for number in theta if isinstance(theta, list) else [theta]:
                if number <= 0 or (number >= 1 and number != int(number)):
                    raise ValueError(f"{number}: a share above 0 and below 1, or a whole count of 1 or more")
        return value


# ---------------------------------------------------------------- mining


@dataclass(frozen=True)
class Transactions:
    """Eq. (2): for each class, the set of tree entries of each of its graphs; `table` holds the trees, `counts` the
    nodes that each explains. `seconds`: what they took."""

    table: TreeTable
    classes: dict[int, list[set[int]]]
    graphs: LabelledGraphs
    counts: dict[int, int]
    seconds: float


def transactions(
    graphs: Sequence[Data], hops: int, *, decimals: int | None = None, edge_features: bool = True
) -> Transactions:
    """Trees of depth `hops` of every node, by class."""
    start = time.perf_counter()
    found = discretise(graphs, decimals=decimals, edge_features=edge_features)
    table, classes, counts = TreeTable(), {}, {}
    for graph, labels, edges, edge_labels in zip(graphs, found.labels, found.edges, found.edge_labels, strict=True):
        trees = graph_trees(table, labels, edges, edge_labels, hops)
        classes.setdefault(int(graph.y), []).append(set(trees))
        for tree in trees:
            counts[tree] = counts.get(tree, 0) + 1
    return Transactions(table, dict(sorted(classes.items())), found, counts, time.perf_counter() - start)


def theta_of(support: Support, sizes: dict[int, int]) -> dict[int, int]:
    """Class -> theta_c, a count; InputError where `support` has another number of classes."""
    given = support if isinstance(support, list) else [support] * len(sizes)
    if len(given) != len(sizes):
        raise InputError(f"method_args.support = {support}: {len(given)} values for {len(sizes)} classes")
    return {
        label: math.ceil(theta * size - 1e-9) if theta < 1 else int(theta)
        for (label, size), theta in zip(sizes.items(), given, strict=True)
    }


def mine(
    found: Transactions,
    support: Support,
    *,
    exclusion: Exclusion = "none",
    max_trees: int | None = None,
    most_sets: int = 20_000,
) -> dict[int, dict[ItemSet, int]]:
    """Eq. (3): class -> {set of trees: support}.

    Raises InputError where a class has no frequent set (with the largest support of a tree), where an exclusion leaves
    none, or where there are more than `most_sets` (with the thresholds that would fit).
    """
    classes = found.classes
    if exclusion == "trees":
        held = {label: set().union(*sets) for label, sets in classes.items()}
        shared = {t for c, trees in held.items() for o, others in held.items() if o != c for t in trees & others}
        classes = {label: [trees - shared for trees in sets] for label, sets in classes.items()}
    theta = theta_of(support, {label: len(sets) for label, sets in classes.items()})
    mined: dict[int, dict[ItemSet, int]] = {}
    left = most_sets
    for label, sets in classes.items():
        largest = max((bits.bit_count() for bits in bit_sets(sets).values()), default=0)
        if theta[label] > largest:
            raise InputError(
                f"method_args.support: class {label} has no set of trees in {theta[label]} of its {len(sets)} graphs; "
                f"the most frequent tree is in {largest}"
            )
        try:
            mined[label] = frequent_sets(sets, theta[label], max_size=max_trees, most=left)
        except TooMany:
            raise InputError(_too_many(classes, theta, most_sets, max_trees)) from None
        left -= len(mined[label])
    if exclusion == "patterns":
        mined = exclude_shared(mined)
        for label, own in mined.items():
            if not own:
                raise InputError(f"method_args.exclusion: every frequent set of class {label} is frequent in another")
    return mined


def _too_many(classes: dict[int, list[set[int]]], theta: dict[int, int], most: int, max_trees: int | None) -> str:
    share = max(1, most // len(classes))
    fits = {c: fitting_threshold(sets, theta[c], most=share, max_size=max_trees) for c, sets in classes.items()}
    return (
        f"method_args.support: more than {most} frequent sets at {list(theta.values())}; {list(fits.values())} would "
        "fit, or give max_trees, or a larger most_sets"
    )


def distill(
    graphs: Sequence[Data],
    *,
    hops: int = 2,
    support: Support = 0.5,
    exclusion: Exclusion = "none",
    max_trees: int | None = None,
    most_sets: int = 20_000,
    decimals: int | None = None,
    edge_features: bool = True,
) -> Patterns:
    """Eq. (1) to (3): the frequent sets of trees of labelled PyG graphs, sorted by class, frequency and content.

    No random number is drawn, and neither the order of the nodes and edges nor that of the graphs matters. Arguments
    as in `MirageConfig`; InputError as in `mine`.
    """
    found = transactions(graphs, hops, decimals=decimals, edge_features=edge_features)
    mined = mine(found, support, exclusion=exclusion, max_trees=max_trees, most_sets=most_sets)
    return as_patterns(found, mined)


def as_patterns(found: Transactions, mined: dict[int, dict[ItemSet, int]]) -> Patterns:
    kept = {entry for sets in mined.values() for items in sets for entry in items}
    order = {entry: k for k, entry in enumerate(sorted(kept, key=found.table.canonical))}
    rows = sorted(
        (label, -support, tuple(sorted(order[entry] for entry in items)))
        for label, sets in mined.items()
        for items, support in sets.items()
    )
    entry_of = {k: entry for entry, k in order.items()}
    return Patterns(
        found.table,
        [tuple(entry_of[k] for k in items) for _, _, items in rows],
        [label for label, _, _ in rows],
        [-support for _, support, _ in rows],
        found.graphs.node_rows,
        found.graphs.edge_rows,
    )


def graph_weights(labels: Tensor, frequency: Tensor, shares: Tensor, weighting: Weighting = "frequency") -> Tensor:
    """Weights of the graphs in the loss, mean 1: eq. (6), or its variants.

    labels, frequency (N,) of the distilled graphs; shares (K,) of the classes among the training graphs. frequency:
    pi_c s / sum_c s. balanced: the same with pi_c = 1/K. uniform: 1. Classes without a graph get no share.
    """
    if weighting == "uniform":
        return torch.ones(len(labels))
    s = frequency.float()
    total = torch.zeros(len(shares)).index_add_(0, labels, s)
    prior = (torch.ones(len(shares)) if weighting == "balanced" else shares.float()) * (total > 0)
    weights = prior[labels] * s / total[labels]
    return weights * (len(labels) / weights.sum())


def coverage(counts: dict[int, int]) -> list[float]:
    """Share of the nodes that the k most frequent trees explain, for k = 1, 2, ..."""
    found = torch.tensor(sorted(counts.values(), reverse=True), dtype=torch.float64)
    return (found.cumsum(0) / found.sum()).tolist()


# ---------------------------------------------------------------- the run


def distil_stage(config: Run, data: GraphData, found: Transactions, number: int, name: str) -> Procedure:
    """Gives the artefact `name`, a folder with graphs.safetensors, trees.safetensors and summary.json."""
    args = config.method_args

    def run(context: RunContext) -> Artefacts:
        folder = context.folder / name
        if context.is_main:
            folder.mkdir(exist_ok=True)
            start = time.perf_counter()
            patterns = select(found, args, number)
            graphs = unfold_patterns(patterns)
            seconds = found.seconds + time.perf_counter() - start
            size, edges = pattern_bytes(patterns), config.data.edge_features
            if args.selection == "blind":
                patterns = blind_patterns(patterns, found.classes, size, config.seed)
                graphs, size = unfold_patterns(patterns), pattern_bytes(patterns)
            if args.selection == "random":
                graphs = random_graphs(data.train, size, config.seed, edge_features=edges)
                size = graph_bytes(graphs, edge_features=edges)
            else:
                save_patterns(patterns, folder / "trees.safetensors")
            _check_classes(graphs, data, args.support[number])
            labels = torch.cat([graph.y for graph in graphs])
            frequency = torch.cat([graph.get("frequency", torch.ones(1)) for graph in graphs])
            weights = graph_weights(labels, frequency, runs.class_shares(data), args.weighting)
            for graph, weight in zip(graphs, weights, strict=True):
                graph.weight = weight.view(1)
            save_graphs(graphs, folder / "graphs.safetensors")
            summary = {
                "support": args.support[number],
                "seconds": seconds,
                "graphs": len(graphs),
                "graphs_per_class": torch.bincount(labels, minlength=data.num_classes).tolist(),
                "bytes": size,
                "full_bytes": graph_bytes(data.train, edge_features=edges),
                "tensor_bytes": tensor_bytes(graphs),
                "full_tensor_bytes": tensor_bytes(data.train),
            }
            write_atomically(folder / "summary.json", json.dumps(summary, indent=2))
            context.say(f"{name}: {len(graphs)} graphs, {size} bytes for {summary['full_bytes']}")
        context.accelerator.wait_for_everyone()
        return {name: folder}

    return Procedure(name, run)


def select(found: Transactions, args: MirageConfig, number: int) -> Patterns:
    """The patterns at candidate `number` of the thresholds."""
    size = 1 if args.selection == "single" else args.max_trees
    support = args.support[number]
    mined = mine(found, support, exclusion=args.exclusion, max_trees=size, most_sets=args.most_sets)
    return as_patterns(found, mined)


def _check_classes(graphs: Sequence[Data], data: GraphData, support: Support) -> None:
    held = {int(graph.y) for graph in graphs}
    lacking = [k for k in range(data.num_classes) if k not in held]
    if lacking:
        raise InputError(
            f"method_args.support = {support}: class {lacking[0]} has no distilled graph; its frequent trees are "
            "single nodes: lower the support"
        )


def student_stage(config: Run, data: GraphData, distilled: str, name: str) -> TrainStage:
    """Trains the network on the artefact `distilled`; gives the artefact `name`."""

    def build(context: RunContext) -> TrainSetup:
        graphs = list(load_graphs(context.artefacts[distilled] / "graphs.safetensors"))
        return runs.training_setup(runs.new_network(config, data), graphs, data, config.train, config.seed)

    return TrainStage(name, config.train, build, runs.saver(data), artefact=name)


def stages(config: Run, context: RunContext) -> list[Stage]:
    """full (the same network on all graphs, where asked for), then a set and a student for each theta, and the choice.

    Everything that mining can refuse is refused here, before anything trains.
    """
    data = load_data(config.data, config.seed)
    runs.check(config, data)
    args = config.method_args
    found = transactions(data.train, args.hops, edge_features=config.data.edge_features)
    for number in range(len(args.support)):
        select(found, args, number)
    layers = config.student.args.get("num_layers")
    needed = layers + 1 if config.student.name == "GCN" and isinstance(layers, int) else layers
    if isinstance(needed, int) and args.hops < needed:
        context.say(f"method_args.hops = {args.hops}: exact for this network from {needed} on; roots are approximate")
    result: list[Stage] = [] if config.full is None else [runs.full_stage(config, data)]
    names = [""] if len(args.support) == 1 else [f"-{k}" for k in range(len(args.support))]
    for k, suffix in enumerate(names):
        result.append(distil_stage(config, data, found, k, f"distilled{suffix}"))
        result.append(student_stage(config, data, f"distilled{suffix}", f"student{suffix}"))
    if len(names) > 1:
        result.append(runs.choose_stage(data, len(names)))
    return result


def evaluate(config: Run, artefacts: Artefacts) -> dict[str, Any]:
    """The networks on the test graphs; what the distilled set holds and costs; how exact its roots are.

    bytes_share: bytes of the distilled set over those of the training graphs, both in the smallest integers (see
    `pattern_bytes`, `graph_bytes`). distilled/of_tensors: the same bytes over the training graphs' as PyG holds them,
    distilled/unfolded: the unfolded set over them. student/root_gap: see `root_gap`.
    """
    data, args = load_data(config.data, config.seed), config.method_args
    edges = config.data.edge_features
    summary = runs.read_summary(artefacts["distilled"])
    covered = coverage(transactions(data.train, args.hops, edge_features=edges).counts)
    network = load_classifier(artefacts["student"])
    return {
        **runs.evaluate(config, artefacts, data),
        "bytes_share": summary["bytes"] / summary["full_bytes"],
        "distilled/bytes": summary["bytes"],
        "distilled/of_tensors": summary["bytes"] / summary["full_tensor_bytes"],
        "distilled/unfolded": summary["tensor_bytes"] / summary["full_tensor_bytes"],
        "distilled/graphs": summary["graphs"],
        "distilled/seconds": summary["seconds"],
        "distilled/trees": len(covered),
        "distilled/coverage_20": covered[min(20, len(covered)) - 1],
        "student/root_gap": root_gap(network, data.test[:8], args.hops, edge_features=edges),
    }


def predict(config: Run, artefacts: Artefacts, count: int) -> list[dict[str, Any]]:
    """The most weighty distilled graphs of each class in turn, beside a real graph of the class, for the report."""
    graphs = list(load_graphs(artefacts["distilled"] / "graphs.safetensors"))
    return runs.predict(load_data(config.data, config.seed), graphs, count)


METHOD = Method("mirage", __doc__, GraphRun[MirageConfig], stages, evaluate, predict)
