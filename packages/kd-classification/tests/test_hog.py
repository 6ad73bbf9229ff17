"""Gradient histograms: ramps by hand, what they do not depend on, the order of a patch's target."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kd_classification.engine.hog import hog, hog_targets, whitened
from kdcore.errors import InputError


def ramp(kind):
    rows, columns = torch.meshgrid(*[torch.arange(16, dtype=torch.float64)] * 2, indexing="ij")
    return {"x": columns, "y": rows, "x + y": rows + columns}[kind][None, None]


def test_ramps_by_hand():
    for kind, index in (("x", 0), ("y", 4)):
        found = hog(ramp(kind))[0, 0]
        assert found.shape == (2, 2, 9)
        expected = torch.zeros(9, dtype=torch.float64)
        expected[index] = 1.75  # 7 of 8 lines with a difference of 2
        torch.testing.assert_close(found, expected.expand(2, 2, 9))
    diagonal = hog(ramp("x + y"))[0, 0, 0, 0]
    assert diagonal[2].item() == pytest.approx(2.1655145174, abs=1e-9)
    assert diagonal[[0, 4]].tolist() == pytest.approx([0.21875, 0.21875])
    assert diagonal.count_nonzero() == 3


def test_descending_is_the_same_direction_as_ascending():
    torch.testing.assert_close(hog(-ramp("x")), hog(ramp("x")))
    torch.testing.assert_close(hog(-ramp("x + y")), hog(ramp("x + y")))


def test_whitened_cells():
    found = whitened(hog(ramp("x")))[0, 0, 0, 0]
    assert found[0].item() == pytest.approx(2.8283803703, abs=1e-9)
    assert found[1:].tolist() == pytest.approx([-0.3535475463] * 8, abs=1e-9)
    constant = hog_targets(torch.full((1, 3, 16, 16), 77.0), 16)
    assert (constant == 0).all()


@given(st.integers(0, 500), st.floats(0.1, 10))
def test_neither_brightness_nor_contrast_counts(seed, contrast):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 128, (1, 1, 16, 16), generator=generator).double()
    torch.testing.assert_close(hog(images + 30), hog(images))
    torch.testing.assert_close(hog(contrast * images), contrast * hog(images))
    torch.testing.assert_close(whitened(hog(contrast * images)), whitened(hog(images)), rtol=1e-3, atol=1e-4)


def test_target_of_a_patch_is_cell_row_cell_column_orientation_channel():
    images = torch.randint(0, 256, (2, 3, 32, 48), generator=torch.Generator().manual_seed(0)).double()
    target, cells = hog_targets(images, 16), whitened(hog(images))
    assert target.shape == (2, 6, 108)
    patch = target[1, 4].view(2, 2, 9, 3)  # second row of patches, second column
    for row in (0, 1):
        for column in (0, 1):
            torch.testing.assert_close(patch[row, column], cells[1, :, 2 + row, 2 + column].T)


def test_half_precision_is_computed_in_float32():
    assert hog(torch.zeros(1, 1, 8, 8, dtype=torch.bfloat16)).dtype == torch.float32


def test_cells_that_do_not_tile_are_named():
    with pytest.raises(InputError, match="cell = 8: does not divide images of 12x16 pixels"):
        hog(torch.zeros(1, 1, 12, 16))
    with pytest.raises(InputError, match="cells = 3: does not divide patches of 16 pixels"):
        hog_targets(torch.zeros(1, 1, 16, 16), 16, cells=3)
