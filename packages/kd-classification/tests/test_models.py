"""Networks by timm name, and what is saved of them."""

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from kd_classification.data import DataConfig, load_data
from kd_classification.models import (
    Adapted,
    ModelConfig,
    adapted,
    create_model,
    feature_width,
    load_into,
    load_model,
    penultimate,
    save_model,
)
from kdcore.errors import InputError

SMALL = {"layers": [1, 1, 1, 1], "channels": [4, 4, 8, 16], "stem_width": 4}


@pytest.fixture(scope="module")
def data():
    return load_data(DataConfig(name="digits", image_size=32))


def small(**values):
    return ModelConfig(name="resnet18", args=SMALL, **values)


def test_saved_student_opens_with_stock_timm(data, tmp_path):
    torch.manual_seed(0)
    model = create_model(small(), data, field="student").eval()
    save_model(model, tmp_path, data)
    x = torch.randn(2, 1, 32, 32)
    by_folder = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    by_file = timm.create_model(
        "resnet18", num_classes=10, in_chans=1, checkpoint_path=str(tmp_path / "model.safetensors"), **SMALL
    ).eval()
    for loaded in (by_folder, by_file, load_model(tmp_path).eval()):
        torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=0)
    assert by_folder.pretrained_cfg["label_names"] == [str(i) for i in range(10)]
    assert tuple(by_folder.pretrained_cfg["mean"]) == tuple(data.mean)


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("mobilenetv3_small_050", {}),
        ("vit_tiny_patch16_224", {"img_size": 32, "depth": 1, "embed_dim": 12, "num_heads": 1}),
        ("convnext_atto", {"depths": [1, 1, 1, 1], "dims": [4, 4, 8, 8]}),
    ],
)
def test_penultimate_feature_is_what_the_classifier_reads(data, name, args):
    torch.manual_seed(0)
    model = create_model(ModelConfig(name=name, args=args), data, field="student").eval()
    images = torch.randn(2, 1, 32, 32)
    features, logits = penultimate(model, images)
    assert features.shape == (2, feature_width(model))
    torch.testing.assert_close(logits, model(images))
    torch.testing.assert_close(logits, model.get_classifier()(features))


def test_adapted_teacher_gets_its_normalisation_and_size(data):
    torch.manual_seed(0)
    wanted = small(mean=[0.5], std=[0.25], input_size=48)
    model = create_model(wanted, data, field="teacher").eval()
    behind = adapted(model, data, wanted)
    assert isinstance(behind, Adapted)
    pixels = torch.rand(2, 1, 32, 32)
    given = (pixels - data.mean[0]) / data.std[0]
    larger = torch.nn.functional.interpolate(pixels, (48, 48), mode="bilinear", antialias=True)
    torch.testing.assert_close(behind(given), model((larger - 0.5) / 0.25), rtol=1e-4, atol=1e-4)
    features, logits = penultimate(behind, given)
    torch.testing.assert_close(logits, behind(given))
    assert features.shape[1] == feature_width(behind) == 16
    assert adapted(model, data, small()) is model
    smooth = adapted(model, data, small(mean=[0.5], std=[0.25], input_size=48, interpolation="bicubic"))
    larger = torch.nn.functional.interpolate(given, (48, 48), mode="bicubic", antialias=True)
    torch.testing.assert_close(smooth.adapt(given), larger * smooth.scale + smooth.shift)


def test_checkpoint_folder_file_and_pth(data, tmp_path):
    torch.manual_seed(0)
    model = create_model(small(), data, field="teacher").eval()
    save_model(model, tmp_path / "folder", data)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "a.pth")
    x = torch.randn(1, 1, 32, 32)
    for checkpoint in ("folder", "folder/model.safetensors", "a.pth"):
        loaded = create_model(small(checkpoint=str(tmp_path / checkpoint)), data, field="teacher").eval()
        torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=0)


class Evil:
    def __reduce__(self):
        return (print, ("unpickled",))


def test_pickled_checkpoint_is_refused(data, tmp_path):
    torch.save({"state_dict": {"a": Evil()}}, tmp_path / "evil.pth")
    model = create_model(small(), data, field="teacher")
    with pytest.raises(InputError, match=r"teacher\.checkpoint = .*evil\.pth: not a checkpoint of plain tensors"):
        load_into(model, tmp_path / "evil.pth", field="teacher")


def test_checkpoint_that_does_not_fit(data, tmp_path):
    model = create_model(small(), data, field="teacher")
    state = model.state_dict()
    save_file({**state, "fc.weight": torch.zeros(3, 16)}, tmp_path / "classes.safetensors")
    save_file({k: v for k, v in state.items() if k != "fc.bias"}, tmp_path / "lacks.safetensors")
    for name, message in (
        ("classes", r"'fc.weight' is \(3, 16\), the model wants \(10, 16\)"),
        ("lacks", "lacks 'fc.bias'"),
    ):
        with pytest.raises(InputError, match=message):
            load_into(model, tmp_path / f"{name}.safetensors", field="teacher")
    save_model(model, tmp_path / "model", data)
    with pytest.raises(InputError, match="tells 10 classes apart, the data has 4"):
        load_model(tmp_path / "model", num_classes=4)
    with pytest.raises(InputError, match="takes 1 channels, the data has 3"):
        load_model(tmp_path / "model", channels=3)


def test_student_file_holds_the_student_alone(data, tmp_path):
    model = create_model(small(), data, field="student")
    save_model(model, tmp_path, data)
    assert set(load_file(tmp_path / "model.safetensors")) == set(model.state_dict())
