"""Cost of specialisation: time and memory against the vanilla model of transformers, in one interleaved run.

    python benchmarks/specialized_vit.py [--rounds 9] [--sizes small base]

Norms everywhere, QKV in the first third; 224 px, batch 8, two threads, SDPA. "plain" is our own class
with nothing specialised: it separates the cost of the [CLS] rows from what our blocks save elsewhere.
"""

import argparse

import torch
from timing import interleaved, peak_memory, ratio, row, write_results
from transformers import Dinov2Backbone, Dinov2Config, Dinov2Model

from vitweave.configuration.configuration_specialized_vit import SpecializedViTConfig
from vitweave.modeling.modeling_specialized_vit import SpecializedViTBackbone, SpecializedViTModel

SIZES = {
    "small": {"hidden_size": 384, "num_attention_heads": 6},
    "base": {"hidden_size": 768, "num_attention_heads": 12},
}
COMMON = {"image_size": 224, "attn_implementation": "sdpa"}
PLAIN = {"norm_blocks": "none", "qkv_blocks": "none"}
MEMORY = """
from transformers import Dinov2Config, Dinov2Model
from vitweave.configuration.configuration_specialized_vit import SpecializedViTConfig
from vitweave.modeling.modeling_specialized_vit import SpecializedViTModel
model = {model}(image_size=224, attn_implementation="sdpa", **{size})).train()
for _ in range(2):
    model.zero_grad()
    model(torch.ones(8, 3, 224, 224)).last_hidden_state.square().mean().backward()
"""


def models(size: dict) -> dict[str, torch.nn.Module]:
    return {
        "specialised": SpecializedViTModel(SpecializedViTConfig(**size, **COMMON)),
        "plain": SpecializedViTModel(SpecializedViTConfig(**size, **COMMON, **PLAIN)),
        "transformers": Dinov2Model(Dinov2Config(**size, **COMMON)),
    }


def forward(model, pixels):
    def run():
        with torch.no_grad():
            model(pixels)

    return run


def forward_backward(model, pixels):
    def run():
        model.zero_grad()
        model(pixels).last_hidden_state.square().mean().backward()

    return run


def measure(name: str, size: dict, rounds: int) -> list[dict]:
    torch.manual_seed(0)
    pixels, made, rows = torch.randn(8, 3, 224, 224), models(size), []
    seconds = interleaved({key: forward(model.eval(), pixels) for key, model in made.items()}, rounds)
    rows.append(row(f"ViT-{name} forward / transformers", ratio(seconds, "specialised", "transformers"), "<= 1.02"))
    rows.append(row(f"ViT-{name} forward / plain", ratio(seconds, "specialised", "plain")))
    compiled = {key: forward(torch.compile(model.eval()), pixels) for key, model in made.items() if key != "plain"}
    seconds = interleaved(compiled, rounds)
    rows.append(
        row(f"ViT-{name} compiled forward / transformers", ratio(seconds, "specialised", "transformers"), "<= 1.02")
    )
    seconds = interleaved({key: forward_backward(model.train(), pixels) for key, model in made.items()}, rounds)
    both = f"ViT-{name} forward + backward"
    rows.append(row(f"{both} / transformers", ratio(seconds, "specialised", "transformers"), "<= 1.03"))
    rows.append(row(f"{both} / plain", ratio(seconds, "specialised", "plain")))
    classes = {"specialised": "SpecializedViTModel(SpecializedViTConfig", "transformers": "Dinov2Model(Dinov2Config"}
    peaks = {key: peak_memory(MEMORY.format(model=text, size=size)) for key, text in classes.items()}
    rows.append(
        row(
            f"ViT-{name} peak memory of training / transformers",
            peaks["specialised"] / peaks["transformers"],
            "<= 1.05",
        )
    )
    return rows


def early_stop(rounds: int) -> list[dict]:
    """A backbone asked for layer 3 of 12 against its own full forward, and transformers' backbone likewise."""
    pixels, size = torch.randn(8, 3, 224, 224), SIZES["small"]
    runs = {}
    for key, backbone, config in (
        ("ours", SpecializedViTBackbone, SpecializedViTConfig),
        ("transformers", Dinov2Backbone, Dinov2Config),
    ):
        for layer in (3, 12):
            runs[f"{key}-{layer}"] = forward(backbone(config(**size, **COMMON, out_indices=[layer])).eval(), pixels)
    seconds = interleaved(runs, rounds)
    return [
        row("backbone, layer 3 of 12 / own full forward", ratio(seconds, "ours-3", "ours-12"), "<= 0.30"),
        row("transformers' backbone, layer 3 / full", ratio(seconds, "transformers-3", "transformers-12")),
        row("our layer 3 / transformers' layer 3", ratio(seconds, "ours-3", "transformers-3"), "<= 0.30"),
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    args = parser.parse_args()
    torch.set_num_threads(2)
    for name in args.sizes:
        write_results(f"specialized_vit_{name}", measure(name, SIZES[name], args.rounds))
    write_results("early_stop", early_stop(args.rounds))


if __name__ == "__main__":
    main()
