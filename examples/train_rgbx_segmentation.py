"""Train a segmentation model on RGB and another sensor, fused inside the blocks of one shared encoder.

    python examples/train_rgbx_segmentation.py --tiny
    python examples/train_rgbx_segmentation.py --data nyu/ --encoder facebook/dinov2-small --fusion gemini \
        --depth_scale 0.001 --modality_dropout 0.3

A folder holds `rgb/`, `depth/` and `label/` with files of one name, `train.txt` and `val.txt` with the names of each
part, and `meta.json` with id2label. At the end the model is evaluated, and one that was trained with
`--modality_dropout` on every subset of the sensors.
"""

import itertools
import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from transformers import HfArgumentParser, SegformerConfig, set_seed
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # top-level, 5.13 wants torchvision

from vitweave.configuration.configuration_modality_fusion import ModalityFusionConfig
from vitweave.hub.run_card import save_run_card
from vitweave.modeling.modality_fusion.registry import MODALITY_FUSIONS
from vitweave.modeling.modeling_modality_fusion import ModalityFusionForSemanticSegmentation
from vitweave.processing.image_processing_pil_modality import ModalityImageProcessorPil
from vitweave.training.modality_data import (
    ModalityAugmentation,
    ModalityDataset,
    ModalityFolder,
    predict_modalities,
)
from vitweave.training.modality_evaluation import evaluate_modalities
from vitweave.training.pictures import evenly_spread, write_prediction_rows
from vitweave.training.segmentation import train_segmentation
from vitweave.training.segmentation_data import balanced_class_weights, read_id2label


@dataclass
class Arguments:
    data: str = field(default="", metadata={"help": "folder with rgb/, depth/, label/, train.txt, val.txt, meta.json"})
    test: str = field(default="", metadata={"help": "a folder like it with test.txt, to report on once"})
    modalities: list[str] = field(default_factory=lambda: ["rgb", "depth"], metadata={"help": "the first is the main"})
    depth_scale: float = field(default=0.001, metadata={"help": "metres = stored * depth_scale + depth_offset"})
    depth_offset: float = 0.0
    max_depth: float = field(default=10.0, metadata={"help": "metres that become 1"})
    encoder: str = field(default="", metadata={"help": "a ViT, SegFormer or Swin (folder or id); empty: MiT-B0 anew"})
    start: str = field(default="", metadata={"help": "a model trained here, which gets the fusion instead of its own"})
    fusion: str = field(default="gemini", metadata={"help": "or none", "choices": ["none", *MODALITY_FUSIONS]})
    fusion_options: str = field(default="{}", metadata={"help": "JSON"})
    modality_dropout: float = field(default=0.0, metadata={"help": "probability that a sensor is left out"})
    balance: float = field(default=0.0, metadata={"help": "classes weigh as their pixels to the power of minus this"})
    size: list[int] = field(default_factory=lambda: [192, 256], metadata={"help": "height and width in pixels"})
    crop: list[int] = field(default_factory=list, metadata={"help": "train on crops of this height and width"})
    bf16: bool = field(default=False, metadata={"help": "train in bfloat16 where that is safe"})
    steps: int = 1000
    eval_every: int = 200
    batch_size: int = 8
    lr: float = 3e-4
    encoder_lr_scale: float = 0.1
    seed: int = 0
    out: str = "runs/rgbx"
    resume: bool = False
    tiny: bool = field(default=False, metadata={"help": "a dry run on drawn scenes, in seconds"})


def draw_scenes(folder: Path, count: int = 24):
    """Squares of three classes whose colour says nothing, but whose depth does; half of them by name for training."""
    rng = np.random.default_rng(0)
    for name in ("rgb", "depth", "label"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for index in range(count):
        rgb = rng.integers(0, 256, (32, 48, 3), dtype=np.uint8)
        label, depth = np.zeros((32, 48), dtype=np.uint8), np.full((32, 48), 8000, dtype=np.uint16)
        for kind in (1, 2):
            top, left = rng.integers(0, 20), rng.integers(0, 36)
            label[top : top + 12, left : left + 12], depth[top : top + 12, left : left + 12] = kind, 2000 * kind
        for name, array in (("rgb", rgb), ("depth", depth), ("label", label)):
            PIL.Image.fromarray(array).save(folder / name / f"{index:02d}.png")
    names = [f"{index:02d}\n" for index in range(count)]
    (folder / "train.txt").write_text("".join(names[: count * 2 // 3]))
    (folder / "val.txt").write_text("".join(names[count * 2 // 3 :]))
    (folder / "meta.json").write_text(json.dumps({"id2label": {"0": "ground", "1": "near", "2": "middle"}}))


def write_pictures(path: Path, model, processor, val: ModalityDataset, count: int = 6):
    """Rows of the picture, the true and the predicted classes, of scenes spread evenly over the data."""
    rows = evenly_spread(len(val), count)
    scenes = [val.samples[row]["images"] for row in rows]
    guesses = [predict_modalities(model, processor, **images).cpu() for images in scenes]
    pictures, truths = [PIL.Image.open(images["rgb"]) for images in scenes], [val[row]["labels"] for row in rows]
    write_prediction_rows(path, pictures, truths, guesses, model.config.num_labels)


def main() -> dict[str, float]:
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    if args.tiny:
        args.size, args.batch_size, args.steps, args.eval_every, args.lr = [32, 48], 4, 40, 20, 2e-3
        args.data = tempfile.mkdtemp()
        draw_scenes(Path(args.data))
    elif not args.data:
        raise SystemExit("--data is missing: give a folder, or --tiny")
    set_seed(args.seed)

    # 1. Sensors by name, each in its unit; one geometry for all
    depth = {"encoding": "metres", "scale": args.depth_scale, "offset": args.depth_offset, "invalid": 0}
    known = {"rgb": {"encoding": "rgb"}, "depth": depth | {"value_range": [0.0, args.max_depth]}}
    look = {}
    if args.encoder:  # every sensor in the range in which the encoder has learnt to see
        pictures = AutoImageProcessor.from_pretrained(args.encoder)
        look = {"mean": pictures.image_mean, "std": pictures.image_std}
    sensors = {name: known.get(name, {"encoding": "picture"}) | look for name in args.modalities}
    processor = ModalityImageProcessorPil(sensors, size={"height": args.size[0], "width": args.size[1]})

    def part(folder: str, name: str, augmentation=None) -> ModalityDataset:
        samples = ModalityFolder(folder, args.modalities, names=Path(folder, f"{name}.txt"))
        return ModalityDataset(samples, processor, augmentation)

    augmentation = ModalityAugmentation(crop_size=tuple(args.crop) or None, seed=args.seed)
    train, val = part(args.data, "train", augmentation), part(args.data, "val")
    id2label = read_id2label(args.data)
    if id2label is None:
        raise SystemExit(f'expected {args.data}/meta.json with the class names: {{"id2label": {{"0": "wall", ...}}}}')

    # 2. One encoder for all sensors, with a norm for each, and the fusion in its blocks
    options = {
        "modalities": args.modalities,
        "fusion_type": None if args.fusion == "none" or len(args.modalities) == 1 else args.fusion,
        "fusion_options": json.loads(args.fusion_options),
        "modality_dropout": args.modality_dropout,
        "id2label": id2label,
        "label2id": {name: index for index, name in id2label.items()},
    }
    if args.balance:
        label_maps = (train.samples[index]["label"] for index in range(len(train)))
        options["class_weights"] = balanced_class_weights(label_maps, len(id2label), args.balance)
    if args.start:
        started = ModalityFusionForSemanticSegmentation.from_pretrained(args.start)
        changes = {name: options[name] for name in ("fusion_options", "modality_dropout")}
        model = started.with_fusion(options["fusion_type"], **changes)
    elif args.encoder:
        model = ModalityFusionForSemanticSegmentation.from_encoder(args.encoder, **options)
    else:
        small = {"hidden_sizes": [16, 32, 40, 64], "depths": [1] * 4, "num_attention_heads": [1, 2, 4, 8]}
        stream = SegformerConfig(**small) if args.tiny else SegformerConfig()
        model = ModalityFusionForSemanticSegmentation(ModalityFusionConfig(stream_config=stream, **options))

    # 3. Train, keep the best checkpoint by mean IoU, and report, on its card too
    arguments = {"max_steps": args.steps, "save_strategy": "steps", "save_steps": args.eval_every, "seed": args.seed}
    arguments |= {"learning_rate": args.lr, "per_device_train_batch_size": args.batch_size, "bf16": args.bf16}
    metrics = train_segmentation(
        model, train, val, processor, args.out, args.resume, args.encoder_lr_scale, **arguments
    )
    report = part(args.test, "test") if args.test else val
    sizes = range(1 if args.modality_dropout > 0 else len(sensors), len(sensors) + 1)
    subsets = [kept for n in sizes for kept in itertools.combinations(sensors, n)]
    for kept in subsets:
        with torch.autocast(model.device.type, torch.bfloat16, enabled=args.bf16):
            metrics[f"mean_iou_{'+'.join(kept)}"] = evaluate_modalities(model, report, kept)["mean_iou"]
    if "rgb" in sensors:
        write_pictures(Path(args.out, "predictions.png"), model, processor, val)
    print(
        {
            name: round(value, 4)
            for name, value in metrics.items()
            if name.startswith(("mean_iou", "pixel", "train_loss"))
        }
    )
    found = [("mean_iou", metrics[f"mean_iou_{'+'.join(kept)}"], {"keep": list(kept)}) for kept in subsets]
    save_run_card(args.out, args.test or args.data, "test" if args.test else "val", found)
    return metrics


if __name__ == "__main__":
    main()
