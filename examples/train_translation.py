"""Train a model that draws the image of one sensor from those of others, fused inside the blocks of one encoder.

    python examples/train_translation.py --tiny
    python examples/train_translation.py --data nyu/ --modalities rgb --target depth --encoder facebook/dinov2-base
    python examples/train_translation.py --data scenes/ --modalities shade texture --target rgb --adversarial

A folder holds a folder per modality and one of the target, with files of one name, and `train.txt` and `val.txt`
with the names of each part. The figures are measured anew at the end, in float32, and stand on the card.
"""

import json
import math
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import PIL.Image
from transformers import AutoImageProcessor, HfArgumentParser, SegformerConfig, set_seed

from vitweave.configuration.configuration_modality_fusion import ModalityFusionConfig
from vitweave.hub.run_card import save_run_card
from vitweave.modeling.modality_fusion.registry import MODALITY_FUSIONS
from vitweave.modeling.modeling_modality_translation import ModalityFusionForImageToImage
from vitweave.processing.image_processing_pil_modality import ModalityImageProcessorPil
from vitweave.training.modality_data import ModalityAugmentation, ModalityFolder
from vitweave.training.translation import train_translation
from vitweave.training.translation_data import TranslationDataset
from vitweave.training.translation_evaluation import evaluate_translation
from vitweave.training.translation_metrics import TRANSLATION_METRICS
from vitweave.training.translation_pictures import write_translations

DEPTH = {"encoding": "metres", "scale": 0.001, "invalid": 0, "value_range": [0.0, 10.0]}
# TokenFusion's generator "b2" (arXiv:2204.08721)
RELEASED = {
    "hidden_sizes": [64, 128, 256, 512, 1024],
    "num_attention_heads": [1, 2, 4, 8, 16],
    "depths": [3, 4, 4, 6, 3],
    "sr_ratios": [16, 8, 4, 2, 1],
}
SMALL = {
    "hidden_sizes": [16, 32, 32, 64, 64],
    "num_attention_heads": [1, 1, 2, 2, 4],
    "depths": [1] * 5,
    "sr_ratios": [4, 2, 1, 1, 1],
}


@dataclass
class Arguments:
    data: str = field(default="", metadata={"help": "folder with a folder per sensor, train.txt and val.txt"})
    modalities: list[str] = field(default_factory=lambda: ["rgb"], metadata={"help": "what the model sees"})
    target: str = field(default="depth", metadata={"help": "what it draws"})
    sensors: str = field(default="{}", metadata={"help": "JSON: modality -> its encoding, where the names do not tell"})
    encoder: str = field(default="", metadata={"help": "a ViT, SegFormer or Swin (folder or id); empty: TokenFusion's"})
    decoder_size: int = field(default=256, metadata={"help": "channels of the decoder over a ViT or Swin"})
    decoder_options: str = field(default="{}", metadata={"help": "JSON: fields of DptNeck, there"})
    stream: str = field(default="{}", metadata={"help": "JSON: fields of SegformerConfig, of an encoder made anew"})
    fusion: str = field(default="token_exchange", metadata={"help": "or none", "choices": ["none", *MODALITY_FUSIONS]})
    fusion_options: str = field(default="{}", metadata={"help": "JSON"})
    adversarial: bool = field(default=False, metadata={"help": "train against a discriminator"})
    modality_dropout: float = field(default=0.0, metadata={"help": "probability that a sensor is left out"})
    size: list[int] = field(default_factory=lambda: [286, 286], metadata={"help": "height and width in pixels"})
    crop: list[int] = field(default_factory=lambda: [256, 256], metadata={"help": "of it, seen in training"})
    steps: int = 20000
    eval_every: int = 1000
    batch_size: int = 4
    bf16: bool = field(default=False, metadata={"help": "train in bfloat16 where that is safe"})
    lr: float = 2e-4
    encoder_lr_scale: float = field(default=1.0, metadata={"help": "of a pretrained encoder, e.g. 0.1"})
    seed: int = 0
    out: str = "runs/translation"
    resume: bool = False
    tiny: bool = field(default=False, metadata={"help": "a dry run on drawn scenes, in seconds"})


def draw_scenes(folder: Path, count: int = 24):
    """Slopes and squares: edges and shades of one depth, of which some pixels were not measured."""
    rng = np.random.default_rng(0)
    for name in ("shade", "edge", "depth"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for index in range(count):
        depth = np.tile(np.linspace(2000, 8000, 48), (32, 1))
        top, left = rng.integers(0, 20), rng.integers(0, 36)
        depth[top : top + 12, left : left + 12] = 1000
        edge = np.hypot(*np.gradient(depth)) > 1000
        depth[0] = 0
        PIL.Image.fromarray(depth.astype(np.uint16)).save(folder / "depth" / f"{index:02d}.png")
        for name, picture in (("shade", 255 - depth / 40), ("edge", 255 * edge)):
            picture = np.repeat(picture.astype(np.uint8)[..., None], 3, axis=2)
            PIL.Image.fromarray(picture).save(folder / name / f"{index:02d}.png")
    names = [f"{index:02d}\n" for index in range(count)]
    (folder / "train.txt").write_text("".join(names[: count * 2 // 3]))
    (folder / "val.txt").write_text("".join(names[count * 2 // 3 :]))


def main() -> dict[str, float]:
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    if args.tiny:
        args.size, args.crop, args.batch_size, args.steps, args.eval_every = [32, 48], [32, 32], 4, 12, 6
        args.data, args.modalities, args.target, args.lr = tempfile.mkdtemp(), ["shade", "edge"], "depth", 2e-3
        draw_scenes(Path(args.data))
    elif not args.data:
        raise SystemExit("--data is missing: give a folder, or --tiny")
    set_seed(args.seed)

    # 1. What the sensors mean, and what is to be drawn
    known = {"rgb": {"encoding": "rgb"}, "depth": DEPTH} | json.loads(args.sensors)
    sensors = {name: known.get(name, {"encoding": "picture"}) for name in [*args.modalities, args.target]}
    look = {}
    if args.encoder:  # every sensor in the range in which the encoder has learnt to see
        pictures = AutoImageProcessor.from_pretrained(args.encoder)
        look = {"mean": pictures.image_mean, "std": pictures.image_std}
    shown = {name: look | sensors[name] for name in args.modalities}
    processor = ModalityImageProcessorPil(shown, size={"height": args.size[0], "width": args.size[1]})

    def part(name: str, augmentation=None) -> TranslationDataset:
        names = Path(args.data, f"{name}.txt")
        samples = ModalityFolder(args.data, list(sensors), label_folder=None, names=names)
        return TranslationDataset(samples, processor, args.target, sensors[args.target], augmentation)

    train, val = part("train", ModalityAugmentation(crop_size=tuple(args.crop), seed=args.seed)), part("val")

    # 2. One encoder for all sensors, with the fusion in the last block of every stage, and a decoder
    options = {
        "modalities": args.modalities,
        "fusion_type": None if args.fusion == "none" or len(args.modalities) == 1 else args.fusion,
        "fusion_options": json.loads(args.fusion_options),
        "modality_dropout": args.modality_dropout,
        "penalty_weight": 0.0 if args.tiny else 1e-3,
        "decoder_hidden_size": args.decoder_size,
        "decoder_options": json.loads(args.decoder_options),
    }
    if args.encoder:
        model = ModalityFusionForImageToImage.from_encoder(args.encoder, **options)
    else:
        sizes = {"num_encoder_blocks": 5, "patch_sizes": [3] * 5, "strides": [2] * 5, "mlp_ratios": [4] * 5}
        stream = SegformerConfig(**(sizes | (SMALL if args.tiny else RELEASED) | json.loads(args.stream)))
        model = ModalityFusionForImageToImage(ModalityFusionConfig(stream_config=stream, **options))

    # 3. Train, keep the best checkpoint by the mean absolute error, look at what it draws, and tell it, on its card too
    arguments = {"max_steps": args.steps, "save_strategy": "steps", "save_steps": args.eval_every, "seed": args.seed}
    arguments |= {"learning_rate": args.lr, "per_device_train_batch_size": args.batch_size, "bf16": args.bf16}
    arguments |= {"encoder_lr_scale": args.encoder_lr_scale}
    metrics = train_translation(model, train, val, processor, args.out, args.resume, args.adversarial, **arguments)
    write_translations(Path(args.out, "drawn.png"), model, val)
    metrics |= evaluate_translation(model, val, args.batch_size)
    print({name: round(metrics[name], 4) for name in ("train_loss", *TRANSLATION_METRICS)})
    if not args.tiny:
        drawn = {"target": args.target, "sensor": sensors[args.target]}
        measured = [name for name in TRANSLATION_METRICS if math.isfinite(metrics[name])]  # sparse maps have no SSIM
        save_run_card(args.out, args.data, "val", [(name, metrics[name], drawn) for name in measured])
    return metrics


if __name__ == "__main__":
    main()
