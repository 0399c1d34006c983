"""Train a depth model on a folder of images with depth maps.

    python examples/train_depth.py --tiny
    python examples/train_depth.py --data nyu/ --encoder facebook/dinov2-small --head dpt --depth_scale 0.001

A folder holds `train/` and `val/`, each with `rgb/` and `depth/`; or `rgb/` and `depth/` for all, with the names of
each part in `train.txt` and `val.txt`. With `--mode frozen --cache_features FOLDER` every image is encoded once.
`--layer_fusion concat --fusion_options '{"dense": true}'` fuses the layers first; the fusion then trains with the head.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import HfArgumentParser, set_seed

from vitweave.configuration.configuration_specialized_vit import SpecializedViTConfig
from vitweave.hub.run_card import save_run_card
from vitweave.modeling.modeling_depth import DensePredictorForDepthEstimation
from vitweave.modeling.modeling_layer_fusion import LayerFusionBackbone
from vitweave.modeling.modeling_specialized_vit import SpecializedViTBackbone, SpecializedViTModel
from vitweave.processing.image_processing_pil_depth import DepthImageProcessorPil
from vitweave.training.depth import train_depth
from vitweave.training.depth_data import DepthDataset, DepthFolderSamples
from vitweave.training.depth_evaluation import evaluate_depth, predict_depth
from vitweave.training.mirrored_samples import MirroredSamples
from vitweave.training.paired_data import place_of_part
from vitweave.training.pictures import write_depth_rows
from vitweave.training.synthetic_shapes import SyntheticDepth

SPLITS = ("train", "val")


@dataclass
class Arguments:
    data: str = field(default="", metadata={"help": "folder with train/ and val/, or with train.txt and val.txt"})
    test: str = field(default="", metadata={"help": "a folder like it with test/ or test.txt, to report on once"})
    depth_scale: float = field(default=0.001, metadata={"help": "metres = stored * depth_scale + depth_offset"})
    depth_offset: float = 0.0
    max_depth: float = field(default=10.0, metadata={"help": "metres the model can predict at most"})
    encoder: str = field(default="", metadata={"help": "a ViT to specialise (folder or id); empty: a small one anew"})
    layers: list[int] = field(default_factory=lambda: [3, 6, 9, 12], metadata={"help": "layers the head reads"})
    layer_fusion: str = field(default="", metadata={"help": "fuse the layers to one map: concat, weighted_sum, ..."})
    fusion_options: str = field(default="{}", metadata={"help": 'JSON; most fusions need {"dense": true}'})
    head: str = field(default="linear", metadata={"choices": ["linear", "dpt", "regression"]})
    head_options: str = field(default="{}", metadata={"help": 'JSON, e.g. {"use_batch_norm": true}'})
    mode: str = field(default="frozen", metadata={"help": "what is trained", "choices": ["frozen", "lora", "full"]})
    cache_features: str = field(default="", metadata={"help": "folder for the features of a frozen encoder"})
    protocol: str = "nyu"
    size: list[int] = field(default_factory=lambda: [192, 256], metadata={"help": "height and width in pixels"})
    steps: int = 1000
    eval_every: int = 200
    batch_size: int = 16
    lr: float = 1e-3
    seed: int = 0
    out: str = "runs/depth"
    resume: bool = False
    tiny: bool = field(default=False, metadata={"help": "a dry run on synthetic shapes, in seconds"})


def samples(folder: str, part: str) -> DepthFolderSamples:
    """One part of a folder, whether it has a folder or a list of names of its own."""
    return DepthFolderSamples(*place_of_part(Path(folder), part))


def main() -> dict[str, float]:
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    if args.tiny:
        args.layers, args.size, args.batch_size, args.steps, args.eval_every = [1, 2], [32, 32], 4, 20, 10
    elif not args.data:
        raise SystemExit("--data is missing: give a folder, or --tiny")
    set_seed(args.seed)

    # 1. Images and depth, every training image as it is and mirrored: the same in every epoch, so that it can be cached
    scale, offset = (1.0, 0.0) if args.tiny else (args.depth_scale, args.depth_offset)
    size = {"height": args.size[0], "width": args.size[1]}
    # no map reaches twice the largest depth, unless it is in another unit: that ends in an error
    known = {"depth_scale": scale, "depth_offset": offset, "depth_range": (0.0, 2 * args.max_depth)}
    processor = DepthImageProcessorPil(size=size, **known)
    shapes = SyntheticDepth(32), SyntheticDepth(8, seed=1)
    train, val = shapes if args.tiny else (samples(args.data, part) for part in SPLITS)
    train, val = DepthDataset(MirroredSamples(train), processor), DepthDataset(val, processor)

    # 2. A specialised ViT, its features without the final norm as DINOv2's depth heads read them
    if args.encoder:
        backbone = SpecializedViTBackbone.from_vit(args.encoder, out_indices=args.layers, apply_layernorm=False)
    else:
        small = {"hidden_size": 64, "num_attention_heads": 4, "patch_size": 8, "image_size": args.size}
        depth = max(args.layers)
        config = SpecializedViTConfig(**small, num_hidden_layers=depth, qkv_blocks="all", out_indices=args.layers)
        backbone = SpecializedViTBackbone(config)
    head_options = json.loads(args.head_options)
    if args.layer_fusion:
        head_options = {"use_cls_token": False} | head_options  # a fused map has no class token beside it
        encoder = SpecializedViTModel.from_vit(args.encoder) if args.encoder else SpecializedViTModel(config)
        options = json.loads(args.fusion_options)
        backbone = LayerFusionBackbone.from_encoder(
            encoder, layers=args.layers, fusion_type=args.layer_fusion, fusion_options=options
        )

    # 3. A depth head; train it alone, with LoRA on the [CLS] path, or everything
    model = DensePredictorForDepthEstimation.from_backbone(
        backbone,
        head_type=args.head,
        head_options=head_options,
        max_depth=args.max_depth,
        losses={"sig": 1.0, "gradient": 0.5},
        loss_options={"sig": {"warm_up_steps": 100}},
        freeze_backbone=args.mode == "frozen",
    )
    if args.mode == "lora":
        from peft import get_peft_model

        from vitweave.training.lora import lora_config

        model = get_peft_model(model, lora_config(model, preset="cls"))

    # 4. Train, keep the best checkpoint by AbsRel, look at it, and tell what came out, on its card too
    arguments = {"max_steps": args.steps, "save_strategy": "steps", "save_steps": args.eval_every, "seed": args.seed}
    arguments |= {"learning_rate": args.lr, "per_device_train_batch_size": args.batch_size}
    cache, out = args.cache_features or None, Path(args.out)
    metrics = train_depth(
        model, train, val, processor, out, args.protocol, resume=args.resume, cache_features=cache, **arguments
    )
    report = DepthDataset(samples(args.test, "test"), processor) if args.test else val
    shown = range(0, len(report), max(1, len(report) // 6))
    with torch.no_grad():
        pixel_values = torch.stack([report[index]["pixel_values"] for index in shown]).to(model.device)
        predictions = predict_depth(model.eval(), pixel_values)
    images, truths = [report.samples[i]["image"] for i in shown], [report[i]["labels"] for i in shown]
    write_depth_rows(out / "predictions.png", images, truths, list(predictions))
    if args.test:
        metrics = {f"test_{name}": value for name, value in evaluate_depth(model, report, args.protocol).items()}
    print({name: round(value, 4) if isinstance(value, float) else value for name, value in metrics.items()})
    if not args.tiny:
        place, split, prefix = (args.test, "test", "test") if args.test else (args.data, "val", args.protocol)
        found = [(name, metrics[f"{prefix}_{name}"], {"protocol": args.protocol}) for name in ("abs_rel", "rmse", "a1")]
        save_run_card(out, place, split, found)
    return metrics


if __name__ == "__main__":
    main()
