"""Hybrid distillation: features of one teacher, relations of another, redundant patches dropped, and whole runs."""

import json

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from kd_classification.data import Batch
from kd_classification.engine import masked_vit as mv
from kd_classification.engine.attention_maps import attention_distance, position_information
from kd_classification.methods.hybrid_distill import (
    HybridDistill,
    feature_loss,
    least_redundant,
    masking_blocks_of,
    progressive_masking,
    redundancy,
    relation_blocks_of,
    relation_loss,
    relations,
)
from kd_classification.testing import check_stock_encoder
from kdcore.compare import load_arms
from kdcore.errors import InputError
from kdcore.method import load_config
from kdcore.run import train


def double(values):
    return torch.tensor(values, dtype=torch.float64)


def vit(seed, width=16, depth=6, heads=2, **args):
    torch.manual_seed(seed)
    size = {"img_size": 16, "patch_size": 4, "embed_dim": width, "depth": depth, "num_heads": heads, **args}
    return timm.create_model("vit_tiny_patch16_224", num_classes=0, in_chans=1, **size).double()


def batch(count=3):
    images = torch.randn(count, 1, 16, 16, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return Batch(images, torch.zeros(count, dtype=torch.long), torch.arange(count))


def toy(teacher=None, masked=None, student=None, **args):
    torch.manual_seed(3)
    return HybridDistill(teacher or vit(1), masked or vit(2), student or vit(4), **args).double()


def gradients(distiller, x=None):
    distiller.zero_grad()
    distiller.loss(x or batch()).total().backward()
    return {name: parameter.grad for name, parameter in distiller.student.named_parameters()}


# ---------------------------------------------------------------- losses


def test_relation_by_hand():
    q, k = double([[[[1, 0], [0, 2]]]]), double([[[[1, 1], [0, 1]]]])
    found = relations(q, k)
    assert found.flatten().tolist() == pytest.approx([0.7071067812, 0, 1.4142135624, 1.4142135624], abs=1e-10)
    assert relation_loss(found, torch.zeros_like(found)).item() == pytest.approx(0.5196067812, abs=1e-10)
    assert relations(q, k, scaled=False).flatten().tolist() == [1, 0, 2, 2]


def test_a_constant_on_all_keys_is_seen_by_the_logits_and_not_by_the_attention():
    torch.manual_seed(0)
    q, k, other = torch.randn(3, 2, 2, 5, 4, dtype=torch.float64)
    shift = torch.randn(2, 2, 1, 4, dtype=torch.float64)
    own, moved, target = relations(q, k), relations(q, k + shift), relations(q, other)
    torch.testing.assert_close((moved - own).std(-1), torch.zeros(2, 2, 5, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(relation_loss(moved, target, "attn_kl"), relation_loss(own, target, "attn_kl"))
    assert abs(relation_loss(moved, target) - relation_loss(own, target)) > 1e-2


def test_attention_kl_by_hand():
    student, teacher = double([[[[0.0, 0.0]]]]), double([[[[0.0, torch.log(double(3.0)).item()]]]])
    expected = 0.25 * torch.log(double(0.5)) + 0.75 * torch.log(double(1.5))
    assert relation_loss(student, teacher, "attn_kl").item() == pytest.approx(expected.item())


@pytest.mark.parametrize("relation", ["logits", "attn_kl"])
def test_relation_gradients_by_finite_differences(relation):
    torch.manual_seed(1)
    q, k, target = torch.randn(3, 1, 2, 3, 4, dtype=torch.float64)
    target = relations(target, target.flip(2))

    def loss(q, k):
        return relation_loss(relations(q, k), target, relation)

    assert torch.autograd.gradcheck(loss, (q.requires_grad_(), k.requires_grad_()))


def test_feature_loss_is_smooth_l1_of_the_whole_token():
    student, teacher = double([[[0.5, 2.0]]]), double([[[0.0, 0.0]]])
    assert feature_loss(student, teacher).item() == pytest.approx((0.125 + 1.5) / 2)
    normalised = feature_loss(student, double([[[3.0, 5.0]]]), target_norm=True)
    torch.testing.assert_close(normalised, F.smooth_l1_loss(student, F.layer_norm(double([[[3.0, 5.0]]]), (2,))))
    with pytest.raises(InputError, match="student features: shape"):
        feature_loss(student, teacher[..., :1])


# ---------------------------------------------------------------- dropped patches

FIVE = [[[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [-1.0, 0.2], [0.6, 0.8]]]


def test_redundancy_by_hand_is_scored_anew_at_each_block():
    z = double(FIVE)
    assert redundancy(z)[0].tolist() == pytest.approx([0.9950372, 0.9950372, 0.8, 0.1961161, 0.8], abs=1e-7)
    assert least_redundant(z, 1).tolist() == [[1, 2, 3, 4]]  # 0 and 1 tie: the lower index goes
    assert redundancy(z[:, 1:])[0, 0].item() == pytest.approx(0.6766253, abs=1e-7)
    kept = progressive_masking({0: z, 2: z}, 0.2)
    assert kept.sets[0].tolist() == [[1, 2, 3, 4]]
    assert kept.sets[2].tolist() == [[1, 2, 3, 4]]  # a fifth of four is none


def test_196_patches_in_three_steps():
    torch.manual_seed(0)
    features = {block: torch.randn(2, 196, 8) for block in (0, 4, 8)}
    kept = progressive_masking(features, 0.1)
    assert [kept.sets[block].shape[1] for block in (0, 4, 8)] == [177, 160, 144]
    for earlier, later in ((0, 4), (4, 8)):
        for one, other in zip(kept.sets[earlier], kept.sets[later], strict=True):
            assert set(other.tolist()) < set(one.tolist())
    assert kept.at(3) is kept.sets[0]
    assert kept.at(12) is kept.sets[8]


@given(st.integers(0, 200), st.floats(0, 0.6))
def test_the_dropped_are_the_most_redundant(seed, ratio):
    z = torch.randn(1, 12, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    kept = progressive_masking({0: z}, ratio).sets[0][0]
    dropped = sorted(set(range(12)) - set(kept.tolist()))
    assert len(dropped) == int(ratio * 12 + 1e-6)
    scores = redundancy(z)[0]
    assert not dropped or scores[dropped].min() >= scores[kept].max()


# ---------------------------------------------------------------- the step


def test_equal_networks_have_nothing_to_learn():
    """As long as no patch is dropped: without them the student's other tokens differ from those of the whole image."""
    distiller = toy(vit(1), vit(1), vit(1), drop_ratio=0.0)
    terms = distiller.loss(batch())
    assert {name: term.item() for name, (_, term) in terms.items()} == {"feature": 0, "relation": 0}
    assert all(gradient is None or (gradient == 0).all() for gradient in gradients(distiller).values())


def test_without_relations_and_dropped_patches_it_imitates_the_last_features():
    distiller, x = toy(beta=0.0, drop_ratio=0.0), batch()
    own, known = (network.blocks(network._pos_embed(network.patch_embed(x.images)))
                  for network in (distiller.student, distiller.teacher))  # fmt: skip
    torch.testing.assert_close(distiller.loss(x).total(), F.smooth_l1_loss(own, known))


def test_the_loss_is_that_of_the_equations_on_the_kept_tokens():
    distiller, x = toy(alpha=0.7, beta=0.3, drop_ratio=0.25), batch(2)
    known, kept = distiller.known_features(x.images)
    assert [kept.sets[block].shape[1] for block in (0, 2, 4)] == [12, 9, 7]
    teacher, masked, student = distiller.teacher, distiller.masked_teacher, distiller.student
    # the patches dropped are those that C's own features make redundant
    torch.testing.assert_close(kept.sets[0], least_redundant(mv.embed(teacher, x.images)[:, 1:], 4))
    after_two = mv.run_blocks(teacher, mv.embed(teacher, x.images), blocks=2).tokens[:, 1:]
    second = least_redundant(mv.gather_tokens(after_two, kept.sets[0]), 3)
    torch.testing.assert_close(kept.sets[2], kept.sets[0].gather(1, second))
    seen = mv.encode(student, x.images, kept.steps, queries_keys=[3, 4])
    expected = torch.zeros((), dtype=torch.float64)
    whole = mv.encode(masked, x.images, queries_keys=[3, 4]).queries_keys
    for block, before in ((3, 2), (4, 4)):
        rows = F.pad(kept.sets[before] + 1, (1, 0))  # the class token first
        for image in range(2):
            q, k = (part[image][:, rows[image]] for part in whole[block])
            own_q, own_k = (part[image] for part in seen.queries_keys[block])
            difference = (own_q @ own_k.mT - q @ k.mT) / 8**0.5
            expected = expected + 0.3 * F.smooth_l1_loss(difference, torch.zeros_like(difference)) / 2
    rows = F.pad(kept.sets[4] + 1, (1, 0))
    expected = expected + 0.7 * F.smooth_l1_loss(seen.tokens, mv.gather_tokens(known, rows))
    torch.testing.assert_close(distiller.loss(x).total(), expected)


def test_relations_alone_train_nothing_behind_the_last_keys():
    found = gradients(toy(alpha=0.0))
    for name, gradient in found.items():
        if name.startswith(("blocks.5.", "norm.")):
            assert gradient is None
        if name.startswith("blocks.4.") and not name.startswith(("blocks.4.norm1", "blocks.4.attn.qkv")):
            assert gradient is None
    values = found["blocks.4.attn.qkv.weight"][32:]
    assert (values == 0).all()
    assert (found["blocks.4.attn.qkv.weight"][:32] != 0).any()
    assert (found["blocks.3.mlp.fc2.weight"] != 0).any()


def test_teachers_get_no_gradient_and_have_roles():
    distiller, x = toy(), batch()
    gradients(distiller)
    for teacher in (distiller.teacher, distiller.masked_teacher):
        assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    swapped = toy(vit(2), vit(1))
    assert abs(swapped.loss(x).total() - distiller.loss(x).total()) > 1e-3


def test_a_common_rotation_of_queries_and_keys_changes_nothing():
    distiller, x = toy(alpha=0.0, relation_blocks=[3]), batch()
    before = distiller.loss(x).total()
    torch.manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64)).Q
    projection = distiller.student.blocks[3].attn.qkv
    with torch.no_grad():
        for tensor in (projection.weight, projection.bias):
            parts = tensor[:32].unflatten(0, (4, 8))  # queries and keys of two heads
            parts.copy_(torch.einsum("ij,hj...->hi...", rotation, parts))
    torch.testing.assert_close(distiller.loss(x).total(), before)


def test_patches_in_another_order_are_kept_alike():
    """The networks take patches with their positions: permuting both permutes the kept set and not the loss.

    The most redundant patch and its neighbour always tie; two dropped at each block leave the index nothing to decide.
    """
    args = {"drop_ratio": 0.15, "masking_blocks": [0, 2]}
    distiller, x = toy(**args), batch(2)
    torch.manual_seed(0)
    order = torch.randperm(16)
    images = x.images.unflatten(3, (4, 4)).unflatten(2, (4, 4)).permute(0, 1, 2, 4, 3, 5).flatten(2, 3)
    moved = images[:, :, order].unflatten(2, (4, 4)).permute(0, 1, 2, 4, 3, 5).flatten(4, 5).flatten(2, 3)
    other = toy(**args)
    with torch.no_grad():
        for network in (other.student, other.teacher, other.masked_teacher):
            network.pos_embed[:, 1:] = network.pos_embed[:, 1:][:, order]
    kept = [d.known_features(i)[1].sets[2] for d, i in ((distiller, x.images), (other, moved))]
    for one, two in zip(*kept, strict=True):
        assert set(one.tolist()) == set(order[two].tolist())
    torch.testing.assert_close(other.loss(x._replace(images=moved)).total(), distiller.loss(x).total())


def test_tokens_without_a_counterpart_are_left_out():
    with_registers = vit(2, reg_tokens=2)
    distiller = toy(masked=with_registers, student=vit(4, class_token=False, global_pool="avg"))
    terms = distiller.loss(batch())
    assert set(terms) == {"feature", "relation"}
    assert torch.isfinite(terms.total())


def test_two_feature_heads():
    distiller = toy(diversity="features")
    terms = distiller.loss(batch())
    assert list(terms) == ["feature", "masked_feature"]
    terms.total().backward()
    assert distiller.head.weight.grad is not None
    assert distiller.masked_head.weight.grad is not None
    assert distiller.deployed() is distiller.student


def test_other_widths_need_a_projector_and_other_heads_are_refused():
    assert toy(vit(1, width=24)).head.weight.shape == (24, 16)
    with pytest.raises(InputError, match="masked_teacher: 4 heads, the student has 2"):
        toy(masked=vit(2, heads=4))
    toy(masked=vit(2, heads=4), beta=0.0)
    with pytest.raises(InputError, match="teacher: 4 blocks, the student has 6"):
        toy(vit(1, depth=4))
    with pytest.raises(InputError, match="relation_blocks: block 6; allowed: 0 to 5"):
        toy(relation_blocks=[6])
    assert (relation_blocks_of(12), masking_blocks_of(12)) == ([9, 10], [0, 4, 8])


# ---------------------------------------------------------------- how heads attend


def test_position_information_of_the_identity_and_of_nothing():
    assert position_information(torch.eye(6, dtype=torch.float64)).item() == pytest.approx(1)
    assert position_information(torch.full((6, 6), 1 / 6, dtype=torch.float64)).item() == pytest.approx(0, abs=1e-12)
    one_key = torch.zeros(6, 6, dtype=torch.float64)
    one_key[:, 2] = 1
    assert position_information(one_key).item() == 0


def test_attention_distance_by_hand():
    grid, identity = (2, 2), torch.eye(4, dtype=torch.float64)[None]
    uniform = torch.full((1, 4, 4), 0.25, dtype=torch.float64)
    assert attention_distance(identity, grid).item() == 0
    assert attention_distance(uniform, grid).item() == pytest.approx((0 + 1 + 1 + 2**0.5) / 4)
    with pytest.raises(InputError, match="two sides of 6 patches"):
        attention_distance(uniform, (2, 3))


# ---------------------------------------------------------------- configs and runs

SHRUNK = [
    "data.per_class=8",
    "data.test_fraction=0.1",
    "train.epochs=2",
    "train.batch_size=20",
    "train.log_every=1",
    "teacher.train.epochs=1",
    "teacher.train.batch_size=40",
    "masked_teacher.train.epochs=1",
    "masked_teacher.train.batch_size=40",
    "finetune.train.epochs=1",
    "finetune.per_class=4",
]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KD_CACHE", str(tmp_path / "cache"))


@pytest.mark.slow
def test_run_ships_a_stock_encoder_and_tells_how_it_attends(tmp_path, cache):
    method, config = load_config("hybrid_distill/small", SHRUNK)
    metrics = train(method, config, tmp_path / "run", quiet=True, cpu=True)
    for name in ("student/linear_probe", "student/finetune", "masked_teacher/linear_probe", "teacher/accuracy"):
        assert 0 <= metrics[name] <= 1
    for name in ("student", "teacher", "masked_teacher"):
        assert 0 <= metrics[f"{name}/nmi"] <= 1
        assert metrics[f"{name}/attention_distance"] > 0
    assert metrics["student/nmi_gap"] == pytest.approx(abs(metrics["student/nmi"] - metrics["masked_teacher/nmi"]))
    check_stock_encoder(tmp_path / "run" / "student", config.student)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    stages = {line["stage"]: list(line["terms"]) for line in lines if line.get("kind") == "train"}
    assert stages == {
        "teacher": ["ce"], "masked_teacher": ["pixel"], "student": ["feature", "relation"], "finetuned": ["ce"]
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["relation_only", "two_features"])
def test_ablations_run_from_the_same_config(tmp_path, cache, arm):
    found = {a.name: a for a in load_arms("hybrid_distill/small", SHRUNK)}[arm]
    metrics = train(found.method, found.config, tmp_path / arm, quiet=True, cpu=True)
    assert 0 <= metrics["student/finetune"] <= 1


def test_paper_config_builds():
    _, config = load_config("hybrid_distill/paper")
    models = (config.teacher, config.masked_teacher, config.student)
    assert all(timm.is_model_pretrained(model.name) for model in models[:2])
    with torch.device("meta"):
        networks = [timm.create_model(model.name, num_classes=0, **model.args) for model in models]
        distiller = HybridDistill(*networks, **config.method_args.model_dump())
    assert distiller.relation_blocks == [9, 10]
    assert distiller.masking_blocks == [0, 4, 8]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["masked_teacher.args.num_heads=2"], "masked_teacher: 2 heads, the student has 4"),
        (["teacher.args.depth=3"], "teacher: 3 blocks, the student has 6"),
        (["method_args.alpha=0", "method_args.beta=0"], "alpha and beta are both 0"),
        (["method_args.masking_blocks=[7]"], "masking_blocks: block 7; allowed: 0 to 5"),
        (["masked_teacher.train=null"], "has no weights: give checkpoint, pretrained: true, or train"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_trains(tmp_path, overrides, message):
    def attempt():
        method, config = load_config("hybrid_distill/small", overrides)
        train(method, config, tmp_path / "run", quiet=True, cpu=True)

    with pytest.raises(InputError) as caught:
        attempt()
    assert message in str(caught.value)
