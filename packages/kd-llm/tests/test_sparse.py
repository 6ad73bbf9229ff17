"""Pruning: the masks, SparseGPT against the optimal-brain-surgeon update written out, whole models, files, export."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kd_llm.engine.blocks import block_linears, block_stacks, matrix
from kd_llm.engine.masks import (
    MaskedWeights,
    as_linear,
    check_pattern,
    load_masks,
    masks_of,
    save_masks,
    sparsity_report,
    to_semi_structured,
)
from kd_llm.engine.pruning import prune_model
from kd_llm.engine.sparse import Hessian, Pattern, prune_by_magnitude, prune_by_sparsegpt
from kdcore.errors import InputError


def problem(rows=6, columns=24, samples=200, seed=0):
    g = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=g, dtype=torch.float64)
    inputs = torch.randn(samples, columns, generator=g, dtype=torch.float64) @ mixing
    return torch.randn(rows, columns, generator=g, dtype=torch.float64), inputs


def hessian_of(inputs):
    hessian = Hessian(inputs.shape[1], inputs.device, torch.float64)
    for part in inputs.split(37):
        hessian.add(part)
    return hessian.value


# ---------------------------------------------------------------- patterns


@pytest.mark.parametrize("value", [1.0, -0.1, "4:2", "2", "0:4", "a:b", True, None, float("nan")])
def test_bad_sparsity_is_named(value):
    with pytest.raises(InputError, match=r"method_args\.sparsity = "):
        Pattern.parse(value, field="method_args.sparsity")


@settings(deadline=None, max_examples=40)
@given(rows=st.integers(1, 9), columns=st.integers(1, 40), share=st.floats(0, 0.99), seed=st.integers(0, 99))
def test_the_share_of_zeros_is_exact_and_the_smallest_go(rows, columns, share, seed):
    scores = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed))
    kept = Pattern.parse(share).kept(scores)
    assert int((~kept).sum()) == round(share * rows * columns)
    if kept.any() and not kept.all():
        assert scores[~kept].max() <= scores[kept].min()


def test_equal_scores_leave_the_exact_count():
    assert int(Pattern.parse(0.5).kept(torch.zeros(4, 8)).sum()) == 16
    assert Pattern.parse("2:4").kept(torch.zeros(3, 8)).view(3, 2, 4).sum(-1).eq(2).all()


def test_a_pattern_that_does_not_divide_the_inputs_is_refused():
    with pytest.raises(InputError, match=r"fc has 6 inputs, not a multiple of 4"):
        prune_by_magnitude(torch.ones(2, 6), Pattern.parse("2:4"), name="fc")


# ---------------------------------------------------------------- SparseGPT


def test_hessian_is_twice_the_mean_outer_product():
    _, inputs = problem()
    torch.testing.assert_close(hessian_of(inputs), 2 * inputs.T @ inputs / len(inputs))


@pytest.mark.parametrize("sparsity", [0.5, 0.8])
def test_share_of_zeros_up_to_the_rounding_of_a_block(sparsity):
    weight, inputs = problem(rows=7, columns=100)
    pruned = prune_by_sparsegpt(weight, hessian_of(inputs), Pattern.parse(sparsity), block=32)
    blocks = pruned.split(32, dim=1)
    assert [int((part == 0).sum()) for part in blocks] == [round(sparsity * part.numel()) for part in blocks]


@pytest.mark.parametrize("pattern", ["2:4", "1:8", "3:4"])
def test_every_group_keeps_n_of_m_and_the_block_size_plays_no_part(pattern):
    weight, inputs = problem()
    hessian, p = hessian_of(inputs), Pattern.parse(pattern)
    results = [prune_by_sparsegpt(weight, hessian, p, block=block) for block in (1, 8, 16, 128)]
    assert (results[0].view(6, -1, p.group) != 0).sum(-1).eq(p.keep).all()
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-9, atol=1e-9)


def test_identity_hessian_is_magnitude_pruning_inside_each_block():
    weight, _ = problem(columns=256)
    pruned = prune_by_sparsegpt(weight, torch.eye(256, dtype=torch.float64), Pattern.parse(0.6))
    expected = [prune_by_magnitude(part, Pattern.parse(0.6)) for part in weight.split(128, dim=1)]
    assert torch.equal(pruned, torch.cat(expected, dim=1))


def surgeon(weight, hessian, kept):
    """Optimal brain surgeon with the mask given, written with one matrix inverse a column."""
    w = weight.clone()
    for j in range(w.shape[1]):
        inverse = torch.linalg.inv(hessian[j:, j:])
        error = w[:, j] * ~kept[:, j] / inverse[0, 0]
        w[:, j:] -= error[:, None] * inverse[0]
    return w * kept


@pytest.mark.parametrize("block", [5, 24])
def test_updates_are_those_of_optimal_brain_surgeon(block):
    weight, inputs = problem()
    hessian = hessian_of(inputs)
    pruned = prune_by_sparsegpt(weight, hessian, Pattern.parse(0.5), block=block)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(24, dtype=torch.float64)
    torch.testing.assert_close(pruned, surgeon(weight, damped, pruned != 0), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("pattern", [0.5, 0.7, "2:4"])
def test_outputs_change_less_than_under_magnitude_pruning(pattern):
    weight, inputs = problem(rows=20, columns=64, samples=300)
    g = torch.Generator().manual_seed(5)
    common = torch.randn(300, 8, generator=g, dtype=torch.float64) @ torch.randn(8, 64, generator=g).double()
    inputs = common + 0.01 * inputs  # as activations are: a few directions carry most of what varies
    p = Pattern.parse(pattern)

    def error(pruned):
        return float((inputs @ (pruned - weight).T).square().mean())

    assert error(prune_by_sparsegpt(weight, hessian_of(inputs), p)) < error(prune_by_magnitude(weight, p)) / 2


def test_an_input_that_is_always_zero_loses_its_column_and_harms_no_other():
    weight, inputs = problem()
    inputs[:, 3] = 0
    pruned = prune_by_sparsegpt(weight, hessian_of(inputs), Pattern.parse(0.0))
    assert (pruned[:, 3] == 0).all()
    others = [j for j in range(24) if j != 3]
    torch.testing.assert_close(pruned[:, others], weight[:, others])


def test_bad_calibration_is_named():
    weight, inputs = problem()
    with pytest.raises(InputError, match=r"hessian of fc: shape \(4, 4\)"):
        prune_by_sparsegpt(weight, torch.eye(4), Pattern.parse(0.5), name="fc")
    with pytest.raises(InputError, match="inputs of fc are not finite"):
        prune_by_sparsegpt(weight, hessian_of(inputs) * float("inf"), Pattern.parse(0.5), name="fc")
    with pytest.raises(InputError, match="damping = 0"):
        prune_by_sparsegpt(weight, hessian_of(inputs), Pattern.parse(0.5), damping=0)


# ---------------------------------------------------------------- whole models


def gpt2(seed=0, layers=2):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=50, n_positions=24, n_embd=16, n_layer=layers, n_head=2, bos_token_id=0, eos_token_id=0)
    )


def llama(seed=0):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=24,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def bert(seed=0):
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=24,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def t5(seed=0):
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(seed)
    config = T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0)
    return T5ForConditionalGeneration(config)


def batches(n=4, size=8, length=24, seed=1, seq2seq=False):
    g = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(n):
        mask = (torch.arange(length) < torch.randint(length // 2, length + 1, (size, 1), generator=g)).long()
        ids = torch.randint(1, 50, (size, length), generator=g) * mask
        labels = torch.where(mask.bool(), ids, -100)
        found.append(
            {"input_ids": ids, "attention_mask": mask, "labels": labels[:, : length - 5] if seq2seq else labels}
        )
    return found


@pytest.mark.parametrize(
    ("make", "stacks", "count"), [(gpt2, 1, 8), (llama, 1, 14), (bert, 1, 12), (t5, 2, 2 * 6 + 2 * 10)]
)
@pytest.mark.parametrize("method", ["sparsegpt", "magnitude"])
def test_models_of_four_families_are_pruned_inside_their_blocks_only(make, stacks, count, method):
    model, before = make(), make()
    assert len(block_stacks(model)) == stacks
    masks = prune_model(model, batches(seq2seq=make is t5), Pattern.parse("2:4"), method=method)
    assert len(masks) == count == len(block_linears(model))
    for name in block_linears(model):
        assert (matrix(model.get_submodule(name)).unflatten(1, (-1, 4)) != 0).sum(-1).eq(2).all()
    changed = {name for name, value in before.named_parameters() if not torch.equal(value, model.get_parameter(name))}
    assert changed == set(masks)
    check_pattern(model, masks, Pattern.parse("2:4"))
    assert model.config.to_dict() == before.config.to_dict()
    assert model.training == before.training


@pytest.mark.parametrize("one_by_one", [False, True])
def test_a_block_is_calibrated_on_the_pruned_blocks_before_it_without_padding(one_by_one):
    model, pattern, data = gpt2().double(), Pattern.parse(0.5), batches()
    reference = gpt2().double()
    prune_model(model, data, pattern, one_by_one=one_by_one)

    def inputs_of(layer):
        seen = []
        hook = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
        for batch in data:
            reference(batch["input_ids"], attention_mask=batch["attention_mask"])
        hook.remove()
        return torch.cat([x[batch["attention_mask"].bool()] for x, batch in zip(seen, data, strict=True)])

    for block in reference.eval().transformer.h:
        layers = [block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj]
        for group in [[layer] for layer in layers] if one_by_one else [layers]:
            seen = [inputs_of(layer) for layer in group]
            for layer, x in zip(group, seen, strict=True):
                layer.weight.data = prune_by_sparsegpt(matrix(layer).detach(), hessian_of(x), pattern).t().contiguous()
    for name, value in reference.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), value, rtol=1e-8, atol=1e-9)


def test_models_without_blocks_and_calibration_without_text_are_refused():
    with pytest.raises(InputError, match="no list of transformer blocks"):
        prune_model(torch.nn.Linear(4, 4), [], Pattern.parse(0.5))
    with pytest.raises(InputError, match="each block must run once"):
        prune_model(gpt2(), [], Pattern.parse(0.5))
    with pytest.raises(InputError, match="no token reaches"):
        prune_model(gpt2(), [{k: v * 0 for k, v in batches()[0].items()}], Pattern.parse(0.5))


# ---------------------------------------------------------------- masks


@pytest.mark.parametrize("make", [gpt2, llama])
def test_zeros_stay_the_same_set_under_momentum_and_reload(make, tmp_path):
    model, data = make(), batches(1)[0]
    masks = prune_model(model, batches(), Pattern.parse(0.8))
    weights = MaskedWeights(model, masks)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.01)
    moved = 0
    for _ in range(5):
        model(**data).loss.backward()
        optimizer.step()
        moved += weights.violations()
        weights.apply()
    assert moved > 0, "the optimiser must have tried to move masked entries"
    assert weights.violations() == 0
    assert all(torch.equal(model.get_parameter(name) != 0, mask) for name, mask in masks.items())

    model.save_pretrained(tmp_path)
    save_masks(masks, tmp_path / "masks.safetensors")
    again, loaded = type(model).from_pretrained(tmp_path), load_masks(tmp_path / "masks.safetensors")
    assert loaded.keys() == masks.keys()
    assert all(torch.equal(loaded[name], mask) for name, mask in masks.items())
    assert all(torch.equal(again.get_parameter(name) != 0, mask) for name, mask in masks.items())
    assert MaskedWeights(again, loaded).violations() == 0


@settings(deadline=None, max_examples=30)
@given(shape=st.tuples(st.integers(1, 7), st.integers(1, 19)), seed=st.integers(0, 99))
def test_mask_files_hold_one_bit_an_entry(tmp_path_factory, shape, seed):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.3
    path = tmp_path_factory.mktemp("masks") / "m.safetensors"
    save_masks({"a.weight": mask, "b": ~mask}, path)
    loaded = load_masks(path)
    assert torch.equal(loaded["a.weight"], mask)
    assert torch.equal(loaded["b"], ~mask)
    assert path.stat().st_size < 500 + 2 * mask.numel() / 8


def test_masks_that_do_not_fit_and_files_that_are_none_are_named(tmp_path):
    from safetensors.torch import save_file

    with pytest.raises(InputError, match=r"has no parameter 'x\.weight'"):
        MaskedWeights(gpt2(), {"x.weight": torch.ones(1)})
    with pytest.raises(InputError, match="its mask"):
        MaskedWeights(gpt2(), {"transformer.h.0.attn.c_attn.weight": torch.ones(3, 3)})
    save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="not a file of masks"):
        load_masks(tmp_path / "other.safetensors")
    (tmp_path / "torn").write_bytes(b"123")
    for name in ("torn", "missing"):
        with pytest.raises(InputError, match=rf"masks .*{name}: cannot be read"):
            load_masks(tmp_path / name)


@pytest.fixture
def one_process_group(tmp_path):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_masks_follow_weights_that_fsdp2_shards_afterwards(one_process_group):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = gpt2()
    masks = prune_model(model, batches(), Pattern.parse("2:4"))
    weights = MaskedWeights(model, masks)
    mesh = init_device_mesh("cpu", (1,))
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh)
    with torch.no_grad():
        for parameter in model.transformer.h.parameters():
            parameter.add_(1.0)
    assert all(hasattr(model.get_parameter(name), "placements") for name in masks)
    weights.apply()
    assert all((model.get_parameter(name).full_tensor()[~mask] == 0).all() for name, mask in masks.items())


def test_weights_sharded_to_another_shape_are_refused():
    model = gpt2()
    weights = MaskedWeights(model, prune_model(model, batches(), Pattern.parse("2:4")))
    block = model.transformer.h[0]
    block.mlp.c_fc.weight = torch.nn.Parameter(block.mlp.c_fc.weight.detach().flatten())
    with pytest.raises(InputError, match="shard with FSDP2"):
        weights.apply()


def test_report_counts_exact_zeros():
    model = gpt2()
    pattern = Pattern.parse(0.75)
    report = sparsity_report(model, prune_model(model, batches(), pattern), pattern)
    assert json.loads(json.dumps(report))["pattern"] == "0.75"
    assert report["sparsity"] == pytest.approx(0.75, abs=1e-3)
    entry = report["weights"]["transformer.h.1.mlp.c_fc.weight"]
    assert entry == {"shape": [16, 64], "zeros": 768}


# ---------------------------------------------------------------- 2:4 export


def test_conv1d_as_linear_computes_the_same():
    module = gpt2().transformer.h[0].mlp.c_fc
    x = torch.randn(3, 16)
    torch.testing.assert_close(as_linear(module)(x), module(x))


def test_two_of_four_weights_compress_without_loss():
    """The compressed form of the sparse kernels (values, metadata), made and undone on the CPU."""
    from torch.sparse._semi_structured_conversions import (
        sparse_semi_structured_from_dense_cutlass,
        sparse_semi_structured_to_dense_cutlass,
    )

    g = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(64, 128, generator=g), torch.randn(256, 128, generator=g)
    pruned = prune_by_sparsegpt(weight, hessian_of(inputs.double()), Pattern.parse("2:4")).to(torch.bfloat16)
    values, metadata = sparse_semi_structured_from_dense_cutlass(pruned)
    assert values.numel() == pruned.numel() // 2
    assert torch.equal(sparse_semi_structured_to_dense_cutlass(values, metadata), pruned)


def test_export_says_what_it_needs():
    model = gpt2()
    names = list(prune_model(model, batches(), Pattern.parse("2:4")))
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match=r"need a CUDA GPU of capability 8\.0"):
            to_semi_structured(model, names)
    with pytest.raises(InputError, match=r"is not 2:4: a group of 4 inputs has 4 non-zeros"):
        to_semi_structured(gpt2(), names)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the sparse kernels are CUDA's")
def test_semi_structured_student_computes_what_the_dense_one_does():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=64, n_embd=128, n_layer=2, n_head=2)).cuda().half()
    ids = torch.randint(0, 50, (4, 64), device="cuda")
    names = list(prune_model(model, [], Pattern.parse("2:4"), method="magnitude"))
    with torch.no_grad():
        expected = model.eval()(ids).logits
        got = to_semi_structured(model, names)(ids).logits
    torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)


def test_masks_of_reads_the_zeros_of_this_moment():
    model = gpt2()
    name = "transformer.h.0.attn.c_attn.weight"
    with torch.no_grad():
        model.get_parameter(name)[0, :5] = 0
    assert int((~masks_of(model, [name])[name]).sum()) == 5
