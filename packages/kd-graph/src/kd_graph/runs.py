"""The run config of node classification and the stages that its methods share.

A run is: a graph network trained on the labelled nodes (once, and cached), its logits of every node, a student that
sees those logits and never the network, and the export of the student.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kd_graph import __version__, export
from kd_graph import metrics as m
from kd_graph.data import NodeData, NodeDataConfig, load_nodes
from kd_graph.drawing import draw_neighbourhood
from kd_graph.engine.edges import WholeGraph, edge_loader, full_batch
from kd_graph.models import ModelConfig, OnGraph, count_parameters, create_model, load_on_graph, save_model
from kdcore.config import MethodConfig, MethodRunConfig, TrainConfig
from kdcore.distiller import Distiller, LossTerms
from kdcore.errors import InputError, did_you_mean
from kdcore.stages import Artefacts, CachedStage, Procedure, RunContext, Stage
from kdcore.training import TrainSetup, TrainStage

A = TypeVar("A", bound=MethodConfig)
VALIDATION = ("accuracy", "nll", "latest_accuracy")
"""What a training can monitor. latest_accuracy: of equal accuracies the latest epoch's is the best."""


class TeacherConfig(ModelConfig):
    train: TrainConfig | None = Field(None, description="how to train it on the spot; None: it comes with weights")
    cache: str | None = Field(None, description="folder of `kd cache`: its logits replace the network in the run")

    @model_validator(mode="after")
    def _has_weights(self) -> TeacherConfig:
        if self.train is None and self.checkpoint is None:
            raise ValueError("has no weights: give checkpoint, or train")
        return self


class NodeRun(MethodRunConfig[A], Generic[A]):
    """The config of a run: two networks, the graph, the method's arguments and the budget."""

    teacher: TeacherConfig
    student: ModelConfig
    data: NodeDataConfig = Field(default_factory=NodeDataConfig)
    batch_edges: int | None = Field(
        None, ge=8, description="edges of a step, sampled with their ends; None: the whole graph in each step"
    )
    export: list[Literal["torchscript", "onnx"]] = Field(
        default_factory=list, description="further formats of the student, written to export/"
    )


Run = NodeRun[Any]
Build = Callable[[Any, nn.Module], Distiller]


# ---------------------------------------------------------------- stages


class SupervisedNodes(Distiller):
    """Cross-entropy on the labelled nodes; a batch is (x, edge_index, y, labelled)."""

    def __init__(self, student: nn.Module):
        super().__init__()
        self.student = student

    def loss(self, batch: Sequence[Tensor], player: str = "student") -> LossTerms:
        x, edge_index, y, labelled = batch
        return LossTerms(ce=(1.0, F.cross_entropy(self.student(x, edge_index)[labelled], y[labelled])))


def node_stages(config: Run, data: NodeData, build: Build) -> list[Stage]:
    """teacher, logits, student and, where the config asks for it, export."""
    stages: list[Stage] = [teacher_stage(config, data), logits_stage(config, data), student_stage(config, data, build)]
    if config.export:
        stages.append(Procedure("export", lambda context: export_student(config, data, context)))
    return stages


def teacher_stage(config: Run, data: NodeData) -> Stage:
    """Gives the artefact `teacher`, a saved folder: from weights, or trained on the observed graph and cached."""
    teacher = config.teacher

    def write(network: nn.Module, folder: Path) -> None:
        save_model(network.network, folder, class_names=data.class_names, self_loops=teacher.self_loops)

    def from_weights(context: RunContext) -> Artefacts:
        if context.is_main:
            write(_on_graph(teacher, data), context.folder / "teacher")
        context.accelerator.wait_for_everyone()
        return {"teacher": context.folder / "teacher"}

    if teacher.train is None:
        return Procedure("teacher", from_weights)

    def build(context: RunContext) -> TrainSetup:
        distiller, graph = SupervisedNodes(_on_graph(teacher, data)), data.observed
        nodes = graph.train_mask.nonzero().squeeze(1)
        device = context.accelerator.device
        batch = tuple(part.to(device) for part in (graph.x, graph.edge_index, graph.y, nodes))
        held_out = graph.val_mask.to(device)

        def evaluate(network: nn.Module) -> dict[str, float]:
            logits = network(batch[0], batch[1])[held_out]
            return validation(logits, batch[2][held_out], distiller)

        return TrainSetup(distiller, WholeGraph(batch), evaluate)

    stage = TrainStage("teacher", teacher.train, build, write, artefact="teacher")
    identity = {
        "version": __version__,
        "torch": torch.__version__,
        "model": teacher.model_dump(mode="json", exclude={"cache"}),
        "data": data.config.model_dump(mode="json"),
        "seed": config.seed,
    }
    return CachedStage(stage, identity)


def _on_graph(config: ModelConfig, data: NodeData, field: str = "teacher") -> OnGraph:
    network = create_model(config, data.num_features, data.num_classes, field=field)
    return OnGraph(network, self_loops=config.self_loops)


def logits_stage(config: Run, data: NodeData) -> Stage:
    """Gives the artefact `logits`, a safetensors file: logits (n, C) of every observed node, in eval mode."""

    def run(context: RunContext) -> Artefacts:
        path = context.folder / "logits" / "logits.safetensors"
        if context.is_main:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({"logits": _teacher_logits(config, data, context)}, path)
        context.accelerator.wait_for_everyone()
        return {"logits": path}

    return Procedure("logits", run)


def _teacher_logits(config: Run, data: NodeData, context: RunContext) -> Tensor:
    graph = data.observed
    if config.teacher.cache is not None:
        from kdcore.gpu import TeacherCache

        cache = TeacherCache.open(Path(config.teacher.cache), data=data_identity(config))
        return cache[torch.arange(graph.num_nodes)].float()
    device = context.accelerator.device
    return whole_logits(load_on_graph(context.artefacts["teacher"], field="teacher").to(device), graph).cpu()


@torch.no_grad()
def whole_logits(network: nn.Module, graph: Any) -> Tensor:
    """Logits (n, C) of all nodes by an `OnGraph` network in eval mode, on its device."""
    device = next(network.parameters()).device
    return network.eval()(graph.x.to(device), graph.edge_index.to(device)).float()


def student_stage(config: Run, data: NodeData, build: Build) -> TrainStage:
    """Trains the distiller that `build(config, student)` makes; gives the artefact `student`, a saved folder."""

    def setup(context: RunContext) -> TrainSetup:
        distiller = build(config, create_model(config.student, data.num_features, data.num_classes, field="student"))
        device, graph = context.accelerator.device, data.observed
        teacher = load_file(context.artefacts["logits"])["logits"]
        nodes = graph.train_mask.nonzero().squeeze(1)
        held_x, held_y = graph.x[graph.val_mask].to(device), graph.y[graph.val_mask].to(device)

        def evaluate(network: nn.Module) -> dict[str, float]:
            return validation(network(held_x), held_y, distiller)

        if config.batch_edges is None:
            parts = (part.to(device) for part in (graph.x, graph.y, nodes, graph.edge_index, teacher))
            return TrainSetup(distiller, WholeGraph(full_batch(*parts)), evaluate)
        loader = edge_loader(
            graph.x,
            graph.y,
            nodes,
            graph.edge_index,
            teacher,
            batch_edges=config.batch_edges,
            seed=config.seed,
            num_workers=config.train.num_workers,
        )
        return TrainSetup(distiller, loader, evaluate)

    def save(network: nn.Module, folder: Path) -> None:
        save_model(network, folder, class_names=data.class_names)

    return TrainStage("student", config.train, setup, save)


def validation(logits: Tensor, labels: Tensor, distiller: Distiller) -> dict[str, float]:
    """Metrics of the validation nodes. A billionth per epoch makes the latest of equal accuracies the best."""
    accuracy = float((logits.argmax(1) == labels).double().mean())
    nll = float(F.cross_entropy(logits.float(), labels))
    return {"accuracy": accuracy, "nll": nll, "latest_accuracy": accuracy + 1e-9 * distiller.progress.epoch}


def export_student(config: Run, data: NodeData, context: RunContext) -> Artefacts:
    """Writes export/student.pt (TorchScript) and export/student.onnx."""
    folder = context.folder / "export"
    if context.is_main:
        student = load_on_graph(context.artefacts["student"]).network
        folder.mkdir(exist_ok=True)
        for kind in config.export:
            export.write(student, folder, kind, num_features=data.num_features)
    context.accelerator.wait_for_everyone()
    return {"export": folder}


def check(config: Run, data: NodeData) -> None:
    """Builds both networks and reads what the run needs, so that what is wrong is said before anything trains."""
    for name, train in (("teacher.train", config.teacher.train), ("train", config.train)):
        if train is not None and train.monitor is not None and train.monitor not in VALIDATION:
            hint = did_you_mean(train.monitor, VALIDATION)
            raise InputError(f"{name}.monitor = '{train.monitor}': not a metric{hint}")
    if config.student.name != "MLP":
        raise InputError(f"student.name = '{config.student.name}': allowed: MLP, the student sees no graph")
    for kind in config.export:
        export.check(kind)
    graph = data.observed
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for field, model in (("teacher", config.teacher), ("student", config.student)):
            network = _on_graph(model, data, field).eval()
            try:
                logits = network(graph.x[:2], torch.tensor([[0, 1], [1, 0]]))
            except (RuntimeError, TypeError, ValueError, AssertionError) as error:
                raise InputError(f"{field}: the network does not take the graph ({error})") from None
            if logits.shape != (2, data.num_classes):
                shape = tuple(logits.shape[1:])
                raise InputError(f"{field}: gives {shape} outputs, the data has {data.num_classes} classes")
    if config.teacher.cache is not None:
        from kdcore.gpu import TeacherCache

        TeacherCache.open(Path(config.teacher.cache), data=data_identity(config))


# ---------------------------------------------------------------- evaluation


def evaluate(config: Run, artefacts: Artefacts, *, data: NodeData | None = None) -> dict[str, Any]:
    """Both networks on the test nodes, the spectrum of their logits over the whole graph, and what an answer costs."""
    data = data or load_nodes(config.data, config.seed)
    teacher, student = load_on_graph(artefacts["teacher"]), load_on_graph(artefacts["student"])
    result: dict[str, Any] = {}
    logits = {role: whole_logits(network, data.graph) for role, network in (("student", student), ("teacher", teacher))}
    for role, network in (("student", student), ("teacher", teacher)):
        found = m.classification_metrics(logits[role][data.test], data.graph.y[data.test])
        found |= m.spectral_energy(logits[role], data.graph.edge_index)
        result |= m.prefixed(role, {**found, "parameters": count_parameters(network)})
    same = logits["student"][data.test].argmax(1) == logits["teacher"][data.test].argmax(1)
    return {**result, "agreement": float(same.double().mean()), **latencies(teacher, student, data)}


@torch.no_grad()
def latencies(teacher: OnGraph, student: OnGraph, data: NodeData) -> dict[str, float]:
    """Milliseconds for the test nodes at once and for one of them (median of 16), on the networks' device.

    The student reads the features of the nodes asked for. The teacher passes messages over the whole graph for all of
    them; for one node, over the subgraph within as many hops as it has layers, whose extraction counts.
    """
    from torch_geometric.utils import k_hop_subgraph

    graph, device = data.graph, next(student.parameters()).device
    x, edges = graph.x.to(device), graph.edge_index.to(device)
    hops = int(getattr(teacher.network, "num_layers", 2))
    some = data.test[torch.linspace(0, len(data.test) - 1, min(16, len(data.test))).long()].tolist()

    def teacher_for(node: int) -> Tensor:
        near, near_edges, place, _ = k_hop_subgraph(node, hops, edges, relabel_nodes=True, num_nodes=len(x))
        return teacher(x[near], near_edges)[place]

    def each(answer: Callable[[int], Tensor]) -> float:
        return m.median_milliseconds(lambda: [answer(node) for node in some], repeats=3, device=device) / len(some)

    asked = x[data.test]
    return {
        "student/latency_ms": m.median_milliseconds(lambda: student.network(asked), device=device),
        "teacher/latency_ms": m.median_milliseconds(lambda: teacher(x, edges), device=device),
        "student/node_latency_ms": each(lambda node: student.network(x[node : node + 1])),
        "teacher/node_latency_ms": each(teacher_for),
    }


def observed_logits(artefacts: Artefacts, data: NodeData) -> tuple[Tensor, Tensor]:
    """(teacher's logits that the student was given, student's logits) (n, C) on the observed nodes, in eval mode."""
    student = load_on_graph(artefacts["student"])
    return load_file(artefacts["logits"])["logits"], whole_logits(student, data.observed)


def predict(config: Run, artefacts: Artefacts, count: int) -> list[dict[str, Any]]:
    """Test nodes with their neighbours drawn around them, or their pixels, and both answers, for the report.

    Half of them are errors of the student, where it has that many.
    """
    data = load_nodes(config.data, config.seed)
    networks = {role: load_on_graph(artefacts[role]) for role in ("teacher", "student")}
    chance = {role: whole_logits(network, data.graph).softmax(1) for role, network in networks.items()}
    answers = chance["student"].argmax(1)
    wrong = answers[data.test] != data.graph.y[data.test]
    order = data.test[torch.argsort(wrong, descending=True, stable=True)]
    half = min(count // 2, int(wrong.sum()))
    samples = []
    for node in [*order[:half].tolist(), *order[int(wrong.sum()) :][: count - half].tolist()]:
        if config.data.name == "digits":
            picture = (data.graph.x[node].view(8, 8) * 255).byte().numpy().repeat(6, 0).repeat(6, 1)
        else:
            picture = draw_neighbourhood(node, data.graph.edge_index, data.graph.y, data.num_classes)
        guesses = {role: _guess(p[node], data.class_names) for role, p in chance.items()}
        samples.append({"image": picture, "truth": data.class_names[int(data.graph.y[node])], **guesses})
    return samples


def _guess(probability: Tensor, class_names: Sequence[str]) -> dict[str, Any]:
    best = int(probability.argmax())
    return {"label": class_names[best], "probability": float(probability[best])}


# ---------------------------------------------------------------- teacher cache


def data_identity(config: Run) -> str:
    """What a node's teacher logits depend on besides the teacher: the observed graph."""
    from kdcore.stages import digest

    return digest({"data": config.data.model_dump(mode="json"), "seed": config.seed})


def write_cache(config: Run, folder: Path) -> dict[str, Any]:
    """`kd cache`: the teacher's logits of every observed node, for `teacher.cache`."""
    from kdcore.gpu import TeacherCache

    data = load_nodes(config.data, config.seed)
    if config.teacher.train is not None:
        raise InputError("teacher.train: `kd cache` needs a teacher with weights; give teacher.checkpoint")
    teacher = _on_graph(config.teacher, data).eval()
    logits = whole_logits(teacher, data.observed)
    with TeacherCache.create(
        folder, kind="full", num_outputs=data.num_classes, teacher=teacher, data=data_identity(config)
    ) as writer:
        for nodes in torch.arange(len(logits)).split(1024):
            writer.add(nodes, logits[nodes])
    return {"samples": len(logits), "folder": str(folder)}
