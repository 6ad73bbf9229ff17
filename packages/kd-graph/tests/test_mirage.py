"""Whole runs of Mirage: candidates, the arms, what is shipped, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch

from kd_graph.engine.distilled import load_graphs, load_patterns, unfold_patterns
from kd_graph.graph_models import load_classifier
from kdcore.errors import InputError
from kdcore.method import load_config
from kdcore.run import evaluate, load_run, train

SHRUNK = ["train.epochs=10", "full.epochs=2", "student.args.hidden_channels=8"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    method, config = load_config("mirage/small", SHRUNK)
    return folder, train(method, config, folder, quiet=True, cpu=True)


def test_run_ships_the_set_and_a_student(finished):
    folder, metrics = finished
    assert 0 <= metrics["student/accuracy"] <= 1
    assert metrics["bytes_share"] < 1
    assert metrics["student/root_gap"] < 1e-5
    assert metrics["distilled/coverage_20"] > 0.5
    graphs = list(load_graphs(folder / "distilled" / "graphs.safetensors"))
    assert len(graphs) == metrics["distilled/graphs"]
    again = unfold_patterns(load_patterns(folder / "distilled" / "trees.safetensors"))
    assert sorted(g.num_nodes for g in again) == sorted(g.num_nodes for g in graphs)
    assert sum(float(g.weight) for g in graphs) == pytest.approx(len(graphs), rel=1e-5)
    config = json.loads((folder / "student" / "config.json").read_text())
    assert (config["class"], config["pool"], config["class_names"]) == ("GIN", "mean", ["0", "1"])
    assert load_classifier(folder / "student").head.out_features == 2


def test_the_best_candidate_on_validation_is_chosen(finished):
    folder, _ = finished
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    candidates = [line for line in lines if line["kind"] == "candidate"]
    assert len(candidates) == 2
    best = max(candidates, key=lambda c: (c["auroc"], -c["bytes"]))
    summary = json.loads((folder / "distilled" / "summary.json").read_text())
    assert summary["support"] == best["support"]
    chosen, student = (load_classifier(folder / name) for name in (f"student-{best['candidate']}", "student"))
    assert all(
        torch.equal(a, b) for a, b in zip(chosen.state_dict().values(), student.state_dict().values(), strict=True)
    )


def test_metrics_come_again_and_the_report_has_pictures(finished):
    folder, metrics = finished
    again = evaluate(folder)
    assert again == pytest.approx(metrics)
    method, config, artefacts = load_run(folder)
    samples = method.predict(config, artefacts, 4)
    assert len(samples) == 4
    assert samples[0]["caption"].startswith("class 0")
    assert {picture.shape for s in samples for picture in s["images"].values()} == {(112, 112, 3)}


@pytest.mark.parametrize("arm", ["single", "blind", "random", "uniform"])
def test_arms_run(arm, tmp_path):
    overrides = {
        "uniform": ["method_args.weighting=uniform"],
        **{name: [f"method_args.selection={name}"] for name in ("single", "blind", "random")},
    }[arm]
    method, config = load_config("mirage/small", [*SHRUNK, "full=null", "method_args.support=[0.6]", *overrides])
    train(method, config, tmp_path / "run", quiet=True, cpu=True)
    graphs = list(load_graphs(tmp_path / "run" / "distilled" / "graphs.safetensors"))
    summary = json.loads((tmp_path / "run" / "distilled" / "summary.json").read_text())
    assert {int(g.y) for g in graphs} == {0, 1}
    if arm == "single":
        assert all(int(g.root_mask.sum()) == 1 for g in graphs)
    if arm == "random":
        assert "root_mask" not in graphs[0]
    if arm in ("blind", "random"):
        assert summary["bytes"] < 0.05 * summary["full_bytes"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method_args.support=[0]", "a share above 0 and below 1"),
        ("method_args.support=[2.5]", "a whole count of 1 or more"),
        ("method_args.hops=0", "'method_args.hops' = 0"),
        ("method_args.selection=all", "'method_args.selection' = 'all': allowed"),
    ],
)
def test_bad_config_is_named(override, message):
    with pytest.raises(InputError) as caught:
        load_config("mirage/small", [override])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method_args.support=[0.999]", "has no set of trees in"),
        ("method_args.most_sets=5", "would fit, or give max_trees"),
        ("data.classes=[0,0]", "data.classes = [0, 0]"),
        ("data.name=MUTAG", "data.root: required"),
        ("data.name=ogbg-code2", "data.name = 'ogbg-code2': allowed"),
        ("student.args.hidden_channels=null", "hidden_channels = None: required"),
        ("student.name=GNN", "student.name = 'GNN'"),
        ("train.monitor=acc", "train.monitor = 'acc'"),
        ("data.test=0.9", "allowed: below 1"),
    ],
)
def test_bad_input_is_named_before_training(override, message, tmp_path):
    method, config = load_config("mirage/small", [override])
    with pytest.raises(InputError) as caught:
        train(method, config, tmp_path / "run", quiet=True, cpu=True)
    assert message in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "hops"), [("GIN", 2), ("GAT", 2), ("GCN", 3)])
def test_any_network_trains_on_the_same_set_of_molecules(kind, hops, kd_data, tmp_path):
    """MUTAG: the same call for every network; its roots are exact, and it learns the set."""
    given = [
        "data.name=MUTAG",
        f"data.root={kd_data / 'tu'}",
        "data.classes=null",
        "data.edge_features=false",
        f"method_args.hops={hops}",
        "method_args.support=[0.6]",
        f"student.name={kind}",
        "student.args.num_layers=2",
        "full=null",
        "train.epochs=60",
    ]
    method, config = load_config("mirage/small", given)
    metrics = train(method, config, tmp_path / "run", quiet=True, cpu=True)
    assert metrics["student/root_gap"] < 1e-5
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    totals = [line["total"] for line in lines if line["kind"] == "train"]
    assert totals[-1] < totals[0]


def test_paper_configs_are_the_published_settings():
    nci1, dd = (load_config(f"mirage/{name}")[1] for name in ("paper", "paper-dd"))
    assert (nci1.method_args.hops, nci1.method_args.support) == (2, [[440, 570], [420, 550]])
    assert nci1.method_args.exclusion == "patterns"
    assert (dd.method_args.hops, dd.method_args.support) == (1, [[15, 9]])
    assert nci1.student.pool == dd.student.pool == "add"
