"""Train an image classifier on folders of classes or a dataset of the Hub.

    python examples/train_classification.py --tiny
    python examples/train_classification.py --data clothes/ --encoder facebook/dinov2-small --mode lora --steps 500

A folder holds `train/` and `validation/`, with a folder of pictures per class. `--resume` goes on with a killed run.
"""

import argparse
from pathlib import Path

from transformers import ViTImageProcessorPil, set_seed
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # top-level, 5.13 wants torchvision

from vitweave.configuration.configuration_specialized_vit import SpecializedViTConfig
from vitweave.hub.run_card import save_run_card
from vitweave.modeling.modeling_specialized_vit import SpecializedViTForImageClassification
from vitweave.processing.crop_augmentation import ClassificationAugmentation
from vitweave.training.class_pictures import write_predictions
from vitweave.training.classification import train_classification
from vitweave.training.classification_data import ImageClassificationDataset, open_parts
from vitweave.training.parameter_groups import find_encoder
from vitweave.training.synthetic_classes import SyntheticClasses

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", help="folder with train/ and validation/, or the id of a dataset")
parser.add_argument("--encoder", help="a ViT to specialise (folder or id)")
parser.add_argument("--mode", default="full", choices=["frozen", "lora", "full"], help="what is trained")
parser.add_argument("--size", type=int, default=224, help="height and width in pixels")
parser.add_argument("--steps", type=int, default=500)
parser.add_argument("--eval-every", type=int, default=100, help="steps between evaluations and checkpoints")
parser.add_argument("--batch-size", type=int, default=16)
parser.add_argument("--lr", type=float, default=3e-4)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--cache-features", help="with --mode frozen: keep its features here, and do not augment")
parser.add_argument("--out", default="runs/classification")
parser.add_argument("--resume", action="store_true")
parser.add_argument("--tiny", action="store_true", help="a dry run on synthetic shapes, in seconds")
args = parser.parse_args()
set_seed(args.seed)

# 1. Pictures and classes; crops and flips differ in every epoch, and only with epoch, picture and seed
args.size, args.steps, args.eval_every = (32, 20, 10) if args.tiny else (args.size, args.steps, args.eval_every)
size = {"height": args.size, "width": args.size}
drawn = ClassificationAugmentation(args.size, scale=(0.35, 1.0), color_jitter=0.2, seed=args.seed)
augmentation = None if args.cache_features else drawn
if args.tiny:
    processor = ViTImageProcessorPil(size=size)
    train = ImageClassificationDataset(SyntheticClasses(32), processor, augmentation)
    val = ImageClassificationDataset(SyntheticClasses(12, seed=1), processor)
else:
    processor = AutoImageProcessor.from_pretrained(args.encoder, size=size, do_center_crop=False)
    train, val = open_parts(args.data, processor, augmentation)
labels = {"id2label": train.id2label, "label2id": {name: index for index, name in train.id2label.items()}}

# 2. A specialised ViT, converted from a pretrained one or a small one anew, with a classifier on its class token
if args.tiny:
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 8, "image_size": 32}
    model = SpecializedViTForImageClassification(SpecializedViTConfig(**small, qkv_blocks="all", **labels))
else:
    model = SpecializedViTForImageClassification.from_vit(args.encoder, num_labels=len(train.id2label), **labels)

# 3. Train the classifier alone, with LoRA on the [CLS] path, or everything
find_encoder(model).requires_grad_(args.mode != "frozen")
if args.mode == "lora":
    from peft import get_peft_model

    from vitweave.training.lora import lora_config

    model = get_peft_model(model, lora_config(model, preset="cls"))
options = {"max_steps": args.steps, "save_strategy": "steps", "save_steps": args.eval_every, "seed": args.seed}
options |= {"per_device_train_batch_size": args.batch_size, "cache_features": args.cache_features}
metrics = train_classification(model, train, val, processor, args.out, args.resume, learning_rate=args.lr, **options)

# 4. Draw what the best checkpoint says, and tell what came out, on its card too
write_predictions(Path(args.out, "predictions.png"), model, val)
print({name: round(value, 4) for name, value in metrics.items()})
if not args.tiny and Path(args.data).is_dir():
    save_run_card(args.out, args.data, "validation", [("accuracy", metrics["accuracy"], {})])
