"""Mirage's mining: computation trees, exact labels, frequent sets, the unfolded graphs, files without pickles."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kd_graph.engine.distilled import (
    Patterns,
    _members,
    _read_members,
    graph_bytes,
    load_graphs,
    load_patterns,
    pattern_bytes,
    save_graphs,
    save_patterns,
    unfold_patterns,
)
from kd_graph.engine.itemsets import closed_sets, expand_closed, fitting_threshold, frequent_sets
from kd_graph.engine.selection import blind_patterns, random_graphs
from kd_graph.engine.trees import TreeTable, discretise, graph_trees, unfold
from kd_graph.graph_models import root_pool
from kd_graph.graph_runs import root_gap
from kd_graph.methods.mirage import distill, graph_weights, mine, transactions
from kdcore.errors import InputError

A, B = 1.0, 2.0


def graph(features, pairs, y=0, edge_attr=None):
    from torch_geometric.data import Data

    one_way = torch.tensor(pairs, dtype=torch.int64).view(-1, 2).t()
    attributes = None if edge_attr is None else torch.tensor(edge_attr * 2, dtype=torch.float32).view(-1, 1)
    return Data(
        x=torch.tensor(features, dtype=torch.float32).view(len(features), -1),
        edge_index=torch.cat([one_way, one_way.flip(0)], 1),
        edge_attr=attributes,
        y=torch.tensor([y]),
    )


EDGE = graph([A, B], [(0, 1)])
PATH = graph([A, B, A], [(0, 1), (1, 2)])
TRIANGLE = graph([A, A, B], [(0, 1), (1, 2), (2, 0)])


def random_graphs_of(seed: int, count: int = 12, nodes: int = 6, labels: int = 2):
    generator = torch.Generator().manual_seed(seed)
    found = []
    for number in range(count):
        pairs = [(a, b) for a in range(nodes) for b in range(a) if torch.rand((), generator=generator) < 0.35]
        features = torch.randint(labels, (nodes,), generator=generator).float().tolist()
        kinds = torch.randint(2, (len(pairs),), generator=generator).float().tolist()
        found.append(graph(features, pairs, number % 2, kinds))
    return found


def relabelled(one, seed: int):
    """The same graph with its nodes renumbered and its edges in another order."""
    from torch_geometric.data import Data

    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(one.num_nodes, generator=generator)
    place = torch.empty_like(order).index_put((order,), torch.arange(len(order)))
    edges = torch.randperm(one.num_edges, generator=generator)
    return Data(x=one.x[order], edge_index=place[one.edge_index[:, edges]], edge_attr=one.edge_attr[edges], y=one.y)


# ---------------------------------------------------------------- trees


def written_out(table: TreeTable, entry: int, names: str = "ab") -> str:
    """`b[a,a]`, without edge labels."""
    below = sorted(written_out(table, child, names) for _, child in table.children[entry])
    return names[table.labels[entry]] + (f"[{','.join(below)}]" if below else "")


def test_transactions_of_small_graphs():
    found = transactions([EDGE, PATH, TRIANGLE], 1)
    sets = [{written_out(found.table, tree) for tree in trees} for trees in found.classes[0]]
    assert sets == [{"a[b]", "b[a]"}, {"a[b]", "b[a,a]"}, {"a[a,b]", "b[a,a]"}]
    both = mine(found, 2)[0]
    assert {tuple(written_out(found.table, t) for t in items): n for items, n in both.items()} == {
        ("a[b]",): 2,
        ("b[a,a]",): 2,
    }
    assert len(mine(found, 1)[0]) == 7
    deep = transactions([EDGE], 2)
    assert {written_out(deep.table, tree) for tree in deep.classes[0][0]} == {
        "a[b[a]]",
        "b[a[b]]",
    }  # the parent returns


@given(st.integers(0, 10_000), st.integers(1, 3))
def test_labels_do_not_depend_on_the_order_of_nodes_and_edges(seed, hops):
    graphs = random_graphs_of(seed, count=4)
    one, other = (transactions(g, hops) for g in (graphs, [relabelled(g, seed + 1) for g in graphs]))
    for label in one.classes:
        trees = [[{f.table.canonical(tree) for tree in held} for held in f.classes[label]] for f in (one, other)]
        assert trees[0] == trees[1]


def brute_isomorphic(one, other) -> bool:
    """Trees written out as (label, [(edge, subtree)]), matched child by child in every order."""
    if one[0] != other[0] or len(one[1]) != len(other[1]):
        return False
    return any(
        all(e == f and brute_isomorphic(s, t) for (e, s), (f, t) in zip(one[1], order, strict=True))
        for order in itertools.permutations(other[1])
    )


def test_equal_entries_are_isomorphic_trees_and_only_they():
    found = discretise(random_graphs_of(3, count=3, nodes=5))
    table, entries, trees = TreeTable(), [], []
    for labels, edges, kinds in zip(found.labels, found.edges, found.edge_labels, strict=True):
        below = {v: [(kinds[k], u) for k, (u, w) in enumerate(edges) if w == v] for v in range(len(labels))}

        def tree(v, depth, labels=labels, below=below):
            return labels[v], [(e, tree(u, depth - 1)) for e, u in below[v]] if depth else []

        entries += graph_trees(table, labels, edges, kinds, 2)
        trees += [tree(v, 2) for v in range(len(labels))]
    for (a, s), (b, t) in itertools.combinations(list(zip(entries, trees, strict=True)), 2):
        assert (a == b) == brute_isomorphic(s, t)


def test_unfolded_tree_of_a_triangle():
    found = discretise([TRIANGLE])
    table = TreeTable()
    trees = graph_trees(table, found.labels[0], found.edges[0], found.edge_labels[0], 2)
    forest = unfold(table, [trees[2]])
    assert len(forest.label) == table.size(trees[2]) == 7
    assert forest.roots.tolist() == [True] + [False] * 6
    with pytest.raises(InputError, match="7 nodes in one graph, allowed: 6; take fewer hops"):
        unfold(table, [trees[2]], most=6)


def test_features_that_are_not_discrete_are_refused(monkeypatch):
    monkeypatch.setattr("kd_graph.engine.trees.MOST_LABELS", 2)
    graphs = [graph([0.11, 0.12, 0.31], [(0, 1)])]
    with pytest.raises(InputError, match="node features: 3 different rows"):
        discretise(graphs)
    assert discretise(graphs, decimals=1).labels == [[0, 0, 1]]


# ---------------------------------------------------------------- frequent sets

WORDS = ("MONKEY", "DONKEY", "MAKE", "MUCKY", "COOKIE")


def by_brute_force(transactions_, threshold):
    items = sorted(set().union(*transactions_))
    every = (s for size in range(1, len(items) + 1) for s in itertools.combinations(items, size))
    counted = {s: sum(set(s) <= set(t) for t in transactions_) for s in every}
    return {s: n for s, n in counted.items() if n >= threshold}


def test_frequent_sets_of_the_textbook():
    found = frequent_sets([set(map(ord, word)) for word in WORDS], 3)
    written = {"".join(sorted(map(chr, s))): n for s, n in found.items()}
    expected = {"K": 5, "E": 4, "M": 3, "O": 3, "Y": 3, "EK": 4, "EO": 3, "KM": 3, "KO": 3, "KY": 3, "EKO": 3}
    assert written == expected


@given(st.lists(st.sets(st.integers(0, 6), max_size=6), min_size=1, max_size=8), st.integers(1, 4))
def test_mining_is_exact(sets, threshold):
    found = frequent_sets(sets, threshold)
    assert found == (by_brute_force(sets, threshold) if any(sets) else {})
    for items, support in found.items():
        for leave in range(len(items)):
            subset = items[:leave] + items[leave + 1 :]
            assert not subset or found[subset] >= support
    assert frequent_sets(sets, threshold, max_size=2) == {s: n for s, n in found.items() if len(s) <= 2}
    assert expand_closed(closed_sets(found)) == found
    assert expand_closed(closed_sets(frequent_sets(sets, threshold, max_size=2))) == frequent_sets(
        sets, threshold, max_size=2
    )


def test_a_threshold_that_fits_is_the_lowest():
    sets = [set(map(ord, word)) for word in WORDS]
    fits = fitting_threshold(sets, 1, most=11)
    assert len(frequent_sets(sets, fits)) <= 11 < len(frequent_sets(sets, fits - 1))


def test_what_mining_refuses():
    found = transactions([EDGE, PATH, TRIANGLE], 1)
    with pytest.raises(
        InputError, match="class 0 has no set of trees in 4 of its 3 graphs; the most frequent tree is in 2"
    ):
        mine(found, 4)
    with pytest.raises(InputError, match=r"more than 3 frequent sets at \[1\]; \[2\] would fit"):
        mine(found, 1, most_sets=3)
    with pytest.raises(InputError, match="1 values for 2 classes"):
        mine(transactions([EDGE, graph([A, B], [(0, 1)], 1)], 1), [3.0])
    with pytest.raises(InputError, match="every frequent set of class 0 is frequent in another"):
        mine(transactions([EDGE, graph([A, B], [(0, 1)], 1)], 1), 1, exclusion="patterns")
    with pytest.raises(InputError, match="the most frequent tree is in 0"):
        mine(transactions([EDGE, graph([A, B], [(0, 1)], 1)], 1), 1, exclusion="trees")


def test_exclusions():
    other = graph([B, B], [(0, 1)], 1)
    both = transactions([EDGE, TRIANGLE, other, graph([A, B], [(0, 1)], 1)], 1)
    names = {t: written_out(both.table, t) for held in both.classes.values() for trees in held for t in trees}
    kept = {
        kind: {c: {tuple(sorted(names[t] for t in s)) for s in own} for c, own in mine(both, 1, exclusion=kind).items()}
        for kind in ("patterns", "trees")
    }
    assert kept["trees"] == {0: {("a[a,b]",), ("b[a,a]",), ("a[a,b]", "b[a,a]")}, 1: {("b[b]",)}}
    assert kept["patterns"] == kept["trees"]


# ---------------------------------------------------------------- unfolded graphs


@given(st.integers(0, 10_000))
def test_emitted_graphs_are_forests_to_their_roots(seed):
    graphs = random_graphs_of(seed, nodes=4)
    patterns = distill(graphs, hops=1, support=1 / 3, max_trees=3)
    emitted = unfold_patterns(patterns)
    for one in emitted:
        source, target = one.edge_index
        number = int(one.pattern_id)
        with_children = [t for t in patterns.sets[number] if patterns.table.children[t]]
        assert int(one.root_mask.sum()) == len(with_children)
        assert set(one.root_mask.nonzero().view(-1).tolist()) == set(target.tolist()) - set(source.tolist())
        assert len(source) == one.num_nodes - len(with_children)
        assert one.edge_attr.shape == (one.num_edges, 1)
        assert int(one.y) == patterns.label[number]
        assert int(one.frequency) == patterns.frequency[number] >= 2


def test_single_nodes_are_counted_and_not_unfolded():
    lone = [graph([A, B, B], [(0, 1)], y) for y in (0, 0, 1, 1)]
    patterns = distill(lone, hops=1, support=2)
    assert len(patterns) == 14  # 7 sets of 3 trees in each class
    assert len(unfold_patterns(patterns)) == 12  # without the single node alone
    assert max(int(one.root_mask.sum()) for one in unfold_patterns(patterns)) == 2


def gnn(kind: str, layers: int, channels: int, **args):
    from torch_geometric.nn import models

    torch.manual_seed(0)
    body = getattr(models, kind)(channels, 8, layers, **args).double().eval()
    return type("Embedder", (), {"embed": lambda self, data: body(data.x.double(), data.edge_index)})()


@pytest.mark.parametrize("kind", ["GIN", "GAT", "GraphSAGE"])
def test_roots_have_the_embeddings_of_their_nodes(kind):
    graphs = random_graphs_of(7, count=4)
    assert root_gap(gnn(kind, 2, 1), graphs, 2) < 1e-12
    assert root_gap(gnn(kind, 2, 1), graphs, 1) > 1e-3  # fewer hops than layers


def test_gcn_is_exact_with_one_hop_more():
    graphs = random_graphs_of(7, count=4)
    assert root_gap(gnn("GCN", 2, 1), graphs, 2) > 1e-3
    assert root_gap(gnn("GCN", 2, 1), graphs, 3) < 1e-12


def test_embeddings_in_numbers():
    """Triangle a, a, b: GIN without weights gives 12 at b and at its 2-hop root, 6 at 1 hop; GCN 4/3 and 1.82137."""
    from torch_geometric.nn import GCNConv, GINConv

    gin, gcn = GINConv(torch.nn.Identity()), GCNConv(1, 1, bias=False).double()
    torch.nn.init.ones_(gcn.lin.weight)
    found = discretise([TRIANGLE])
    roots = {}
    for hops in (1, 2, 3):
        table = TreeTable()
        trees = graph_trees(table, found.labels[0], found.edges[0], found.edge_labels[0], hops)
        (one,) = unfold_patterns(Patterns(table, [(trees[2],)], [0], [1], found.node_rows, found.edge_rows))
        roots[hops] = one
    for conv, there, by_hops in ((gin, 12.0, {1: 6.0, 2: 12.0}), (gcn, 4 / 3, {2: 1.8213672050, 3: 4 / 3})):
        embed = lambda data, conv=conv: conv(conv(data.x.double(), data.edge_index), data.edge_index)  # noqa: E731
        assert embed(TRIANGLE)[2].item() == pytest.approx(there, abs=5e-11)
        for hops, value in by_hops.items():
            assert embed(roots[hops])[roots[hops].root_mask].item() == pytest.approx(value, abs=5e-11)


def test_readout_counts_roots_alone():
    h, batch = torch.arange(8.0).view(4, 2), torch.tensor([0, 0, 1, 1])
    mask = torch.tensor([True, False, True, True])
    assert root_pool(h, batch, mask, pool="add").tolist() == [[0, 1], [10, 12]]
    assert root_pool(h, batch, pool="mean").tolist() == [[1, 2], [5, 6]]


# ---------------------------------------------------------------- weights, files, baselines


def test_weights_of_the_three_kinds():
    labels, frequency, shares = torch.tensor([0, 0, 1]), torch.tensor([3, 1, 5]), torch.tensor([0.8, 0.2])
    found = {kind: graph_weights(labels, frequency, shares, kind) for kind in ("frequency", "balanced", "uniform")}
    torch.testing.assert_close(found["frequency"] / 3, torch.tensor([0.6, 0.2, 0.2]))
    torch.testing.assert_close(found["balanced"] / 3, torch.tensor([0.375, 0.125, 0.5]))
    assert found["uniform"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("sets", [[(0, 2), (2,), (0, 1, 2)], [(k,) for k in range(60)]])
def test_members_are_written_in_fewer_bytes_and_read_back(sets):
    written = _members(sets)
    assert ("set.bits" in written) == (len(sets) == 3)
    bits = written.pop("set.bits", None)
    columns = {name: value.tolist() for name, value in written.items()}
    assert _read_members(columns, None if bits is None else bits.numpy()) == sets


@pytest.mark.parametrize(("exclusion", "edges"), [("none", True), ("none", False), ("patterns", True)])
def test_files_hold_everything_and_are_the_same_twice(tmp_path, exclusion, edges):
    graphs = random_graphs_of(11, nodes=4)
    options = {"hops": 1, "support": 1 / 3, "max_trees": 3, "exclusion": exclusion, "edge_features": edges}
    for name, those in (("one", graphs), ("two", [relabelled(g, 5) for g in graphs])):
        patterns = distill(those, **options)
        save_patterns(patterns, tmp_path / f"{name}.safetensors")
        save_graphs(unfold_patterns(patterns), tmp_path / f"{name}-graphs.safetensors")
    for kind in ("", "-graphs"):
        first, second = (tmp_path / f"{name}{kind}.safetensors" for name in ("one", "two"))
        assert first.read_bytes() == second.read_bytes()
    loaded = load_patterns(tmp_path / "one.safetensors")

    def written(p: Patterns):
        sets = [tuple(sorted(p.table.canonical(t) for t in items)) for items in p.sets]
        return sorted(zip(p.label, p.frequency, sets, strict=True))

    assert written(loaded) == written(patterns)
    again = load_graphs(tmp_path / "one-graphs.safetensors")
    for found, one in zip(again, unfold_patterns(patterns), strict=True):
        assert all(torch.equal(found[name], one[name]) for name in one.keys())  # noqa: SIM118


def test_broken_files_are_named(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"no")
    for load in (load_graphs, load_patterns):
        with pytest.raises(InputError, match=r"x.safetensors: not a readable safetensors file"):
            load(tmp_path / "x.safetensors")
    save_graphs(random_graphs_of(0), tmp_path / "graphs.safetensors")
    with pytest.raises(InputError, match="not a file of this kind"):
        load_patterns(tmp_path / "graphs.safetensors")


@pytest.mark.slow  # imports PyG anew
def test_stock_pyg_trains_on_the_file_where_kd_is_not_importable(tmp_path):
    save_graphs(
        unfold_patterns(distill(random_graphs_of(2), hops=1, support=1 / 3, max_trees=2)),
        tmp_path / "graphs.safetensors",
    )
    code = f"""
import sys
sys.modules["kdcore"] = sys.modules["kd_graph"] = None
import torch
from safetensors.torch import load_file
from torch_geometric.data import Data, InMemoryDataset
from torch_geometric.loader import DataLoader
from torch_geometric.nn import GIN, global_mean_pool
tensors = load_file({str(tmp_path / "graphs.safetensors")!r})
dataset = InMemoryDataset()
dataset.slices = {{k.removeprefix("slices."): v for k, v in tensors.items() if k.startswith("slices.")}}
dataset._data = Data.from_dict({{k: v for k, v in tensors.items() if k in dataset.slices}})
body, head = GIN(dataset.num_features, 8, 2), torch.nn.Linear(8, 2)
optimizer = torch.optim.Adam([*body.parameters(), *head.parameters()], 0.05)
for epoch in range(2):
    for batch in DataLoader(dataset, batch_size=8, shuffle=True):
        h = body(batch.x, batch.edge_index)[batch.root_mask]
        loss = torch.nn.functional.cross_entropy(head(global_mean_pool(h, batch.batch[batch.root_mask])), batch.y)
        optimizer.zero_grad(); loss.backward(); optimizer.step()
print(len(dataset), torch.isfinite(loss).item())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "True"
    assert int(done.stdout.split()[-2]) > 4


def test_baselines_stay_within_the_bytes():
    graphs = random_graphs_of(4, count=40)
    found = transactions(graphs, 1)
    patterns = distill(graphs, hops=1, support=0.2, max_trees=2)
    budget = pattern_bytes(patterns)
    blind = blind_patterns(patterns, found.classes, budget, seed=0)
    assert 0 < pattern_bytes(blind) <= budget
    assert set(blind.label) == {0, 1}
    real = random_graphs(graphs, budget, seed=0)
    assert 2 <= len(real) < 40
    assert graph_bytes(real) <= budget < graph_bytes([*real, *graphs])
    assert [int(g.y) for g in real] != [int(g.y) for g in random_graphs(graphs, budget, seed=1)] or len(real) == 2
    assert graph_bytes(random_graphs(graphs, 1, seed=0)) > 1  # one of each class all the same


def test_bytes_of_a_graph_by_hand():
    """One path a, b, a: counts 3 and 2 and the class (1 byte each), 3 labels, 2 x 2 ends, rows 1 and 2 as bytes."""
    assert graph_bytes([PATH]) == 3 + 3 + 4 + 2
