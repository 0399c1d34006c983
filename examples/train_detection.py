"""Train a stock RT-DETR over a pyramid of the layers of a specialised ViT, on boxes read off class maps.

    python examples/train_detection.py --tiny
    python examples/train_detection.py --data examples/data/cells --border 2 --steps 1000
    python examples/train_detection.py --data cells/ --border 2 --encoder facebook/dinov2-small --patch 14

A folder holds `train/` and `val/`, each with `image/` and `label/`. Every connected component of class 1 is an object;
`--border` names the class of the pixels that keep touching objects apart. Needs the extra `detection`.
A killed run goes on with the same command and `--resume`.
"""

from dataclasses import dataclass, field
from pathlib import Path

from transformers import HfArgumentParser, RTDetrConfig, RTDetrForObjectDetection, set_seed
from transformers.models.rt_detr.image_processing_pil_rt_detr import RTDetrImageProcessorPil

from vitweave.configuration.configuration_specialized_vit import SpecializedViTConfig
from vitweave.modeling.modeling_layer_fusion import LayerFusionBackbone
from vitweave.modeling.modeling_specialized_vit import SpecializedViTModel
from vitweave.processing.augmentation import SegmentationAugmentation
from vitweave.training.detection import train_detection
from vitweave.training.detection_data import DetectionDataset
from vitweave.training.detection_pictures import write_detections
from vitweave.training.synthetic_shapes import SyntheticShapes


@dataclass
class Arguments:
    data: str = field(default="", metadata={"help": "folder with train/ and val/"})
    name: str = field(default="nucleus", metadata={"help": "what the objects of class 1 are called"})
    border: int = field(default=0, metadata={"help": "class of the pixels around every object; 0: there is none"})
    encoder: str = field(default="", metadata={"help": "a ViT to specialise (folder or id); empty: a small one anew"})
    patch: int = field(default=8, metadata={"help": "patch size of the ViT; the pyramid has half, one and two of it"})
    width: int = field(default=64, metadata={"help": "channels of the pyramid and of the detector"})
    size: int = field(default=256, metadata={"help": "side of the pictures in pixels"})
    queries: int = field(default=150, metadata={"help": "objects that can be found in one picture"})
    steps: int = 1000
    eval_every: int = field(default=200, metadata={"help": "steps between evaluations and checkpoints"})
    batch_size: int = 8
    lr: float = 5e-4
    encoder_lr_scale: float = field(default=1.0, metadata={"help": "0.1 for a pretrained encoder"})
    bf16: bool = field(default=False, metadata={"help": "train in bfloat16 where that is safe"})
    workers: int = 0
    seed: int = 0
    out: str = "runs/detection"
    resume: bool = False
    tiny: bool = field(default=False, metadata={"help": "a dry run on synthetic shapes, in seconds"})


def main() -> dict[str, float]:
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    if args.tiny:
        args.size, args.width, args.queries, args.batch_size = 32, 32, 8, 4
        args.steps, args.eval_every = 20, 10
    elif not args.data:
        raise SystemExit("--data is missing: give a folder or --tiny")
    set_seed(args.seed)

    # 1. Pictures and class maps; the boxes are read off the augmented map, so they fit whatever was cropped or turned
    processor = RTDetrImageProcessorPil(size={"height": args.size, "width": args.size}, do_normalize=True)
    # (boxes are learnt as parts of the picture: crops of another size than it would teach wrong ones)
    augmentation = SegmentationAugmentation(
        args.size, scale=(0.8, 1.25), vertical_flip=0.5, rotate=True, color_jitter=0.25, seed=args.seed, ignore_index=0
    )
    if args.tiny:
        id2label, options = {0: "disc", 1: "square"}, {"classes": {1: 0, 2: 1}}
        train = DetectionDataset(SyntheticShapes(32), processor, augmentation, **options)
        val = DetectionDataset(SyntheticShapes(8, seed=1), processor, **options)
    else:
        id2label, options = {0: args.name}, {"classes": {1: 0}, "border": args.border or None}
        train = DetectionDataset.from_folder(Path(args.data, "train"), processor, augmentation, **options)
        val = DetectionDataset.from_folder(Path(args.data, "val"), processor, **options)

    # 2. A specialised ViT, and a pyramid of its layers: RT-DETR needs maps of three sizes, which a ViT alone has not
    if args.encoder:
        encoder = SpecializedViTModel.from_vit(args.encoder)
    else:
        small = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 6, "image_size": args.size}
        encoder = SpecializedViTModel(SpecializedViTConfig(**small, patch_size=args.patch, qkv_blocks="all"))
    pyramid = {"scales": [2, 1, 0.5], "out_channels": args.width}
    backbone = LayerFusionBackbone.from_encoder(encoder, layers="thirds", fusion_type="fpn", fusion_options=pyramid)

    # 3. The stock detector over it: built from its config, then given its weights
    config = RTDetrConfig(
        backbone_config=backbone.config,
        feat_strides=[args.patch // 2, args.patch, args.patch * 2],
        encoder_in_channels=[args.width] * 3,
        encoder_hidden_dim=args.width,
        decoder_in_channels=[args.width] * 3,
        d_model=args.width,
        encoder_ffn_dim=args.width * 4,
        decoder_ffn_dim=args.width * 4,
        decoder_layers=3,
        num_queries=args.queries,
        id2label=id2label,
    )
    model = RTDetrForObjectDetection(config)
    model.model.backbone.model.load_state_dict(backbone.state_dict())

    # 4. Train, keep the best checkpoint by COCO's mAP, draw what it finds, and print what came out
    metrics = train_detection(
        model,
        train,
        val,
        processor,
        output_dir=args.out,
        resume=args.resume,
        max_detections=args.queries,
        encoder_lr_scale=args.encoder_lr_scale,
        bf16=args.bf16,
        max_steps=args.steps,
        save_strategy="steps",
        save_steps=args.eval_every,
        learning_rate=args.lr,
        per_device_train_batch_size=args.batch_size,
        dataloader_num_workers=args.workers,
        seed=args.seed,
    )
    write_detections(Path(args.out, "boxes.png"), model, val)
    print({name: round(value, 4) for name, value in metrics.items()})
    return metrics


if __name__ == "__main__":
    main()
