"""The classification examples, each as its own process with --tiny."""

import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForImageClassification

from vitweave.training.linear_probes import LinearProbes

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name, *arguments):
    return subprocess.run([sys.executable, str(EXAMPLES / name), *arguments], capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["full", "frozen", "lora"])
def test_training(tmp_path, mode):
    done = run("train_classification.py", "--tiny", "--mode", mode, "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "'accuracy':" in done.stdout and "'accuracy_disc':" in done.stdout
    weights = "adapter_model.safetensors" if mode == "lora" else "model.safetensors"
    files = (weights, "preprocessor_config.json", "predictions.png")
    assert all((tmp_path / name).is_file() for name in files)


@pytest.mark.slow
def test_probing(tmp_path):
    done = run("probe_encoder.py", "--tiny", "--attentive", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert all(f"'{name}':" in done.stdout for name in ("linear last4_avgpool", "20-NN", "attentive tokens"))
    assert len(LinearProbes.load(tmp_path / "linear").figures) == 52
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "model")
    assert model.config.id2label[0] == "disc" and (tmp_path / "predictions.png").is_file()


@pytest.mark.parametrize("name", ["train_classification.py", "probe_encoder.py"])
def test_examples_are_short(name):
    assert len((EXAMPLES / name).read_text().splitlines()) < 80
