"""The run config of graph classification and the stages that its methods share: training on a list of graphs, real or
distilled, the same network on all training graphs for comparison, and the evaluation."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from kd_graph import __version__
from kd_graph import metrics as m
from kd_graph.drawing import draw_distilled, draw_graph
from kd_graph.engine.distilled import Patterns, unfold_patterns
from kd_graph.engine.edges import WholeGraph
from kd_graph.engine.trees import TreeTable, discretise, graph_trees
from kd_graph.graph_data import GraphData, GraphDataConfig
from kd_graph.graph_models import (
    GraphClassifier,
    GraphModelConfig,
    classify,
    create_classifier,
    load_classifier,
    save_classifier,
)
from kd_graph.models import count_parameters
from kdcore.config import MethodConfig, MethodRunConfig, TrainConfig
from kdcore.data import seeded_loader
from kdcore.distiller import Distiller, LossTerms
from kdcore.errors import InputError, did_you_mean
from kdcore.stages import Artefacts, CachedStage, Procedure, RunContext, Stage
from kdcore.training import TrainSetup, TrainStage

A = TypeVar("A", bound=MethodConfig)
VALIDATION = ("accuracy", "nll", "auroc", "latest_accuracy")


class GraphRun(MethodRunConfig[A], Generic[A]):
    """The config of a run: one network, the graphs, the method's arguments, two budgets."""

    student: GraphModelConfig
    data: GraphDataConfig = Field(default_factory=GraphDataConfig)
    full: TrainConfig | None = Field(
        None, description="training of the same network on all training graphs, for comparison; None: left out"
    )


Run = GraphRun[Any]


class GraphTraining(Distiller):
    """Cross-entropy on labelled graphs, each with its `weight` (B,) where the batch has one (mean 1 over the set)."""

    def __init__(self, student: nn.Module):
        super().__init__()
        self.student = student

    def loss(self, batch: Any, player: str = "student") -> LossTerms:
        rows = F.cross_entropy(self.student(batch), batch.y, reduction="none")
        weight = batch.get("weight")
        return LossTerms(ce=(1.0, rows.mean() if weight is None else (weight * rows).mean()))


def graph_loader(graphs: Sequence[Any], batch_size: int, *, seed: int, num_workers: int = 0) -> Any:
    """PyG batches in a seeded random order; a set that fits in one is kept collated."""
    from torch_geometric.data import Batch

    def collate(items: Sequence[Any]) -> Any:
        return Batch.from_data_list(list(items), exclude_keys=["pos", "pattern_id"])

    if len(graphs) <= batch_size:
        return WholeGraph(collate(graphs))
    return seeded_loader(list(graphs), batch_size, seed=seed, num_workers=num_workers, collate=collate)


def training_setup(
    network: GraphClassifier, graphs: Sequence[Any], data: GraphData, train: TrainConfig, seed: int
) -> TrainSetup:
    """The set-up of a training on `graphs`, with validation on the real validation graphs."""
    distiller = GraphTraining(network)
    loader = graph_loader(graphs, train.batch_size, seed=seed, num_workers=train.num_workers)

    def evaluate(module: nn.Module) -> dict[str, float]:
        logits, labels = classify(module, data.validation)
        return {**validation(logits, labels), "latest_accuracy": accuracy(logits, labels) + 1e-9 * epoch()}

    def epoch() -> int:
        return distiller.progress.epoch

    return TrainSetup(distiller, loader, evaluate)


def accuracy(logits: Tensor, labels: Tensor) -> float:
    return float((logits.argmax(1) == labels).double().mean())


def validation(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """accuracy, nll, and auroc of two classes, of validation graphs."""
    found = {"accuracy": accuracy(logits, labels), "nll": float(F.cross_entropy(logits, labels))}
    if logits.shape[1] == 2 and len(labels.unique()) == 2:
        from torchmetrics.functional.classification import binary_auroc

        found["auroc"] = float(binary_auroc((logits[:, 1] - logits[:, 0]).sigmoid(), labels))
    return found


def new_network(config: Run, data: GraphData) -> GraphClassifier:
    return create_classifier(config.student, data.num_features, data.num_classes, edge_channels=data.num_edge_features)


def full_stage(config: Run, data: GraphData) -> Stage:
    """Gives the artefact `full`: the student's network trained on all training graphs; cached."""
    train = config.full
    assert train is not None

    def build(context: RunContext) -> TrainSetup:
        return training_setup(new_network(config, data), data.train, data, train, config.seed)

    identity = {
        "version": __version__,
        "torch": torch.__version__,
        "model": config.student.model_dump(mode="json"),
        "train": train.model_dump(mode="json"),
        "data": config.data.model_dump(mode="json"),
        "seed": config.seed,
    }
    return CachedStage(TrainStage("full", train, build, saver(data), artefact="full"), identity)


def class_shares(data: GraphData) -> Tensor:
    labels = torch.cat([graph.y for graph in data.train])
    return torch.bincount(labels, minlength=data.num_classes) / len(labels)


def choose_stage(data: GraphData, count: int) -> Procedure:
    """Of candidates 0 to count - 1 the best on the validation graphs becomes `student` and `distilled`.

    By area under the curve for two classes, else by accuracy; of equal ones the one with fewer bytes.
    """

    def run(context: RunContext) -> Artefacts:
        targets = {name: context.folder / name for name in ("student", "distilled")}
        if context.is_main:
            scores = []
            for k in range(count):
                logits, labels = classify(load_classifier(context.artefacts[f"student-{k}"]), data.validation)
                score = validation(logits, labels)
                summary = read_summary(context.artefacts[f"distilled-{k}"])
                scores.append((score.get("auroc", score["accuracy"]), -summary["bytes"], -k))
                context.log(kind="candidate", candidate=k, support=summary["support"], bytes=summary["bytes"], **score)
            best = -max(scores)[2]
            for name, target in targets.items():
                shutil.copytree(context.artefacts[f"{name}-{best}"], target, dirs_exist_ok=True)
        context.accelerator.wait_for_everyone()
        return targets

    return Procedure("choose", run)


def read_summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


def saver(data: GraphData) -> Any:
    def save(network: nn.Module, folder: Path) -> None:
        save_classifier(network, folder, class_names=data.class_names)

    return save


def check(config: Run, data: GraphData) -> None:
    """Builds the network and passes a graph through it, so that what is wrong is said before anything trains."""
    for name, train in (("full", config.full), ("train", config.train)):
        if train is not None and train.monitor is not None and train.monitor not in VALIDATION:
            raise InputError(
                f"{name}.monitor = '{train.monitor}': not a metric{did_you_mean(train.monitor, VALIDATION)}"
            )
    with torch.random.fork_rng(devices=[]):
        network = new_network(config, data)
        try:
            classify(network, data.train[:2])
        except (RuntimeError, TypeError, ValueError, AssertionError) as error:
            raise InputError(f"student: the network does not take these graphs ({error})") from None


def evaluate(config: Run, artefacts: Artefacts, data: GraphData) -> dict[str, Any]:
    """Metrics of the student, and of the network that saw all graphs, on the test graphs."""
    result: dict[str, Any] = {}
    for role in ("student", "full"):
        if role not in artefacts:
            continue
        network = load_classifier(artefacts[role], field=role)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torchmetrics, where a test part lacks a class
            logits, labels = classify(network, data.test)
            result |= m.prefixed(role, m.classification_metrics(logits, labels))
        result[f"{role}/parameters"] = count_parameters(network)
    return result


@torch.no_grad()
def root_gap(network: Any, graphs: Sequence[Any], hops: int, *, edge_features: bool = True) -> float:
    """How exact message passing on unfolded trees is for a network (`embed(data)` gives its node embeddings):

    max |h at the root of Tr_hops(v) - h of v| / max |h| over the nodes of `graphs`
    """
    largest = norm = 0.0
    for graph in graphs:
        found = discretise([graph], edge_features=edge_features)
        table = TreeTable()
        trees = graph_trees(table, found.labels[0], found.edges[0], found.edge_labels[0], hops)
        inner = [k for k, tree in enumerate(trees) if table.children[tree]]
        if not inner:
            continue
        sets = [tuple(trees[k] for k in inner)]
        (forest,) = unfold_patterns(Patterns(table, sets, [0], [1], found.node_rows, found.edge_rows))
        there, here = network.embed(forest)[forest.root_mask], network.embed(graph)[inner]
        largest = max(largest, float((there - here).abs().max()))
        norm = max(norm, float(here.abs().max()))
    return largest / max(norm, 1e-30)


def predict(data: GraphData, graphs: Sequence[Any], count: int) -> list[dict[str, Any]]:
    """Rows of pictures: the most weighty of the distilled graphs of each class in turn, beside a real one."""
    by_class = [
        sorted((g for g in graphs if int(g.y) == k), key=lambda g: -float(g.weight)) for k in range(data.num_classes)
    ]
    rows = [(k, own[i]) for i in range(max(map(len, by_class))) for k, own in enumerate(by_class) if i < len(own)]
    samples = []
    for position, (label, graph) in enumerate(rows[:count]):
        real = [g for g in data.train if int(g.y) == label]
        images = {
            "distilled": (draw_distilled if "root_mask" in graph else draw_graph)(graph),
            "a training graph": draw_graph(real[position % len(real)]),
        }
        share = float(graph.weight) / len(graphs)
        samples.append({"caption": f"class {data.class_names[label]}, {share:.1%} of the loss", "images": images})
    return samples
