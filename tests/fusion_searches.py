"""Folders with drawn data and tiny encoders, as `vitweave search-fusion` reads them."""

import json

import numpy as np
import PIL.Image
from tiny_encoders import build
from transformers import ViTImageProcessorPil

from vitweave.training.synthetic_classes import SyntheticClasses
from vitweave.training.synthetic_shapes import SyntheticDepth, SyntheticShapes

COUNTS = {"train": 10, "val": 4}


def encoder_folder(folder, name="vit", size=32, mean=0.5, pooler=False):
    """A tiny encoder with its processor, like most of the Hub's without weights of a pooler."""
    model = build(name)
    if not pooler:
        model.pooler = None
    model.save_pretrained(folder / name)
    processor = ViTImageProcessorPil(size={"height": size, "width": size}, image_mean=[mean] * 3)
    processor.save_pretrained(folder / name)
    return str(folder / name)


def write_pair(folder, name, image, own_map, kind):
    for part, picture in (("image", image), (kind, own_map)):
        (folder / part).mkdir(parents=True, exist_ok=True)
        picture.save(folder / part / f"{name}.png")


def data_folder(folder, task):
    """Drawn images of a task: a folder per part."""
    for seed, (part, count) in enumerate(COUNTS.items()):
        for index in range(count):
            where = folder / part
            if task == "classification":
                sample = SyntheticClasses(count, seed=seed)[index]
                where = where / SyntheticClasses.id2label[sample["label"]]
                where.mkdir(parents=True, exist_ok=True)
                sample["image"].save(where / f"{index}.png")
            elif task == "segmentation":
                sample = SyntheticShapes(count, seed=seed)[index]
                write_pair(where, str(index), sample["image"], sample["label"], "label")
            else:
                sample = SyntheticDepth(count, seed=seed)[index]
                millimetres = PIL.Image.fromarray((1000 * sample["depth"]).astype(np.uint16))
                write_pair(where, str(index), sample["image"], millimetres, "depth")
    if task == "segmentation":
        names = {str(index): name for index, name in SyntheticShapes.id2label.items()}
        (folder / "meta.json").write_text(json.dumps({"id2label": names}))
    return str(folder)
