"""Pushing over HTTP: what leaves is the whole export, and it comes back as it was."""

import os
import subprocess
import sys

import pytest
from hub_server import running_hub

PUSH_AND_LOAD = """
import torch
import vitweave
from transformers import AutoModelForImageClassification
from vitweave.configuration.configuration_specialized_vit import SpecializedViTConfig
from vitweave.hub.export import push_to_hub_with_code
from vitweave.modeling.modeling_specialized_vit import SpecializedViTForImageClassification

config = SpecializedViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, image_size=28)
model = SpecializedViTForImageClassification(config).eval()
done = push_to_hub_with_code(model, "someone/cells", verify=False, private=True)
loaded = AutoModelForImageClassification.from_pretrained("someone/cells")
pixels = torch.randn(1, 3, 28, 28)
assert torch.equal(loaded(pixels).logits, model(pixels).logits)
print("commit", done.oid)
"""


@pytest.mark.slow
def test_a_pushed_model_comes_back(tmp_path):
    with running_hub() as hub:
        environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_of_this_test"}
        environment |= {"HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
        environment |= {"PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(
            [sys.executable, "-c", PUSH_AND_LOAD], env=environment, capture_output=True, text=True, timeout=600
        )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "commit 0123456789abcdef" in done.stdout
    assert hub.created == [("someone/cells", True)]
    assert {
        "model.safetensors",
        "config.json",
        "README.md",
        "SHA256SUMS",
        "modeling_specialized_vit.py",
    } < hub.files.keys()
    assert "someone/cells" in hub.files["README.md"].decode()
    assert list(hub.objects.values()) == [hub.files["model.safetensors"]]  # weights through the large file storage
