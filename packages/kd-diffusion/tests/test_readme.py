"""The README's Python blocks run in order, on stand-ins for the runs that they name."""

import re
import shutil
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.S)


@pytest.fixture
def runs(tiny_unet_folder, tiny_text_folder, tmp_path, monkeypatch):
    """`runs/` with students of random weights, as `kd train` would leave them."""
    from kd_diffusion.integrations.routed import write_bundle
    from kd_diffusion.partition import split_classes

    folders = {"dmd2-small-seed0": tiny_unet_folder, "swiftbrush-small-seed0": tiny_text_folder}
    for name, source in folders.items():
        shutil.copytree(source, tmp_path / "runs" / name / "student")
    bundle = tmp_path / "runs" / "msd-small-seed0" / "student"
    write_bundle(bundle, split_classes(10, 2), dict.fromkeys(range(2), tiny_unet_folder))
    monkeypatch.chdir(tmp_path)


def test_python_blocks(runs):
    namespace: dict = {}
    assert len(BLOCKS) == 3
    for number, block in enumerate(BLOCKS):
        exec(compile(block, f"README.md, python block {number}", "exec"), namespace)
    assert len(namespace["images"]) == 2
    assert namespace["method"].progress.step == 2


def test_every_method_has_a_row():
    from importlib.metadata import entry_points

    keys = {point.name for point in entry_points(group="kd.methods") if point.value.startswith("kd_diffusion.")}
    assert keys == set(re.findall(r"^\| `(\w+)` \|", README.split("## Components")[0], flags=re.M))
