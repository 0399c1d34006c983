"""Train a segmentation model on a folder of images or a dataset of the Hub.

    python examples/train_segmentation.py --tiny
    python examples/train_segmentation.py --data cells/ --encoder facebook/dinov2-small --mode lora --steps 2000

A folder holds `train/` and `val/`, each with `image/` and `label/`, and perhaps `meta.json` with the class names.
A killed run goes on with the same command and `--resume`, and ends with the same weights.
"""

from dataclasses import dataclass, field
from pathlib import Path

from transformers import HfArgumentParser, set_seed

from vitweave.configuration.configuration_specialized_vit import SpecializedViTConfig
from vitweave.hub.run_card import save_run_card
from vitweave.modeling.modeling_dense_predictor import DensePredictorForSemanticSegmentation
from vitweave.modeling.modeling_specialized_vit import SpecializedViTBackbone
from vitweave.processing.augmentation import SegmentationAugmentation
from vitweave.processing.image_processing_pil_segmentation import SegmentationImageProcessorPil
from vitweave.training.segmentation import train_segmentation
from vitweave.training.segmentation_data import SegmentationDataset, read_id2label
from vitweave.training.synthetic_shapes import SyntheticShapes


@dataclass
class Arguments:
    data: str = field(default="", metadata={"help": "folder with train/ and val/, or the id of a dataset"})
    num_labels: int = field(default=0, metadata={"help": "number of classes, where no meta.json names them"})
    label_column: str = field(default="label", metadata={"help": "column of the class maps in a dataset of the Hub"})
    encoder: str = field(default="", metadata={"help": "a ViT to specialise (folder or id); empty: a small one anew"})
    layers: list[int] = field(default_factory=lambda: [3, 6, 9, 12], metadata={"help": "layers the head reads"})
    mode: str = field(default="full", metadata={"help": "what is trained", "choices": ["frozen", "lora", "full"]})
    size: list[int] = field(default_factory=lambda: [224, 224], metadata={"help": "height and width in pixels"})
    steps: int = 1000
    eval_every: int = field(default=200, metadata={"help": "steps between evaluations and checkpoints"})
    batch_size: int = 16
    lr: float = 1e-3
    workers: int = 2
    seed: int = 0
    out: str = "runs/segmentation"
    resume: bool = False
    cache_features: str = field(
        default="", metadata={"help": "folder for a frozen encoder's features; no augmentation"}
    )
    tiny: bool = field(default=False, metadata={"help": "a dry run on synthetic shapes, in seconds"})


def main() -> dict[str, float]:
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    if args.tiny:
        args.layers, args.size, args.batch_size, args.workers = [1, 2], [32, 32], 4, 0
        args.steps, args.eval_every = 20, 10
    elif not args.data:
        raise SystemExit("--data is missing: give a folder, the id of a dataset, or --tiny")
    set_seed(args.seed)

    # 1. Images and class maps; crops, flips and colours differ in every epoch, and only with epoch, image and seed
    height, width = args.size
    processor = SegmentationImageProcessorPil(size={"height": height, "width": width})
    augmentation = SegmentationAugmentation(crop_size=(height, width), color_jitter=0.25, seed=args.seed)
    if args.cache_features:  # features that are computed once are those of the images as they are
        augmentation = None
    if args.tiny:
        id2label = SyntheticShapes.id2label
        train = SegmentationDataset(SyntheticShapes(32), processor, augmentation)
        val = SegmentationDataset(SyntheticShapes(8, seed=1), processor)
    elif Path(args.data).is_dir():
        id2label = read_id2label(args.data)
        train = SegmentationDataset.from_folder(Path(args.data, "train"), processor, augmentation)
        val = SegmentationDataset.from_folder(Path(args.data, "val"), processor)
    else:
        id2label, columns = None, {"label_column": args.label_column}
        train = SegmentationDataset.from_hub(args.data, "train", processor, augmentation, **columns)
        val = SegmentationDataset.from_hub(args.data, "validation", processor, **columns)
    if not id2label and args.num_labels < 2:
        raise SystemExit(f"--num_labels is missing: {args.data} has no meta.json that names the classes")
    id2label = id2label or {index: str(index) for index in range(args.num_labels)}

    # 2. A specialised ViT: converted from a pretrained one, or a small one from scratch
    if args.encoder:
        backbone = SpecializedViTBackbone.from_vit(args.encoder, out_indices=args.layers)
    else:
        small = {"hidden_size": 64, "num_attention_heads": 4, "patch_size": 8, "image_size": args.size}
        depth = max(args.layers)
        config = SpecializedViTConfig(**small, num_hidden_layers=depth, qkv_blocks="all", out_indices=args.layers)
        backbone = SpecializedViTBackbone(config)

    # 3. A linear head on the chosen layers; train it alone, with LoRA on the [CLS] path, or everything
    model = DensePredictorForSemanticSegmentation.from_backbone(
        backbone, id2label=id2label, freeze_backbone=args.mode == "frozen"
    )
    if args.mode == "lora":
        from peft import get_peft_model

        from vitweave.training.lora import lora_config

        model = get_peft_model(model, lora_config(model, preset="cls"))

    # 4. Train, keep the best checkpoint by mean IoU, and tell what came out, on its card too
    metrics = train_segmentation(
        model,
        train,
        val,
        processor,
        output_dir=args.out,
        resume=args.resume,
        cache_features=args.cache_features or None,
        max_steps=args.steps,
        save_strategy="steps",
        save_steps=args.eval_every,
        learning_rate=args.lr,
        per_device_train_batch_size=args.batch_size,
        dataloader_num_workers=args.workers,
        seed=args.seed,
    )
    print({name: round(value, 4) for name, value in metrics.items()})
    if not args.tiny and Path(args.data).is_dir():
        save_run_card(args.out, args.data, "val", [("mean_iou", metrics["mean_iou"], {})])
    return metrics


if __name__ == "__main__":
    main()
