"""Thinning, scales, ticks, paths, PNG files and the colours of the report."""

import json
import re
import struct
import zlib
from importlib.resources import files
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kdcore.report.curves import thin
from kdcore.report.images import png, shrink
from kdcore.report.read import Curve
from kdcore.report.svg import Scale, label_ticks, linear_scale, linear_ticks, log_scale, log_ticks, path, tick_label
from kdcore.report.tables import best_of
from kdcore.report.text import direction, metric, number, script_json


def curve(values, steps=None) -> Curve:
    values = np.asarray(values, dtype=np.float64)
    return Curve(np.arange(len(values), dtype=np.float64) if steps is None else np.asarray(steps, np.float64), values)


# ---------------------------------------------------------------- thinning


@given(st.integers(1, 4000), st.integers(0, 2**32 - 1), st.floats(0, 0.5))
def test_thinning_keeps_ends_extremes_and_gaps(size, seed, gaps):
    generator = np.random.default_rng(seed)
    values = generator.normal(size=size)
    values[generator.random(size) < gaps] = np.nan
    whole = curve(values)
    thinned = thin(whole)
    assert len(thinned.steps) <= 500
    assert (np.diff(thinned.steps) > 0).all()
    np.testing.assert_array_equal(thinned.values, values[thinned.steps.astype(int)])
    assert thinned.steps[0] == 0
    assert thinned.steps[-1] == size - 1
    assert np.isnan(thinned.values).any() == np.isnan(values).any()
    if len(whole.finite):
        assert thinned.finite.min() == whole.finite.min()
        assert thinned.finite.max() == whole.finite.max()


def test_thinning_keeps_every_spike_of_a_long_curve():
    values = np.zeros(100_000)
    spikes = np.arange(500, 100_000, 5000)
    values[spikes] = 1.0
    thinned = thin(curve(values))
    assert set(spikes) <= set(thinned.steps.astype(int))


def test_short_curves_are_left_alone():
    whole = curve(np.arange(500.0))
    assert thin(whole) is whole


# ---------------------------------------------------------------- scales and ticks


def test_scale_maps_ends_and_middle():
    np.testing.assert_allclose(Scale(0, 10, 100, 200)(np.array([0.0, 5.0, 10.0])), [100, 150, 200])
    np.testing.assert_allclose(Scale(0.01, 100, 0, 4, log=True)(np.array([0.01, 1.0, 10.0])), [0, 2, 3])
    assert not np.isfinite(Scale(0.01, 100, 0, 4, log=True)(np.array([0.0, -1.0]))).any()


finite = st.floats(-1e12, 1e12, allow_subnormal=False)


@given(finite, st.floats(1e-9, 1e12))
def test_linear_ticks_are_round_ascending_and_inside(low, span):
    high = low + max(span, 1e-6 * abs(low))
    ticks = linear_ticks(low, high)
    steps = np.diff(ticks)
    assert 2 <= len(ticks) <= 7
    assert (steps > 0).all()
    np.testing.assert_allclose(steps, steps[0], rtol=1e-3)
    slack = 1e-8 * (high - low) + 1e-9 * abs(low)
    assert low - slack <= ticks[0]
    assert ticks[-1] <= high + slack


@given(st.floats(-12, 12), st.floats(0.05, 20))
def test_log_ticks_are_ascending_and_inside(exponent, decades):
    low, high = 10.0**exponent, 10.0 ** (exponent + decades)
    ticks = log_ticks(low, high)
    assert 2 <= len(ticks) <= 9
    assert (np.diff(ticks) > 0).all()
    assert low * (1 - 1e-6) <= ticks[0]
    assert ticks[-1] <= high * (1 + 1e-6)


@given(hnp.arrays(np.float64, st.integers(1, 20), elements=st.floats(-1e30, 1e30)))
def test_every_value_lies_inside_its_scale(values):
    for scale in (linear_scale([curve(values)]), log_scale([curve(values)])):
        if scale is None:
            assert (values <= 0).all()
            continue
        shown = values[values > 0] if scale.log else values
        assert scale.low < scale.high
        assert (scale.low <= shown).all()
        assert (shown <= scale.high).all()


def test_scales_without_values():
    assert linear_scale([curve([np.nan])]).bounds == pytest.approx((0.0, 1.05))
    assert log_scale([curve([np.nan, 0.0, -1.0])]) is None


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0"), (0.1, "0.1"), (1500, "1500"), (25000, "25k"), (3e-5, "3e-5"), (-2e6, "−2M")]
)
def test_tick_labels(value, text):
    assert tick_label(value) == text


@given(st.lists(st.text("ab- %", min_size=1, max_size=30), min_size=1, max_size=40))
def test_labels_that_are_drawn_do_not_overlap(labels):
    ticks = label_ticks(labels)
    assert ticks[0] == 0
    assert ticks == sorted(ticks)
    assert ticks[-1] < len(labels)
    room = 284 / max(1, len(labels) - 1)
    widest = 5.6 * max(map(len, labels))
    assert all((b - a) * room >= widest for a, b in pairwise(ticks))


def test_short_labels_are_all_drawn():
    assert label_ticks(["low", "middle", "high"]) == [0, 1, 2]
    assert label_ticks([f"{10 * k}-{10 * k + 10} %" for k in range(10)]) == [0, 2, 4, 6, 8]


def test_path_is_interrupted_at_gaps_and_dots_lone_points():
    x = y = Scale(0, 10, 0, 10)
    assert path(curve([1, 2, np.nan, 3, np.nan, 4, 5]), x, y) == "M0.0 1.0L1.0 2.0M3.0 3.0h0M5.0 4.0L6.0 5.0"
    assert path(curve([7.0]), x, y) == "M0.0 7.0h0"
    assert path(curve([np.nan, np.nan]), x, y) == ""


# ---------------------------------------------------------------- PNG


def decode(data: bytes) -> np.ndarray:
    """Reads back what `png` writes; checks signature, lengths and CRCs."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, at = {}, 8
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        assert struct.unpack(">I", data[at + 8 + length : at + 12 + length]) == (zlib.crc32(kind + body),)
        chunks[kind] = body
        at += 12 + length
    width, height, depth, colour, *rest = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    assert (depth, rest, list(chunks)) == (8, [0, 0, 0], [b"IHDR", b"IDAT", b"IEND"])
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, -1)
    assert (rows[:, 0] == 0).all()
    return rows[:, 1:].reshape(height, width, {0: 1, 2: 3, 6: 4}[colour])


@given(
    hnp.arrays(
        np.uint8,
        st.tuples(st.integers(1, 9), st.integers(1, 9), st.sampled_from([1, 3, 4])),
        elements=st.integers(0, 255),
    )
)
def test_png_holds_the_pixels(image):
    np.testing.assert_array_equal(decode(png(image)), image)


def test_png_of_grey_without_channel_axis():
    image = np.arange(6, dtype=np.uint8).reshape(2, 3)
    np.testing.assert_array_equal(decode(png(image))[..., 0], image)


@pytest.mark.parametrize("shape", [(4,), (4, 4, 2), (0, 4), (1, 2, 3, 4)])
def test_png_refuses_other_shapes(shape):
    with pytest.raises(ValueError, match="expected uint8 of shape"):
        png(np.zeros(shape, np.uint8))


def test_png_refuses_other_types():
    with pytest.raises(ValueError, match="got float64"):
        png(np.zeros((2, 2)))


def test_shrink_takes_block_means():
    image = np.zeros((4, 6, 3), np.uint8)
    image[:2, :2] = 200
    image[2:, 4:] = [[[10], [20]], [[30], [40]]]
    expected = np.zeros((2, 3, 3), np.uint8)
    expected[0, 0], expected[1, 2] = 200, 25
    np.testing.assert_array_equal(shrink(image, limit=3), expected)
    assert shrink(image, limit=6) is image


@given(st.integers(1, 700), st.integers(1, 700))
def test_shrunk_sides_fit(height, width):
    small = shrink(np.full((height, width), 77, np.uint8), limit=100)
    assert min(small.shape) >= 1
    assert max(small.shape) <= 100
    assert (small == 77).all()


# ---------------------------------------------------------------- text


LOWER = ["student/nll", "val_loss", "negative_flip_rate", "teacher/ece", "perplexity"]
LOWER_OF_GENERATION = [
    "frechet",
    "student/mmd",
    "mode_kl",
    "energy_distance",
    "sliced_wasserstein",
    "seconds_per_sample",
]
HIGHER_OF_GENERATION = ["teacher/density", "student/coverage", "mode_coverage", "mode_precision", "recall"]


@pytest.mark.parametrize("name", LOWER + LOWER_OF_GENERATION)
def test_smaller_is_better(name):
    assert direction(name) == -1
    assert best_of(name, [0.2, 0.1, None, float("nan")]) == {1}


@pytest.mark.parametrize(
    "name", ["student/parameters", "seconds", "diversity_ratio", "out_of_domain_share", "feature_norm"]
)
def test_names_that_do_not_tell(name):
    assert direction(name) == 0


@pytest.mark.parametrize("name", ["student/accuracy", "agreement", "miou", "positive_flip_rate", *HIGHER_OF_GENERATION])
def test_larger_is_better(name):
    assert direction(name) == 1
    assert best_of(name, [0.2, 0.1, 0.2]) == {0, 2}


def test_no_best_where_nothing_compares():
    assert best_of("student/parameters", [1, 2]) == set()
    assert best_of("accuracy", [0.5, 0.5]) == set()
    assert best_of("accuracy", [0.5, None, "text", True]) == set()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.123456, "0.1235"),
        (1234567, "1,234,567"),
        (2.5e-7, "2.5e-7"),
        (float("inf"), "not finite"),
        (-3, "−3"),
        (0, "0"),
    ],
)
def test_numbers(value, text):
    assert number(value) == text


def test_fractions_are_percentages_and_others_are_not():
    assert metric("student/accuracy", 0.5) == "50.00 %"
    assert metric("student/nll", 0.5) == "0.5"
    assert metric("accuracy", 95.0) == "95"


@given(st.text())
def test_script_json_cannot_leave_its_element(text):
    written = script_json({"text": text})
    assert not set("<>&") & set(written)
    assert json.loads(written) == {"text": text}


# ---------------------------------------------------------------- colours


def palettes() -> list[dict[str, str]]:
    css = files("kdcore.report").joinpath("assets", "report.css").read_text(encoding="utf-8")
    light, dark = re.findall(r":root \{(.*?)\}", css, flags=re.DOTALL)
    return [dict(re.findall(r"--([\w-]+): (#\w{6})", block)) for block in (light, dark)]


def contrast(first: str, second: str) -> float:
    """Contrast ratio of WCAG 2.2."""

    def luminance(colour: str) -> float:
        channels = np.array([int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)])
        linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    dark, light = sorted((luminance(first), luminance(second)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_text_and_lines_have_the_contrast_that_wcag_asks_for(scheme):
    colours = palettes()[scheme]
    text = [(name, base) for name in ("text", "muted", "accent", "good", "bad") for base in ("page", "surface")]
    text += [
        ("mark-text", "mark"),
        ("heat-text", "heat"),
        ("text", "notice"),
        ("surface", "good"),
        ("surface", "accent"),
    ]
    for name, base in text:
        assert contrast(colours[name], colours[base]) >= 4.5, (name, base)
    for index in range(8):
        assert contrast(colours[f"c{index}"], colours["surface"]) >= 3, index
