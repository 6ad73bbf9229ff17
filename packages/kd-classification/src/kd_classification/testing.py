"""Whether what a run leaves opens with stock timm in a process where this project cannot be imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kd_classification.models import ModelConfig

WITHOUT_KD = "import sys\nsys.modules['kdcore'] = sys.modules['kd_classification'] = None  # importing them fails\n"

CLASSIFIER = """
import json, timm, torch
folder, shape = sys.argv[1], json.loads(sys.argv[2])
model = timm.create_model("local-dir:" + folder, pretrained=True).eval()
with torch.no_grad():
    logits = model(torch.zeros(2, *shape))
parts = model.get_classifier()
parts = parts if isinstance(parts, tuple) else (parts,)
print(json.dumps([list(logits.shape), type(model).__name__, [type(part).__name__ for part in parts]]))
"""

ENCODER = """
import json, timm, torch
from safetensors.torch import load_file
folder, name, args, shape = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), json.loads(sys.argv[4])
weights = folder + "/model.safetensors"
encoder = timm.create_model(name, num_classes=0, in_chans=shape[0], checkpoint_path=weights, **args)
own = encoder.state_dict()
kept = all(torch.equal(value, own[key]) for key, value in load_file(weights).items())
encoder.reset_classifier(4)
optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-3)
torch.manual_seed(0)
images, labels, losses = torch.randn(4, *shape), torch.arange(4), []
for _ in range(20):
    loss = torch.nn.functional.cross_entropy(encoder(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
hub = timm.create_model("local-dir:" + folder, pretrained=True, num_classes=7)
print(json.dumps({"kept": kept, "losses": losses, "classes": hub.num_classes}))
"""


def run_without_kd(code: str, *arguments: str) -> str:
    """Runs Python code in a process of its own that cannot import the project; the last line that it prints.

    `arguments` are its sys.argv[1:]; sys is imported. Raises RuntimeError with what it said where it fails.
    """
    command = [sys.executable, "-c", WITHOUT_KD + code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": ""})
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode}: {done.stderr}")
    return done.stdout.splitlines()[-1]


def stock_classifier(folder: Path, shape: Sequence[int]) -> tuple[list[int], str, list[str]]:
    """A saved classifier opened by `timm.create_model("local-dir:...")`: the shape of its logits for two blank images
    of `shape` (C, H, W), its class and those of its classifier layers."""
    logits, network, layers = json.loads(run_without_kd(CLASSIFIER, str(folder), json.dumps(list(shape))))
    return logits, network, layers


def stock_encoder(folder: Path, name: str, args: Mapping[str, Any], shape: Sequence[int]) -> dict[str, Any]:
    """A saved encoder opened, strictly, by `timm.create_model(name, num_classes=0, checkpoint_path=..., **args)` and
    fine-tuned for twenty steps of AdamW on four random images of `shape` (C, H, W).

    kept: whether every saved weight is in the network as it was; losses: of the steps; classes: outputs of the same
    folder opened as `local-dir:` with `num_classes=7`.
    """
    given = (str(folder), name, json.dumps(dict(args)), json.dumps(list(shape)))
    return json.loads(run_without_kd(ENCODER, *given))


def check_stock_encoder(folder: Path, model: ModelConfig, *, channels: int = 1, size: int = 32) -> None:
    """AssertionError unless stock timm opens the encoder of a run with the run's own name and arguments, weights and
    all, and can fine-tune it."""
    found = stock_encoder(folder, model.name, model.args, (channels, size, size))
    assert found["kept"], "a saved weight is not what the network has"
    assert found["losses"][-1] < 0.5 * found["losses"][0], f"fine-tuning does not learn: {found['losses']}"
    assert found["classes"] == 7, "local-dir: does not take another number of classes"
