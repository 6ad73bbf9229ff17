"""Arms x seeds: the arms of a config, paired statistics against numbers by hand, and going on after a failure."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcore import run
from kdcore.compare import compare, differences, load_arms, summary
from kdcore.errors import InputError, RunFailed


def go(toy, *overrides, seeds=(0, 1), output="out", started=None, **options):
    started = [] if started is None else started
    return compare(
        "toy/small",
        overrides,
        seeds,
        toy / output,
        quiet=True,
        cpu=True,
        announce=lambda folder, text: started.append(folder.relative_to(toy / output).as_posix()),
        **options,
    )


# ---------------------------------------------------------------- statistics


def test_summary_by_hand():
    result = summary([{"a": 1.0, "b": 3}, {"a": 2.0, "b": 3}, {"a": 6.0, "b": 3, "only here": 1}])
    assert result == {"mean": {"a": 3.0, "b": 3.0}, "std": {"a": pytest.approx(7**0.5), "b": 0.0}}  # 4 + 1 + 9 = 2 * 7


def test_one_run_has_no_deviation():
    assert summary([{"a": 1.0}]) == {"mean": {"a": 1.0}, "std": {"a": None}}


def test_differences_by_hand():
    method = [{"a": 0.9}, {"a": 0.8}, {"a": 0.7}, {"a": 0.6}]
    arm = [{"a": 0.8}, {"a": 0.6}, {"a": 0.7}, {"a": 0.5}]
    # d = 0.1, 0.2, 0, 0.1: mean 0.1, variance (0 + 0.01 + 0.01 + 0) / 3, standard error sqrt(0.02 / 3 / 4)
    found = differences(method, arm)["a"]
    assert found["mean"] == pytest.approx(0.1)
    assert found["standard_error"] == pytest.approx((0.02 / 12) ** 0.5)
    assert found["n"] == 4
    assert found["within_noise"] is False  # 0.1 is 2.45 standard errors


@pytest.mark.parametrize(
    ("pairs", "within"),
    [
        ([1.0, 3.0], False),  # mean 2, error 1: exactly two standard errors are a difference
        ([1.0, 3.5], True),  # mean 2.25, error 1.25
        ([0.0, 0.0], True),  # nothing
        ([-0.5, -0.5], False),  # the same for every seed
        ([0.5], True),  # one seed tells nothing
        ([math.nan, 1.0], True),
    ],
)
def test_within_noise(pairs, within):
    found = differences([{"a": value} for value in pairs], [{"a": 0.0} for _ in pairs])["a"]
    assert found["within_noise"] is within


def test_pairing_takes_out_what_the_seeds_share():
    arm = [{"a": 0.2}, {"a": 0.5}, {"a": 0.9}]
    method = [{"a": row["a"] + 0.015625} for row in arm]
    found = differences(method, arm)["a"]
    assert found["mean"] == pytest.approx(0.015625)
    assert found["standard_error"] < 1e-15
    assert found["within_noise"] is False


def test_only_metrics_that_both_arms_have():
    assert differences([{"a": 1.0, "own": 2.0}], [{"a": 0.5}]).keys() == {"a"}


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3)), min_size=2, max_size=8), st.floats(-10, 10))
def test_differences_change_sign_with_their_sides_and_ignore_shifts(pairs, shift):
    a, b = [{"x": p} for p, _ in pairs], [{"x": q} for _, q in pairs]
    there, back = differences(a, b)["x"], differences(b, a)["x"]
    assert there["mean"] == -back["mean"]
    assert there["standard_error"] == back["standard_error"]
    assert there["within_noise"] is back["within_noise"]
    moved = differences([{"x": r["x"] + shift} for r in a], [{"x": r["x"] + shift} for r in b])["x"]
    assert moved["mean"] == pytest.approx(there["mean"], abs=1e-9)
    assert moved["standard_error"] == pytest.approx(there["standard_error"], abs=1e-9)


# ---------------------------------------------------------------- arms


def test_arms_of_a_config(toy):
    arms = {arm.name: arm for arm in load_arms("toy/small", ["train.steps=3", "method_args.alpha=0.75"])}
    assert list(arms) == ["toy", "ce", "smooth"]
    assert [arm.method.key for arm in arms.values()] == ["toy", "toy", "plain"]
    assert [arm.config.train.steps for arm in arms.values()] == [3, 3, 3]
    assert (arms["toy"].config.method_args.alpha, arms["ce"].config.method_args.alpha) == (0.75, 0.0)
    assert arms["smooth"].config.method_args.model_dump() == {"smoothing": 0.1}
    assert arms["ce"].with_seed(4).seed == 4
    assert arms["ce"].config.seed == 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["compare={}"], "'compare' has no arm"),
        (["compare={toy: {seed: 1}}"], "the name of the config's own arm"),
        (["compare={a/b: {method_args.alpha: 1}}"], "compare.a/b: expected a name that can be a folder"),
        (["compare={'..': {method_args.alpha: 1}}"], "expected a name that can be a folder"),
        (["compare={x: {seed: 1}}"], "compare.x: 'seed' is what the comparison varies"),
        (["seed=1"], "override: 'seed' is what the comparison varies"),
        (["compare={x: {method_args.alfa: 1}}"], "arm 'x': unknown key 'method_args.alfa'; did you mean 'alpha'?"),
        (["compare={x: {method: plane}}"], "method 'plane' is not installed"),
        (["compare={x: {train.steps.y: 1}}"], "'train.steps' is a value, not a section"),
    ],
)
def test_wrong_arms(toy, overrides, message):
    with pytest.raises(InputError) as error:
        load_arms("toy/small", overrides)
    assert message in str(error.value)


def test_every_arm_is_checked_before_the_first_training(toy):
    started = []
    with pytest.raises(InputError, match=r"arm 'wide': student\.width = 99: more than the teacher's 16"):
        go(toy, "compare={wide: {student.width: 99}}", started=started)
    assert started == []
    assert not (toy / "out").exists()


# ---------------------------------------------------------------- running


def test_comparison_file(toy):
    started = []
    result = go(toy, "train.steps=4", started=started)
    assert started == ["toy/seed-0", "ce/seed-0", "smooth/seed-0", "toy/seed-1", "ce/seed-1", "smooth/seed-1"]
    assert json.loads((toy / "out/comparison.json").read_text()) == result
    assert {k: result[k] for k in ("config", "method", "seeds", "overrides")} == {
        "config": "toy/small",
        "method": "toy",
        "seeds": [0, 1],
        "overrides": ["train.steps=4"],
    }
    assert result["environment"]["packages"]["kd-toy"] == "0.1"
    assert list(result["arms"]) == ["toy", "ce", "smooth"]
    assert list(result["differences"]) == ["ce", "smooth"]
    assert result["arms"]["smooth"]["overrides"] == {"method": "plain", "method_args.smoothing": 0.1}
    for name, arm in result["arms"].items():
        assert [entry["seed"] for entry in arm["runs"]] == [0, 1]
        for entry in arm["runs"]:
            written = json.loads((toy / f"out/{name}/seed-{entry['seed']}/metrics.json").read_text())
            assert entry["metrics"] == {k: v for k, v in written.items() if k != "confusion_matrix"}
    values = {name: [e["metrics"]["student/accuracy"] for e in arm["runs"]] for name, arm in result["arms"].items()}
    assert result["arms"]["toy"]["mean"]["student/accuracy"] == pytest.approx(sum(values["toy"]) / 2)
    paired = result["differences"]["ce"]["student/accuracy"]
    assert paired["mean"] == pytest.approx(sum(a - b for a, b in zip(values["toy"], values["ce"])) / 2)
    assert result["differences"]["ce"]["teacher/accuracy"]["mean"] == 0  # the arms of a seed share the teacher


def test_an_arm_is_the_run_that_kd_train_makes(toy):
    from kdcore.method import load_config

    result = go(toy, "train.steps=4", seeds=[1])
    method, config = load_config("toy/small", ["train.steps=4", "seed=1", "method_args.alpha=0"])
    alone = run.train(method, config, toy / "alone", quiet=True, cpu=True)
    assert result["arms"]["ce"]["runs"][0]["metrics"] == run.scalars(alone)


def test_same_command_goes_on_after_a_failure(toy, monkeypatch):
    whole = go(toy, output="whole")
    from kd_toy.methods.toy import ToyKD

    loss = ToyKD.loss

    def failing(self, batch, player="student"):
        if self.config.alpha == 0 and self.progress.step == 6:
            raise RunFailed("power cut")
        return loss(self, batch, player)

    monkeypatch.setattr(ToyKD, "loss", failing)
    with pytest.raises(RunFailed, match="power cut"):
        go(toy)
    assert not (toy / "out/comparison.json").exists()
    monkeypatch.setattr(ToyKD, "loss", loss)
    started = []
    result = go(toy, started=started)
    assert started == ["ce/seed-0", "smooth/seed-0", "toy/seed-1", "ce/seed-1", "smooth/seed-1"]
    assert result["arms"] == whole["arms"]
    assert result["differences"] == whole["differences"]
    go(toy, started=started)
    assert len(started) == 5  # nothing was left to do


def test_more_seeds_are_added(toy):
    started = []
    first = go(toy, "train.steps=4", seeds=[0], started=started)
    assert first["differences"]["ce"]["agreement"]["standard_error"] is None
    second = go(toy, "train.steps=4", seeds=[0, 1], started=started)
    assert len(started) == 6
    assert second["arms"]["toy"]["runs"][0] == first["arms"]["toy"]["runs"][0]


def test_output_that_holds_something_else(toy):
    go(toy, "train.steps=4", seeds=[0])
    with pytest.raises(InputError, match=r"'train\.steps' was 4 and is 5 now"):
        go(toy, "train.steps=5", seeds=[0])
    with pytest.raises(InputError, match="holds a run; a comparison needs a folder of its own"):
        go(toy, output="out/toy/seed-0")
    (toy / "papers").mkdir()
    (toy / "papers/thesis.tex").write_text("precious")
    with pytest.raises(InputError, match="holds other files and no comparison"):
        go(toy, output="papers")
    with pytest.raises(InputError, match="is a file"):
        go(toy, output="papers/thesis.tex")
