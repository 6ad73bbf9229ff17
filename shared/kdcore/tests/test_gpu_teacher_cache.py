"""TeacherCache: what is written comes back; whatever does not fit the run, or is not whole, is refused by name."""

import json
import multiprocessing
import pickle
import signal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kdcore.errors import InputError
from kdcore.gpu.teacher_cache import TeacherCache, TopK, data_fingerprint, module_fingerprint, topk_kl

C = 7


def logits(n=10, seed=0, c=C):
    return 2 * torch.randn(n, c, generator=torch.Generator().manual_seed(seed))


def teacher(seed=0):
    torch.manual_seed(seed)
    return nn.Linear(3, C)


def write(folder, values, keys=None, **options):
    options = {"kind": "full", "num_outputs": C, "teacher": teacher(), "data": "d1", "shard_size": 4, **options}
    with TeacherCache.create(folder, **options) as writer:
        writer.add(range(len(values)) if keys is None else keys, values)


def test_full_rows_come_back_in_the_order_asked_for(tmp_path):
    values = logits()
    write(tmp_path, values)
    cache = TeacherCache.open(tmp_path, teacher=teacher(), data="d1", verify=True)
    assert sorted(f.name for f in tmp_path.iterdir()) == [
        "index.json",
        *(f"shard-0000{i}.safetensors" for i in range(3)),
    ]
    assert len(cache) == 10
    assert 9 in cache
    assert 10 not in cache
    assert list(cache.keys()) == list(range(10))
    order = torch.tensor([9, 0, 3, 4, 3])
    assert torch.equal(cache[order], values[order])
    assert torch.equal(cache[5], values[5])
    assert torch.equal(cache[torch.tensor(5)], values[5])
    rows = cache[[1, 2]]
    rows.zero_()  # a copy: neither the file nor a later read changes
    assert torch.equal(TeacherCache.open(tmp_path, verify=True)[[1, 2]], values[1:3])
    assert torch.equal(cache[[1, 2]], values[1:3])


def test_topk_rows_serve_the_divergence(tmp_path):
    values, student = logits(), logits(seed=1)
    write(tmp_path, values, keys=[f"sample-{i}" for i in range(10)], kind="topk", k=3, dtype="float32")
    cache = TeacherCache.open(tmp_path)
    top = cache[["sample-7", "sample-2"]]
    expected = TopK.from_logits(values[[7, 2]], 3)
    assert torch.equal(top.ids.long(), expected.ids)
    torch.testing.assert_close(top.logp, expected.logp)
    torch.testing.assert_close(top.log_missing, expected.log_missing)
    torch.testing.assert_close(topk_kl(student[:2], top, 2.0), topk_kl(student[:2], expected, 2.0))
    assert cache["sample-7"].ids.shape == (3,)
    half = tmp_path / "half"
    write(half, values, kind="topk", k=3)
    assert TeacherCache.open(half)[[0]].logp.dtype == torch.float16
    torch.testing.assert_close(TeacherCache.open(half)[[7, 2]].logp.float(), expected.logp, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["full", "topk"])
def test_sequences_have_a_variable_number_of_rows(tmp_path, kind):
    lengths = [3, 1, 5, 2, 4]
    values = [logits(n, seed=i) for i, n in enumerate(lengths)]
    write(tmp_path, values, kind=kind, k=2 if kind == "topk" else None, sequences=True, dtype="float32", shard_size=2)
    cache = TeacherCache.open(tmp_path)
    assert cache.lengths([4, 0, 2]) == [4, 3, 5]
    rows = cache[[4, 0, 2]]
    expected = torch.cat([values[4], values[0], values[2]])
    if kind == "full":
        assert torch.equal(rows, expected)
        assert torch.equal(cache[1], values[1])
    else:
        assert torch.equal(rows.ids.long(), expected.topk(2).indices)
        assert cache[2].logp.shape == (5, 2)


@settings(max_examples=15, deadline=None)
@given(
    n=st.integers(1, 12), shard=st.integers(1, 13), batch=st.integers(1, 5),
    dtype=st.sampled_from(["float32", "float64", "bfloat16"]), seed=st.integers(0, 99),
)  # fmt: skip
def test_round_trip_for_any_shard_and_batch_size(tmp_path_factory, n, shard, batch, dtype, seed):
    folder, values = tmp_path_factory.mktemp("cache"), logits(n, seed)
    options = {"kind": "full", "num_outputs": C, "teacher": "t", "data": "d"}
    with TeacherCache.create(folder, dtype=dtype, shard_size=shard, **options) as writer:
        assert sum(writer.add(range(lo, min(lo + batch, n)), values[lo : lo + batch]) for lo in range(0, n, batch)) == n
    assert torch.equal(TeacherCache.open(folder)[range(n)], values.to(getattr(torch, dtype)))


def test_a_stopped_writer_goes_on_and_computes_only_what_is_missing(tmp_path):
    values = logits()
    options = {"kind": "full", "num_outputs": C, "teacher": "t", "data": "d", "shard_size": 4}

    def stopped():
        with TeacherCache.create(tmp_path, **options) as writer:
            writer.add(range(6), values[:6])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    with pytest.raises(
        InputError, match=r"index\.json: found 1 shards of an unfinished cache, expected a finished one"
    ):
        TeacherCache.open(tmp_path)
    first = (tmp_path / "shard-00000.safetensors").stat()
    with TeacherCache.create(tmp_path, **options) as writer:
        assert [key for key in range(10) if key in writer] == [0, 1, 2, 3]
        assert writer.add(range(10), values) == 6
    assert (tmp_path / "shard-00000.safetensors").stat().st_mtime_ns == first.st_mtime_ns
    assert torch.equal(TeacherCache.open(tmp_path, verify=True)[range(10)], values)


def test_resume_writes_a_lost_shard_again(tmp_path):
    values = logits()
    write(tmp_path, values)
    (tmp_path / "shard-00001.safetensors").unlink()
    options = {"kind": "full", "num_outputs": C, "teacher": teacher(), "data": "d1"}
    with TeacherCache.create(tmp_path, **options) as writer:
        assert [key for key in range(10) if key not in writer] == [4, 5, 6, 7]
        writer.add(range(10), values)
    assert torch.equal(TeacherCache.open(tmp_path, verify=True)[range(10)], values)


def killed_writer(folder):
    import os

    import kdcore.gpu.teacher_cache as module

    module.os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)  # in the middle of a file
    write(folder, logits(), keys=range(10, 20))


def test_a_killed_writer_leaves_the_cache_readable(tmp_path):
    values = logits()
    write(tmp_path, values)
    process = multiprocessing.get_context("fork").Process(target=killed_writer, args=(tmp_path,))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert torch.equal(TeacherCache.open(tmp_path, verify=True)[range(10)], values)
    write(tmp_path, values, keys=range(10, 20))
    assert torch.equal(TeacherCache.open(tmp_path, verify=True)[range(10, 20)], values)


def test_another_teacher_or_other_data_is_refused(tmp_path):
    write(tmp_path, logits())
    found, expected = module_fingerprint(teacher()), module_fingerprint(teacher(1))
    with pytest.raises(InputError, match=rf"index\.json: teacher: found '{found}', expected '{expected}'"):
        TeacherCache.open(tmp_path, teacher=teacher(1))
    with pytest.raises(InputError, match=r"index\.json: data: found 'd1', expected 'd2'"):
        TeacherCache.open(tmp_path, data="d2")
    with pytest.raises(InputError, match=r"index\.json: teacher: found .*choose another folder"):
        write(tmp_path, logits(), teacher=teacher(1))
    with pytest.raises(InputError, match=r"index\.json: dtype: found 'float32', expected 'float16'"):
        write(tmp_path, logits(), dtype="float16")


def test_missing_cut_and_changed_shards_are_refused(tmp_path):
    values = logits()
    write(tmp_path, values)
    path = tmp_path / "shard-00001.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-3])
    with pytest.raises(InputError, match=rf"shard-00001.*found {len(content) - 3} bytes, expected {len(content)}"):
        TeacherCache.open(tmp_path)
    path.unlink()
    with pytest.raises(InputError, match=rf"shard-00001.*found no such shard, expected {len(content)} bytes"):
        TeacherCache.open(tmp_path)
    changed = bytearray(content)
    changed[content.index(values[4].numpy().tobytes())] ^= 1
    path.write_bytes(changed)
    TeacherCache.open(tmp_path)  # the cheap check cannot see one changed bit
    with pytest.raises(InputError, match=r"shard-00001.*found sha256 .*, expected "):
        TeacherCache.open(tmp_path, verify=True)
    path.write_bytes(b"\xff" * len(content))
    with pytest.raises(InputError, match=r"shard-00001.*found no readable shard"):
        TeacherCache.open(tmp_path)
    other = tmp_path / "other"
    write(other, logits(), data="d2")
    path.write_bytes((other / path.name).read_bytes())
    with pytest.raises(InputError, match=r"shard-00001.*found a shard of .*'d2'.*expected one of .*'d1'"):
        TeacherCache.open(tmp_path)


def test_a_damaged_index_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"index\.json: found no such file"):
        TeacherCache.open(tmp_path / "absent")
    write(tmp_path, logits())
    path = tmp_path / "index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps({**index, "format_version": 99}))
    with pytest.raises(InputError, match=r"format_version: found 99, expected 1"):
        TeacherCache.open(tmp_path)
    outside = [{**index["shards"][0], "file": "../shard-00000.safetensors"}]
    without_kind = {name: value for name, value in index.items() if name != "kind"}
    for bad in ("{", "[]", "{}", json.dumps({**index, "shards": outside}), json.dumps(without_kind)):
        path.write_text(bad)
        with pytest.raises(InputError, match=r"index\.json: found no readable index"):
            TeacherCache.open(tmp_path)


def read_row(cache, key, queue):
    queue.put(cache[key].tolist())


def test_several_readers(tmp_path):
    values = logits()
    write(tmp_path, values)
    cache = TeacherCache.open(tmp_path)
    assert torch.equal(pickle.loads(pickle.dumps(cache))[[3]], values[[3]])
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    readers = [context.Process(target=read_row, args=(cache, key, queue)) for key in (1, 8)]
    for reader in readers:
        reader.start()
    assert sorted(queue.get(timeout=60) for _ in readers) == sorted([values[1].tolist(), values[8].tolist()])
    for reader in readers:
        reader.join(60)


def test_refusals_of_the_writer_and_reader(tmp_path):
    bad = {
        "kind": {"kind": "all"}, "k": {"kind": "topk", "k": C + 1}, "dtype": {"dtype": "int8"},
        "num_outputs": {"num_outputs": 0}, "shard_size": {"shard_size": 0},
    }  # fmt: skip
    for name, options in bad.items():
        with pytest.raises(InputError, match=f"^{name}: given"):
            write(tmp_path / name, logits(), **options)
    with pytest.raises(InputError, match=r"^k: given 3 with kind 'full'"):
        write(tmp_path / "k3", logits(), k=3)
    with pytest.raises(InputError, match=r"^keys, logits: given 2 and 10"):
        write(tmp_path / "a", logits(), keys=[1, 2])
    with pytest.raises(InputError, match=r"^logits of key 0: given torch.float32 \(6,\), allowed: .*\(7,\)"):
        write(tmp_path / "b", logits(c=6))
    with pytest.raises(InputError, match=r"^logits of key 0: given NaN"):
        write(tmp_path / "c", logits() * torch.nan)
    with pytest.raises(InputError, match=r"^logits: given .*float16"):
        write(tmp_path / "d", 1e6 * logits(), dtype="float16")
    with pytest.raises(InputError, match=r"^keys: given 1\.5"):
        write(tmp_path / "e", logits(1), keys=[1.5])
    write(tmp_path / "f", logits())
    with pytest.raises(InputError, match=r"key 77: not among the 10 keys"):
        TeacherCache.open(tmp_path / "f")[[1, 77]]
    with pytest.raises(InputError, match=r"keys: given none"):
        TeacherCache.open(tmp_path / "f")[[]]


def test_module_fingerprint_sees_values_names_types_and_shapes():
    base = module_fingerprint(teacher())
    assert base == module_fingerprint(teacher().state_dict()) == module_fingerprint(teacher())
    other_value = teacher()
    with torch.no_grad():
        other_value.bias[0] += 1e-6
    weight = teacher().weight.detach()
    distinct = [
        base,
        module_fingerprint(other_value),
        module_fingerprint(teacher().double()),
        module_fingerprint(teacher().bfloat16()),
        module_fingerprint({"weight": weight}),
        module_fingerprint({"w": weight}),
        module_fingerprint({"weight": weight.reshape(3, C)}),
        module_fingerprint({"weight": weight.reshape(1, -1)}),
    ]
    assert len(set(distinct)) == len(distinct)
    assert module_fingerprint({"weight": weight.t().contiguous().t()}) == module_fingerprint({"weight": weight})
    with pytest.raises(InputError, match=r"state dict entry 'x': given int"):
        module_fingerprint({"x": 3})


def test_data_fingerprint_is_stable_and_tells_parts_apart(tmp_path):
    path = tmp_path / "data.txt"
    path.write_text("one")
    before = data_fingerprint(path)
    path.write_text("two")
    array = torch.arange(4)
    distinct = [
        before, data_fingerprint(path), data_fingerprint("ab"), data_fingerprint("a", "b"),
        data_fingerprint(["a", "b"]),
        data_fingerprint({"a": "b"}), data_fingerprint(1), data_fingerprint("1"), data_fingerprint(1.0),
        data_fingerprint(True), data_fingerprint(None), data_fingerprint(b"ab"), data_fingerprint(array),
        data_fingerprint(array.int()), data_fingerprint([["a"], "b"]), data_fingerprint([["a", "b"]]),
    ]  # fmt: skip
    assert len(set(distinct)) == len(distinct)
    assert data_fingerprint(array.numpy()) == data_fingerprint(array)
    assert data_fingerprint({"a": 1, "b": 2}) == data_fingerprint({"b": 2, "a": 1})
    with pytest.raises(InputError, match=r"^data_fingerprint: given object"):
        data_fingerprint(object())


def test_top_k_taken_elsewhere_is_stored_as_if_from_logits(tmp_path):
    logits = [torch.randn(3, 12), torch.randn(5, 12)]
    options = {"kind": "topk", "k": 4, "num_outputs": 12, "teacher": "t", "data": "d", "sequences": True}
    with TeacherCache.create(tmp_path / "a", **options) as writer:
        writer.add([0, 1], logits)
    with TeacherCache.create(tmp_path / "b", **options) as writer:
        assert writer.add_topk([0, 1], [TopK.from_logits(x, 4) for x in logits]) == 2
        assert writer.add_topk([1], [TopK.from_logits(logits[1], 4)]) == 0
        assert len(writer) == 2
        with pytest.raises(InputError, match=r"rows of key 2: given \[\(3, 5\)"):
            writer.add_topk([2], [TopK.from_logits(logits[0], 5)])
    a, b = (TeacherCache.open(tmp_path / name) for name in "ab")
    for key in (0, 1):
        assert torch.equal(a[key].ids, b[key].ids)
        assert torch.equal(a[key].logp, b[key].logp)
        assert torch.equal(a[key].log_missing, b[key].log_missing)
    full = TeacherCache.create(tmp_path / "c", kind="full", num_outputs=12, teacher="t", data="d")
    with pytest.raises(InputError, match="add_topk: allowed for"):
        full.add_topk([0], [TopK.from_logits(logits[0], 4)])
