"""Write the toy composite and its output under the running transformers:

python tests/modeling/write_exchange_fixture.py        (tests/fixtures/exchange/transformers-<version>)
"""

import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent))

from toy_composite import ToyForImageClassification, toy_config

if __name__ == "__main__":
    folder = Path(__file__).parents[1] / "fixtures" / "exchange" / f"transformers-{transformers.__version__}"
    torch.manual_seed(0)
    model = ToyForImageClassification(toy_config(num_labels=3)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # also what starts at 0 or 1
            parameter.normal_(std=0.2)
        model.save_pretrained(folder)
        pixel_values = torch.randn(2, 3, 16, 16)
        expected = {"pixel_values": pixel_values, "logits": model(pixel_values).logits}
    save_file(expected, folder / "expected.safetensors")
