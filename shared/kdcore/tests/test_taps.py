"""FeatureTap: what it holds, when hooks exist, what it says when it cannot."""

import doctest

import pytest
import torch
from torch import nn

import kdcore.taps
from kdcore.errors import InputError
from kdcore.taps import FeatureTap


class Two(nn.Module):
    """Returns (y, state), like recurrent and attention layers do."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x):
        return self.linear(x), x.sum()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer1 = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
        self.layer2 = nn.Sequential(Two())
        self.shared = nn.Linear(3, 3)
        self.alias = self.shared
        self.unused = nn.Linear(3, 3)

    def forward(self, x, fail=False):
        x = self.layer1(x)
        x, _ = self.layer2(x)
        x = self.shared(self.shared(x))
        if fail:
            raise RuntimeError("boom")
        return x


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


X = torch.tensor([[1.0, -2.0], [0.5, 3.0]])


def hooks(net):
    return sum(len(m._forward_hooks) for m in net.modules())


def test_values_are_the_modules_outputs_themselves(net):
    with FeatureTap(net, {"mid": "layer1", "deep": "layer2.0.linear"}) as tap:
        out = net(X)
        inside = tap["mid"]
    assert tap["mid"] is inside
    torch.testing.assert_close(tap["mid"], net.layer1(X), atol=0, rtol=0)
    torch.testing.assert_close(tap["deep"], net.layer2[0].linear(net.layer1(X)), atol=0, rtol=0)
    torch.testing.assert_close(out, net(X), atol=0, rtol=0)
    assert list(tap.as_dict()) == ["mid", "deep"]
    assert "mid" in tap
    assert "other" not in tap


def test_gradients_flow_unless_detached(net):
    with FeatureTap(net, ["layer1"]) as tap:
        net(X)
    tap["layer1"].sum().backward()
    assert net.layer1[0].weight.grad.abs().sum() > 0
    with FeatureTap(net, ["layer1"], detach=True) as tap:
        net(X)
    assert not tap["layer1"].requires_grad


def test_hooks_exist_only_inside(net):
    tap = FeatureTap(net, ["layer1", "shared"])
    assert hooks(net) == 0
    with tap:
        assert hooks(net) == 2
    assert hooks(net) == 0


def test_hooks_and_values_go_when_the_block_raises(net):
    with pytest.raises(RuntimeError, match="boom"), FeatureTap(net, ["layer1"]) as tap:
        net(X, fail=True)
    assert hooks(net) == 0
    assert "layer1" not in tap


def test_entering_again_clears(net):
    tap = FeatureTap(net, ["layer1"])
    with tap:
        net(X)
    first = tap["layer1"]
    with tap:
        assert "layer1" not in tap
        net(2 * X)
    assert not torch.equal(tap["layer1"], first)
    with tap:
        net(X)
        with tap:
            assert "layer1" not in tap
            assert hooks(net) == 1
            net(X)
        assert hooks(net) == 1
        tap.clear()
        net(X)
    assert hooks(net) == 0
    torch.testing.assert_close(tap["layer1"], first, atol=0, rtol=0)


def test_two_taps_on_one_module(net):
    with FeatureTap(net, ["layer1"]) as a, FeatureTap(net, {"x": "layer1"}, detach=True) as b:
        net(X)
    torch.testing.assert_close(a["layer1"].detach(), b["x"], atol=0, rtol=0)
    assert hooks(net) == 0


def test_last_call_is_kept_and_shared_modules_have_every_name(net):
    with FeatureTap(net, {"a": "shared", "b": "alias", "root": ""}) as tap:
        out = net(X)
    assert tap["a"] is out
    assert tap["b"] is out
    assert tap["root"] is out


def test_tuple_outputs(net):
    with (
        pytest.raises(InputError, match=r"tap 'two': .*'layer2.0' \(Two\) gave a tuple, .*index="),
        FeatureTap(net, {"two": "layer2.0"}),
    ):
        net(X)
    assert hooks(net) == 0
    with FeatureTap(net, {"two": "layer2.0", "plain": "layer1"}, index=0) as tap:
        net(X)
    assert tap["two"].shape == (2, 3)
    assert tap["plain"].shape == (2, 3)  # a tensor is kept whole
    with FeatureTap(net, ["layer2.0"], select=lambda output: output[1]) as tap:
        net(X)
    assert tap["layer2.0"].ndim == 0
    with FeatureTap(net, {"two": "layer2.0", "mid": "layer1"}, select={"two": lambda o: o[0][:, :1]}) as tap:
        net(X)
    assert tap["two"].shape == (2, 1)
    assert tap["mid"].shape == (2, 3)
    with (
        pytest.raises(InputError, match=r"index is 5, but a tapped module gave a tuple of 2 elements"),
        FeatureTap(net, ["layer2.0"], index=5),
    ):
        net(X)


def test_inputs_of_modules(net):
    x = torch.randn(4, 2)
    with FeatureTap(
        net, {"in": "layer1.1:input", "out": "layer1.0", "model": ":input", "state": "layer2.0:input"}
    ) as tap:
        net(x=x)  # also by keyword
    assert tap["in"] is tap["out"]
    assert tap["model"] is x
    assert torch.equal(tap["state"], tap["out"].relu())
    pair = nn.Sequential(Two(), nn.Identity())
    with (
        pytest.raises(InputError, match=r"tap 'pair': module '1:input' \(Identity\) was given a tuple, .*index="),
        FeatureTap(pair, {"pair": "1:input"}),
    ):
        pair(torch.zeros(2, 3))
    with FeatureTap(pair, {"pair": "1:input"}, index=0, detach=True) as tap:
        pair(torch.zeros(2, 3))
    assert tap["pair"].shape == (2, 3)
    assert not tap["pair"].requires_grad
    with pytest.raises(InputError, match=r"no module 'layer1.2'; did you mean"):
        FeatureTap(net, {"in": "layer1.2:input"})


def test_a_tap_never_reached_is_named(net):
    with FeatureTap(net, {"ghost": "unused", "mid": "layer1"}) as tap:
        net(X)
    with pytest.raises(InputError, match=r"tap 'ghost' was never reached: module 'unused' did not run"):
        tap["ghost"]
    with pytest.raises(InputError, match=r"'ghost'"):
        tap.as_dict()
    with pytest.raises(InputError, match=r"no tap is called 'midd'; did you mean 'mid'\?"):
        tap["midd"]


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("layer2.0.linaer", r"did you mean 'layer2\.0\.linear'"),
        ("layr1", r"did you mean 'layer1'"),
        ("layer2.blocks", r"allowed: layer2\.0|did you mean"),
        ("zzz", r"allowed: alias, layer1, layer2, shared, unused"),
    ],
)
def test_unknown_module_lists_near_names(net, name, hint):
    with pytest.raises(InputError, match=rf"tap 'a': Net has no module '{name}'; ({hint})"):
        FeatureTap(net, {"a": name})


def test_bad_arguments(net):
    with pytest.raises(InputError, match=r"names is the string 'layer1'"):
        FeatureTap(net, "layer1")
    with pytest.raises(InputError, match=r"names is empty"):
        FeatureTap(net, [])
    with pytest.raises(InputError, match=r"index and select are both given"):
        FeatureTap(net, ["layer1"], index=0, select=lambda o: o)
    with pytest.raises(InputError, match=r"select names the tap 'layr1', which does not exist; did you mean 'layer1'"):
        FeatureTap(net, ["layer1"], select={"layr1": lambda o: o})


def test_a_model_without_children_says_so():
    with pytest.raises(InputError, match=r"ReLU has no module 'x'$"):
        FeatureTap(nn.ReLU(), ["x"])


def test_taps_survive_no_grad_and_train_mode_changes(net):
    with FeatureTap(net, ["layer1"]) as tap, torch.no_grad():
        net.eval()(X)
    assert not tap["layer1"].requires_grad


def test_docstring_examples():
    result = doctest.testmod(kdcore.taps)
    assert result.attempted > 0
    assert result.failed == 0
