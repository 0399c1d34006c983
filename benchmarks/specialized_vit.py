"""Cost of specialisation: time and memory against the vanilla model of transformers, in one interleaved run.

    python benchmarks/specialized_vit.py [--rounds N] [--sizes small base] [--tiny]

Norms everywhere, QKV in the first third; 224 px, batch 8, two threads, SDPA. "plain" is our own class
with nothing specialised: it separates the cost of the [CLS] rows from what our blocks save elsewhere. A round of the
base model takes four times as long as one of the small one, so that fewer tell as much. `--tiny` is a trial run without
compilation and new processes that keeps no results.
"""

import argparse

import torch
from timing import forward_only, interleaved, peak_memory, ratio, row, write_results
from transformers import Dinov2Backbone, Dinov2Config, Dinov2Model

from vitweave.configuration.configuration_specialized_vit import SpecializedViTConfig
from vitweave.modeling.modeling_specialized_vit import SpecializedViTBackbone, SpecializedViTModel

SIZES = {
    "small": {"hidden_size": 384, "num_attention_heads": 6},
    "base": {"hidden_size": 768, "num_attention_heads": 12},
}
ROUNDS = {"small": 9, "base": 5}
TINY = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 4}
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


def forward_backward(model, pixels):
    def run():
        model.zero_grad()
        model(pixels).last_hidden_state.square().mean().backward()

    return run


def measure(name: str, size: dict, rounds: int) -> list[dict]:
    torch.manual_seed(0)
    pixels, made, rows = torch.randn(8, 3, 224, 224), models(size), []
    seconds = interleaved({key: forward_only(model.eval(), pixels) for key, model in made.items()}, rounds)
    rows.append(row(f"ViT-{name} forward / transformers", ratio(seconds, "specialised", "transformers"), "<= 1.02"))
    rows.append(row(f"ViT-{name} forward / plain", ratio(seconds, "specialised", "plain")))
    if size is not TINY:
        rows.append(compiled_forward(name, made, pixels, rounds))
    seconds = interleaved({key: forward_backward(model.train(), pixels) for key, model in made.items()}, rounds)
    both = f"ViT-{name} forward + backward"
    rows.append(row(f"{both} / transformers", ratio(seconds, "specialised", "transformers"), "<= 1.03"))
    rows.append(row(f"{both} / plain", ratio(seconds, "specialised", "plain")))
    if size is not TINY:
        rows.append(training_memory(name, size))
    return rows


def training_memory(name: str, size: dict) -> dict:
    classes = {"specialised": "SpecializedViTModel(SpecializedViTConfig", "transformers": "Dinov2Model(Dinov2Config"}
    peaks = {key: peak_memory(MEMORY.format(model=text, size=size)) for key, text in classes.items()}
    value = peaks["specialised"] / peaks["transformers"]
    return row(f"ViT-{name} peak memory of training / transformers", value, "<= 1.05")


def compiled_forward(name: str, made: dict[str, torch.nn.Module], pixels: torch.Tensor, rounds: int) -> dict:
    runs = {key: forward_only(torch.compile(made[key].eval()), pixels) for key in ("specialised", "transformers")}
    value = ratio(interleaved(runs, rounds), "specialised", "transformers")
    return row(f"ViT-{name} compiled forward / transformers", value, "<= 1.02")


def early_stop(size: dict, rounds: int) -> list[dict]:
    """A backbone asked for layer 3 of 12 against its own full forward, and transformers' backbone likewise."""
    pixels, runs = torch.randn(8, 3, 224, 224), {}
    last = size.get("num_hidden_layers", 12)
    for key, backbone, config in (
        ("ours", SpecializedViTBackbone, SpecializedViTConfig),
        ("transformers", Dinov2Backbone, Dinov2Config),
    ):
        for layer in (3, last):
            runs[f"{key}-{layer}"] = forward_only(
                backbone(config(**size, **COMMON, out_indices=[layer])).eval(), pixels
            )
    seconds = interleaved(runs, rounds)
    return [
        row("backbone, layer 3 of 12 / own full forward", ratio(seconds, "ours-3", f"ours-{last}"), "<= 0.30"),
        row("transformers' backbone, layer 3 / full", ratio(seconds, "transformers-3", f"transformers-{last}")),
        row("our layer 3 / transformers' layer 3", ratio(seconds, "ours-3", "transformers-3"), "<= 0.30"),
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, help="of every size")
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--tiny", action="store_true", help="a dry run in seconds; its figures say nothing")
    args = parser.parse_args()
    torch.set_num_threads(2)
    if args.tiny:
        print(*measure("tiny", TINY, 1), *early_stop(TINY, 1), sep="\n")
        return
    for name in args.sizes:
        write_results(f"specialized_vit_{name}", measure(name, SIZES[name], args.rounds or ROUNDS[name]))
    write_results("early_stop", early_stop(SIZES["small"], args.rounds or ROUNDS["small"]))


if __name__ == "__main__":
    main()
