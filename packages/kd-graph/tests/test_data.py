"""Graphs from every source: digits, npz files, Planetoid and TU folders, and what is said of broken ones."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

from kd_graph import sources
from kd_graph.data import NodeDataConfig, load_nodes
from kd_graph.metrics import classification_metrics, spectral_energy
from kdcore.errors import InputError


def npz(path, **changes):
    edges = np.array([[0, 1, 2, 3, 4, 5, 0], [1, 2, 3, 4, 5, 0, 0]])
    masks = {name: np.eye(6, dtype=bool)[k] for k, name in enumerate(("train_mask", "val_mask", "test_mask"))}
    arrays = {"x": np.eye(6), "edge_index": edges, "y": np.array([0, 1, 0, 1, 0, -1]), **masks, **changes}
    np.savez(path, **{name: value for name, value in arrays.items() if value is not None})
    return NodeDataConfig(name="npz", root=str(path))


def test_digits_graph_is_undirected_without_loops():
    data = load_nodes(NodeDataConfig(name="digits", split="random", validation=300), seed=1)
    source, target = data.graph.edge_index
    assert (source != target).all()
    there, back = (set(map(tuple, e.t().tolist())) for e in (data.graph.edge_index, data.graph.edge_index.flip(0)))
    assert there == back
    parts = [data.graph[name] for name in ("train_mask", "val_mask", "test_mask")]
    assert [int(mask.sum()) for mask in parts] == [200, 300, 1000]
    assert int(torch.stack(parts).sum(0).max()) == 1
    assert data.observed is data.graph
    other = load_nodes(NodeDataConfig(name="digits", split="random", validation=300), seed=2)
    assert not torch.equal(other.graph.train_mask, data.graph.train_mask)


def test_hidden_nodes_are_in_no_observed_edge():
    config = NodeDataConfig(name="digits", split="random", validation=200, inductive=0.25, observe_rest=True)
    data = load_nodes(config)
    assert len(data.test) == 250
    assert data.observed.num_nodes == 1797 - 250
    kept = torch.ones(1797, dtype=torch.bool).index_fill(0, data.test, False)
    source, target = data.graph.edge_index
    assert data.observed.edge_index.shape[1] == int((kept[source] & kept[target]).sum())
    torch.testing.assert_close(data.observed.x, data.graph.x[kept])
    assert int(data.observed.test_mask.sum()) == 750
    narrow = load_nodes(config.model_copy(update={"observe_rest": False}))
    assert narrow.observed.num_nodes == 200 + 200 + 750


def test_npz_of_ones_own(tmp_path):
    data = load_nodes(npz(tmp_path / "graph.npz"))
    assert data.num_classes == 2
    assert data.graph.edge_index.shape == (2, 12)
    scaled = npz(tmp_path / "scaled.npz", x=np.array([[2.0, 2.0]] * 5 + [[0.0, 0.0]]))
    scaled.normalize = True
    torch.testing.assert_close(load_nodes(scaled).graph.x, torch.tensor([[0.5, 0.5]] * 5 + [[0.0, 0.0]]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y": None}, "array 'y' is missing; it has x"),
        ({"y": np.zeros(5, int)}, r"'y' has shape \(5,\)"),
        ({"edge_index": np.array([[0], [9]])}, r"'edge_index' names nodes 0..9 of 6"),
        ({"edge_index": np.zeros((3, 2), int)}, r"allowed: \(2, E\)"),
        ({"test_mask": np.eye(6, dtype=bool)[5]}, "a node of test_mask has no label"),
        ({"test_mask": np.eye(6, dtype=bool)[0]}, "a training node is a test node"),
        ({"val_mask": np.zeros(6, bool)}, "val_mask has no node"),
        ({"x": np.full((6, 2), np.nan)}, "features are not finite"),
        ({"x": np.array([[object()]] * 6, dtype=object)}, "not a readable npz file"),
    ],
)
def test_broken_npz_is_named(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        load_nodes(npz(tmp_path / "graph.npz", **changes))


def test_missing_files_and_variables_are_named(tmp_path, monkeypatch):
    monkeypatch.delenv("KD_DATA", raising=False)
    with pytest.raises(InputError, match=r"data.root = '\$KD_DATA/planetoid': its environment variable is not set"):
        load_nodes(NodeDataConfig(name="Cora", root="$KD_DATA/planetoid"))
    with pytest.raises(InputError, match=r"Cora lacks Cora/raw/ind.cora.x"):
        load_nodes(NodeDataConfig(name="Cora", root=str(tmp_path)))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InputError, match="needs the package ogb"):
        load_nodes(NodeDataConfig(name="ogbn-arxiv", root=str(tmp_path)))


def test_cora_is_read_and_its_folder_stays_as_it_was(kd_data, tmp_path):
    shutil.copytree(kd_data / "planetoid", tmp_path / "planetoid")
    before = sorted((tmp_path / "planetoid").rglob("*"))
    data = load_nodes(NodeDataConfig(name="Cora", root=str(tmp_path / "planetoid")))
    assert (data.graph.num_nodes, data.graph.edge_index.shape[1], data.num_features) == (2708, 10556, 1433)
    assert [int(data.graph[m].sum()) for m in ("train_mask", "val_mask", "test_mask")] == [140, 500, 1000]
    assert sorted((tmp_path / "planetoid").rglob("*")) == before


@pytest.mark.parametrize(("name", "graphs", "features"), [("MUTAG", 135, 7), ("PROTEINS", 975, 3)])
def test_tu_folders_are_read(kd_data, name, graphs, features):
    found, classes = sources.tu_graphs(name, kd_data / "tu", download=False, degree_features=10)
    assert len(found) == graphs
    assert found[0].x.shape[1] == features
    assert classes == ["0", "1"]


def test_digit_graphs_follow_the_ink():
    graphs, classes = sources.digit_graphs(levels=4, threshold=0.25)
    assert len(graphs) == 1797
    assert len(classes) == 10
    first = graphs[0]
    assert torch.equal(first.x.sum(1), torch.ones(len(first.x)))
    source, target = first.edge_index
    far = (first.pos[source] - first.pos[target]).abs().sum(1)
    assert torch.equal(far, torch.ones(len(far)))


def test_spectrum_on_a_known_graph():
    """A cycle of four: a constant is smooth, alternating signs are not, and both shares come from lambda exactly."""
    edges = torch.tensor([[0, 1, 1, 2, 2, 3, 3, 0], [1, 0, 2, 1, 3, 2, 0, 3]])
    smooth = torch.tensor([[1.0, -1.0]] * 4)
    rough = smooth * torch.tensor([[1.0], [-1.0], [1.0], [-1.0]])
    assert spectral_energy(smooth, edges) == pytest.approx({"low_energy": 1.0, "high_energy": 0.0})
    assert spectral_energy(rough, edges) == pytest.approx({"low_energy": 0.0, "high_energy": 1.0})
    both = spectral_energy(smooth + rough, edges)
    assert both == pytest.approx({"low_energy": 0.5, "high_energy": 0.5})
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(4, 3, generator=generator).double()
    laplacian = torch.eye(4).double() - torch.zeros(4, 4).double().index_put(
        (edges[0], edges[1]), torch.tensor(0.5).double()
    )
    values, vectors = torch.linalg.eigh(laplacian)
    spectrum = (vectors.t() @ (z - z.mean(1, keepdim=True))).square().sum(1)
    high = ((values / 2).square() * spectrum).sum() / spectrum.sum()
    assert spectral_energy(z, edges)["high_energy"] == pytest.approx(high.item())


def test_metrics_of_two_classes_have_the_area_under_the_curve():
    logits, labels = torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.5, 0.0]]), torch.tensor([0, 1, 1, 0])
    found = classification_metrics(logits, labels)
    assert found["accuracy"] == 0.75
    assert found["auroc"] == pytest.approx(0.75)
    assert "auroc" not in classification_metrics(torch.randn(4, 3), labels)
