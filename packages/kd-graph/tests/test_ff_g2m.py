"""FF-G2M: the losses in numbers, what they depend on, sampled edges, whole runs and what they ship."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from kd_graph import export
from kd_graph.engine.edges import edge_loader, full_batch
from kd_graph.methods.ff_g2m import FFG2M, frequency_terms, high_frequency_loss, low_frequency_loss, node_loss
from kdcore.errors import InputError
from kdcore.method import load_config
from kdcore.run import evaluate, train

Z, T = [[1.0, 0.0], [0.0, 0.0]], [[2.0, 0.0], [0.0, 1.0]]
EDGE = torch.tensor([[0, 1], [1, 0]])
LOOPS = torch.tensor([[0, 1], [0, 1]])
CLOSED = torch.cat([EDGE, LOOPS], 1)


def double(values, **options) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, **options)


def closed(edge_index: Tensor, nodes: int) -> Tensor:
    return torch.cat([edge_index, torch.arange(nodes).expand(2, -1)], 1)


def low_by_hand(z: Tensor, t: Tensor, edges: Tensor) -> Tensor:
    i, j = edges
    return F.kl_div(z.log_softmax(1)[i], t.log_softmax(1)[j], log_target=True, reduction="batchmean")


def high_by_hand(z: Tensor, t: Tensor, edges: Tensor, tau: float) -> Tensor:
    i, j = edges
    pattern = [((x[i] - x[j]).abs() / tau).log_softmax(1) for x in (z, t)]
    return F.kl_div(*pattern, log_target=True, reduction="batchmean")


class Table(nn.Module):
    """A student whose logits are its parameters."""

    def __init__(self, z: Tensor):
        super().__init__()
        self.z = nn.Parameter(z.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return self.z


# ---------------------------------------------------------------- the losses


@pytest.mark.parametrize(
    ("edges", "value"),
    [
        (CLOSED, 0.2420013272),
        ([[0], [0]], 0.0671307545),
        ([[1], [1]], 0.1109440717),
        ([[0], [1]], 0.4621171573),
        ([[1], [0]], 0.3278133255),
    ],
)
def test_low_term_in_numbers(edges, value):
    assert low_frequency_loss(double(Z), double(T), torch.as_tensor(edges)).item() == pytest.approx(value, abs=5e-11)


def test_whole_objective_in_numbers():
    batch = full_batch(torch.zeros(2, 1).double(), torch.tensor([0, 1]), torch.tensor([0]), EDGE, double(T))
    terms = FFG2M(Table(double(Z)), lam=0.4, tau=1.5).loss(batch)
    assert {name: (round(w, 6), round(v.item(), 9)) for name, (w, v) in terms.items()} == {
        "ce": (0.4, 0.313261688),
        "low": (0.6, 0.242001327),
        "high": (0.6, 0.0),  # |z_0 - z_1| is (1, 0), |t_0 - t_1| (2, 1): softmax does not see a constant
    }
    assert terms.total().item() == pytest.approx(0.2705054713, abs=5e-11)
    glnn = FFG2M(Table(double(Z)), lam=0.4, low="node", high=False).loss(batch)
    assert list(glnn) == ["ce", "node"]
    assert glnn["node"][1].item() == pytest.approx(0.0890374131, abs=5e-11)


def test_the_low_term_is_not_zero_at_the_teacher_but_at_no_neighbour():
    t = double(T, requires_grad=True)
    assert low_frequency_loss(t, t.detach(), CLOSED).item() == pytest.approx(0.4588917425, abs=5e-11)
    high = high_frequency_loss(t, t.detach(), EDGE, 1.5)
    assert high.item() == 0
    assert torch.autograd.grad(high, t)[0].abs().max() == 0
    mean = double([[0.57486925, 0.42513075]] * 2)
    torch.testing.assert_close(double(T).softmax(1).mean(0), mean[0], atol=5e-9, rtol=0)
    best = mean.log().requires_grad_()
    value = low_frequency_loss(best, double(T), CLOSED)
    assert value.item() == pytest.approx(0.2081256151, abs=5e-11)
    assert torch.autograd.grad(value, best)[0].abs().max() < 1e-8


@pytest.mark.parametrize("seed", range(4))
def test_terms_are_the_means_over_edges(seed, random_graph):
    z, t, edges = random_graph(seed)
    low, high = low_by_hand(z, t, closed(edges, 8)), high_by_hand(z, t, edges, 1.3)
    assert low_frequency_loss(z, t, closed(edges, 8)).item() == pytest.approx(low.item(), abs=1e-14)
    for chunk in (None, 1, 3):
        found = high_frequency_loss(z, t, edges, 1.3, chunk=chunk)
        assert found.item() == pytest.approx(high.item(), abs=1e-14)
        torch.testing.assert_close(torch.autograd.grad(found, z)[0], torch.autograd.grad(high, z, retain_graph=True)[0])
    batch = full_batch(z.detach(), torch.zeros(8).long(), torch.arange(2), edges, t)
    terms = FFG2M(Table(z), tau=1.3).loss(batch)  # half of the edges, targets summed beforehand
    assert terms["low"][1].item() == pytest.approx(low.item(), abs=1e-14)
    assert terms["high"][1].item() == pytest.approx(high.item(), abs=1e-14)
    assert torch.autograd.gradcheck(lambda x: high_frequency_loss(x, t, edges, 1.3), (z,))


@pytest.mark.parametrize("seed", range(3))
def test_gradient_of_the_low_term_in_matrix_form(seed, random_graph):
    z, t, edges = random_graph(seed)
    t.requires_grad_()
    every = closed(edges, 8)
    gradient = torch.autograd.grad(low_frequency_loss(z, t, every), z)[0]
    adjacency = torch.zeros(8, 8, dtype=torch.float64)
    adjacency[every[0], every[1]] = 1
    expected = (adjacency.sum(1, keepdim=True) * z.softmax(1) - adjacency @ t.softmax(1)) / every.shape[1]
    torch.testing.assert_close(gradient, expected.detach(), atol=1e-15, rtol=1e-12)
    total = low_frequency_loss(z, t, every) + high_frequency_loss(z, t, edges, 1.5)
    assert torch.autograd.grad(total, t, allow_unused=True)[0] is None


def test_without_edges_only_the_nodes_are_left(random_graph):
    z, t, _ = random_graph(0)
    none = torch.zeros(2, 0, dtype=torch.int64)
    assert low_frequency_loss(z, t, closed(none, 8)).item() == pytest.approx(node_loss(z, t).item())
    assert high_frequency_loss(z, t, none, 1.5).item() == 0
    batch = full_batch(z.detach(), torch.zeros(8).long(), torch.arange(8), none, t)
    total = FFG2M(Table(z)).double().loss(batch).total()
    assert torch.isfinite(total)


def test_direction_temperature_and_gauge(random_graph):
    z, t, edges = random_graph(1)
    every, high = closed(edges, 8), high_frequency_loss(z, t, edges, 1.5).item()
    assert high_frequency_loss(z, t, edges.flip(0), 1.5).item() == pytest.approx(high)
    low = low_frequency_loss(z, t, every).item()
    assert low_frequency_loss(z, t, every.flip(0)).item() == pytest.approx(low)
    assert high_frequency_loss(z, t, edges, 1e8).item() < 1e-12
    assert high_frequency_loss(3 * z, 3 * t, edges, 4.5).item() == pytest.approx(high)
    shifted = z + torch.eye(8, dtype=torch.float64)[:, :1]  # all logits of node 0
    assert low_frequency_loss(shifted, t, every).item() == pytest.approx(low)
    assert abs(high_frequency_loss(shifted, t, edges, 1.5).item() - high) > 1e-4


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"lam": 1.0}, ["ce"]),
        ({"lam": 0.0}, ["low", "high"]),
        ({"high": False}, ["ce", "low"]),
        ({"low": "none"}, ["ce", "high"]),
        ({"low": "node", "high": False}, ["ce", "node"]),
    ],
)
def test_arms_have_their_terms(options, names, random_graph):
    z, t, edges = random_graph(2)
    labels = torch.full((8,), -1)  # lambda = 0 must not read them
    labelled = torch.arange(8) if "ce" not in names else torch.arange(0)
    batch = full_batch(z.detach(), labels, labelled, edges, t)
    assert list(FFG2M(Table(z), **options).loss(batch)) == names


def test_half_precision_is_computed_in_float32(random_graph):
    z, t, edges = random_graph(3)
    for loss in (low_frequency_loss, high_frequency_loss):
        half = loss(z.detach().bfloat16(), t.bfloat16(), edges)
        assert half.dtype == torch.float32
        assert half.item() == pytest.approx(loss(z.detach().bfloat16().float(), t.bfloat16().float(), edges).item())


def test_bad_arguments_are_named(random_graph):
    z, t, edges = random_graph(0)
    with pytest.raises(InputError, match=r"shapes \(8, 4\) and \(8, 3\)"):
        low_frequency_loss(z, t[:, :3], edges)
    with pytest.raises(InputError, match=r"edge_index: torch.float64 \(2, \d+\); allowed: int64"):
        high_frequency_loss(z, t, edges.double())
    with pytest.raises(InputError, match="tau = 0"):
        high_frequency_loss(z, t, edges, 0.0)
    with pytest.raises(InputError, match="both directions of every edge"):
        full_batch(z, torch.zeros(8), torch.arange(2), edges[:, edges[0] < edges[1]], t)
    with pytest.raises(InputError, match="low = 'mean'"):
        FFG2M(nn.Identity(), low="mean")


# ---------------------------------------------------------------- sampled edges


def test_sampled_batches_are_unbiased(random_graph):
    """The mean of the terms over many small batches is the term of the whole graph; node by node for GLNN."""
    z, t, edges = random_graph(5)
    y, labelled = torch.arange(8) % 4, torch.arange(5)
    loader = edge_loader(z.detach(), y, labelled, edges, t, batch_edges=400_000, batch_labels=5, seed=0)
    batch = next(iter(loader))
    whole = full_batch(z.detach(), y, labelled, edges, t)
    for options in ({}, {"low": "node", "high": False}):
        few, every = (FFG2M(nn.Identity(), **options).loss(b) for b in (batch, whole))
        for name in every:
            assert few[name][1].item() == pytest.approx(every[name][1].item(), rel=0.01), name


def test_batches_depend_on_seed_and_epoch_alone(random_graph):
    z, t, edges = random_graph(6, nodes=40)
    arguments = (z.detach(), torch.zeros(40).long(), torch.arange(10), edges, t)
    first, again, other = (edge_loader(*arguments, batch_edges=16, seed=seed) for seed in (1, 1, 2))
    epochs = []
    for loader, epoch in ((first, 0), (again, 0), (first, 1), (other, 0)):
        loader.sampler.set_epoch(epoch)
        epochs.append([batch.edges.shape[1] for batch in loader] + [batch.x.sum().item() for batch in loader])
    assert epochs[0] == epochs[1]
    assert epochs[0] != epochs[2]
    assert epochs[0] != epochs[3]
    assert len(first) == round((edges.shape[1] + 40) / 16)


def test_a_batch_has_its_share_of_the_labels(random_graph):
    z, t, edges = random_graph(6, nodes=40)
    y = torch.arange(40)
    loader = edge_loader(z.detach(), y, torch.arange(20, 40), edges, t, batch_edges=64, batch_labels=8)
    for batch in loader:
        assert len(batch.labelled) == 8
        assert (batch.y[batch.labelled] >= 20).all()
        torch.testing.assert_close(batch.x[batch.labelled], z.detach()[batch.y[batch.labelled]])
    with pytest.raises(InputError, match="batch_edges = 3: allowed: 8 or more"):
        edge_loader(z.detach(), y, torch.arange(4), edges, t, batch_edges=3)


MEMORY = """
import torch
from pathlib import Path
from kd_graph.methods.ff_g2m import high_frequency_loss
torch.set_num_threads(1)
n, edges, classes = 20_000, 500_000, 10
generator = torch.Generator().manual_seed(0)
edge_index = torch.randint(n, (2, edges), generator=generator)
z, t = torch.randn(2, n, classes, generator=generator)
z.requires_grad_()
def plain(z, t, edge_index):
    i, j = edge_index
    log_s, log_t = (((x[i] - x[j]).abs() / 1.5).log_softmax(1) for x in (z, t))
    return torch.nn.functional.kl_div(log_s, log_t, log_target=True, reduction="batchmean")
def peak():  # of this process alone: ru_maxrss would begin with the size of the one that started it
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
before = peak()
LOSS(z, t, edge_index).backward()
print((peak() - before) / 1024)
"""


@pytest.mark.slow
def test_memory_does_not_hold_the_classes_of_every_edge():
    """Half a million edges, ten classes: less than two (E, C) tensors; the same term written out needs many of them."""
    one_tensor = 500_000 * 10 * 4 / 2**20
    found = {}
    for loss in ("high_frequency_loss", "plain"):
        code = MEMORY.replace("LOSS", loss)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        found[loss] = float(done.stdout)
    assert found["plain"] > 5 * one_tensor
    assert found["high_frequency_loss"] < 2 * one_tensor


# ---------------------------------------------------------------- whole runs

SHRUNK = [
    "train.epochs=12",
    "train.checkpoint_every=5",
    "train.log_every=1",
    "teacher.train.epochs=12",
    "student.args.hidden_channels=16",
    "teacher.args.hidden_channels=16",
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    method, config = load_config("ff_g2m/small", [*SHRUNK, "export=[torchscript]"])
    return folder, train(method, config, folder, quiet=True, cpu=True)


@pytest.mark.slow  # imports PyG anew
def test_run_ships_a_stock_mlp(finished):
    """In a process where kd cannot be imported: PyG's class, TorchScript; no graph is given."""
    folder, metrics = finished
    assert {"student/accuracy", "teacher/accuracy", "student/l_high", "teacher/l_low", "student/low_energy"} <= set(
        metrics
    )
    assert metrics["teacher/l_high"] == 0
    code = f"""
import sys, json
sys.modules["kdcore"] = sys.modules["kd_graph"] = None
import torch, torch_geometric
from safetensors.torch import load_file
folder = {str(folder)!r}
config = json.load(open(folder + "/student/config.json"))
mlp = getattr(torch_geometric.nn.models, config["class"])(**config["args"])
mlp.load_state_dict(load_file(folder + "/student/model.safetensors"))
x = torch.rand(5, 64, generator=torch.Generator().manual_seed(0))
same = torch.allclose(mlp.eval()(x), torch.jit.load(folder + "/export/student.pt")(x), atol=1e-6)
gnn = json.load(open(folder + "/teacher/config.json"))
print(config["class"], gnn["class"], same, tuple(mlp(x).shape))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[-2] == "MLP GCN True (5, 10)"


def test_terms_are_logged_and_metrics_come_again(finished):
    folder, metrics = finished
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {tuple(x["terms"]) for x in lines if x["kind"] == "train" and x["stage"] == "student"} == {
        ("ce", "low", "high")
    }
    again = evaluate(folder)
    assert {k: v for k, v in again.items() if "latency" not in k} == {
        k: v for k, v in metrics.items() if "latency" not in k
    }
    from kdcore.run import load_run

    method, config, artefacts = load_run(folder)
    samples = method.predict(config, artefacts, 6)
    assert len(samples) == 6
    assert samples[0]["truth"] != samples[0]["student"]["label"]
    assert samples[0]["image"].dtype.name == "uint8"


@pytest.mark.parametrize("extra", [[], ["batch_edges=4096", "train.epochs=2"]])
def test_resume_gives_the_weights_of_an_uncut_run(tmp_path, monkeypatch, extra):
    method, config = load_config("ff_g2m/small", [*SHRUNK, *extra])
    train(method, config, tmp_path / "whole", quiet=True, cpu=True)
    loss = FFG2M.loss

    def cut(self, batch, player="student"):
        if self.progress.step == 7:
            raise KeyboardInterrupt
        return loss(self, batch, player)

    monkeypatch.setattr(FFG2M, "loss", cut)
    with pytest.raises(KeyboardInterrupt):
        train(method, config, tmp_path / "cut", quiet=True, cpu=True)
    monkeypatch.setattr(FFG2M, "loss", loss)
    train(method, config, tmp_path / "cut", resume=True, quiet=True, cpu=True)
    whole, resumed = (load_file(tmp_path / run / "student" / "model.safetensors") for run in ("whole", "cut"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_cached_logits_replace_the_teacher(finished, tmp_path):
    folder, _ = finished
    given = [*SHRUNK, "teacher.train=null", f"teacher.checkpoint={folder / 'teacher'}"]
    method, config = load_config("ff_g2m/small", given)
    assert method.cache(config, tmp_path / "cache")["samples"] == 1797
    _, config = load_config("ff_g2m/small", [*given, f"teacher.cache={tmp_path / 'cache'}"])
    train(method, config, tmp_path / "run", quiet=True, cpu=True)
    first, second = (load_file(f / "logits" / "logits.safetensors")["logits"] for f in (folder, tmp_path / "run"))
    torch.testing.assert_close(first, second)
    _, other = load_config("ff_g2m/small", [*given, f"teacher.cache={tmp_path / 'cache'}", "data.neighbours=9"])
    with pytest.raises(InputError, match="data: found"):
        train(method, other, tmp_path / "other", quiet=True, cpu=True)


def test_inductive_training_never_sees_the_hidden_nodes(tmp_path):
    method, config = load_config("ff_g2m/small", [*SHRUNK, "data.inductive=0.2", "teacher.name=GAT"])
    metrics = train(method, config, tmp_path / "run", quiet=True, cpu=True)
    logits = load_file(tmp_path / "run" / "logits" / "logits.safetensors")["logits"]
    assert len(logits) == 50 + 300 + 800
    assert 0 < metrics["student/accuracy"] <= 1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method_args.lam=1.5", "'method_args.lam' = 1.5"),
        ("method_args.low=mean", "'method_args.low' = 'mean': allowed"),
        ("method_args={lam: 0, low: none, high: false}", "leaves nothing to learn from"),
        ("teacher.train=null", "has no weights: give checkpoint, or train"),
    ],
)
def test_bad_config_is_named(override, message):
    with pytest.raises(InputError) as caught:
        load_config("ff_g2m/small", [override])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("teacher.name=GCM", "teacher.name = 'GCM': not a network of PyG that is known here; did you mean 'GCN'"),
        ("student.name=GCN", "allowed: MLP, the student sees no graph"),
        ("teacher.args.hiden=3", "teacher.args"),
        ("data.name=npz", "data.root: required"),
        ("data.split=public", "'digits' has no train_mask"),
        ("data.train_per_class=500", "data.train_per_class = 500: class 0 has 178 nodes"),
        ("data.test=5000", "1747 labelled nodes are left"),
        ("train.monitor=acuracy", "train.monitor = 'acuracy': not a metric; did you mean 'accuracy'"),
    ],
)
def test_bad_input_is_named_before_training(override, message, tmp_path):
    method, config = load_config("ff_g2m/small", [override])
    with pytest.raises(InputError) as caught:
        train(method, config, tmp_path / "run", quiet=True, cpu=True)
    assert message in str(caught.value)
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- export


def mlp() -> nn.Module:
    from torch_geometric.nn.models import MLP

    torch.manual_seed(0)
    return MLP(in_channels=6, hidden_channels=8, out_channels=3, num_layers=3, dropout=0.5, norm=None).eval()


def test_torchscript_gives_the_same_logits(tmp_path):
    student, x = mlp(), torch.randn(7, 6)
    loaded = torch.jit.load(str(export.to_torchscript(student, tmp_path / "student.pt")))
    torch.testing.assert_close(loaded(x), student(x))


def test_onnx_gives_the_same_logits_for_any_number_of_nodes(tmp_path):
    import onnxruntime

    student = mlp()
    path = export.write(student, tmp_path, "onnx", num_features=6)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for nodes in (1, 9):
        x = torch.randn(nodes, 6)
        (logits,) = session.run(["logits"], {"x": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), student(x), atol=1e-5, rtol=1e-5)


def test_export_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"onnx needs onnx and onnxscript: install kd-graph\[export\]"):
        export.check("onnx")
    with pytest.raises(InputError, match="'tflite' is unknown"):
        export.check("tflite")


# ---------------------------------------------------------------- real data


def test_paper_config_is_the_published_setting():
    _, config = load_config("ff_g2m/paper")
    assert (config.method_args.lam, config.method_args.tau) == (0.4, 1.5)
    assert config.teacher.args["hidden_channels"] == config.student.args["hidden_channels"] == 512


@pytest.mark.slow
def test_edge_terms_reach_their_target_on_cora(kd_data, tmp_path):
    """With (2) and (3) the student ends with lower L_low and L_high than GLNN's, and far above the plain MLP."""
    found = {}
    for arm, overrides in {
        "ff": [],
        "glnn": ["method_args.low=node", "method_args.high=false"],
        "ce": ["method_args.lam=1.0"],
    }.items():
        given = ["train.epochs=50", "teacher.train.epochs=50", f"data.root={kd_data / 'planetoid'}"]
        method, config = load_config("ff_g2m/cora", [*given, *overrides])
        found[arm] = train(method, config, tmp_path / arm, quiet=True, cpu=True)
    for name in ("student/l_low", "student/l_high"):
        assert found["ff"][name] < found["glnn"][name] < found["ce"][name]
    assert found["ff"]["student/accuracy"] > found["ce"]["student/accuracy"] + 0.1


def test_frequency_terms_of_the_teacher_itself(random_graph):
    _, t, edges = random_graph(4)
    low, high = frequency_terms(t, t, edges, 1.5).tolist()
    assert high == 0
    assert low == pytest.approx(low_by_hand(t, t, closed(edges, 8)).item())
