"""Train a specialised ViT on microscopy images, from scratch, and look at it.    python examples/demo.py --out demo"""

import argparse
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from PIL import ImageOps
from torch import Tensor
from transformers import AutoConfig, AutoModelForSemanticSegmentation, set_seed

from vitweave.analysis.pca import pca_maps
from vitweave.configuration.configuration_specialized_vit import SpecializedViTConfig
from vitweave.hub.card import CardInfo, CardMetric
from vitweave.hub.checksums import sha256
from vitweave.hub.export import export
from vitweave.modeling.modeling_dense_predictor import DensePredictorForSemanticSegmentation
from vitweave.modeling.modeling_specialized_vit import SpecializedViTBackbone
from vitweave.processing.augmentation import SegmentationAugmentation
from vitweave.processing.image_processing_pil_segmentation import SegmentationImageProcessorPil
from vitweave.processing.sliding_window import sliding_window_logits
from vitweave.training.metrics import ConfusionMatrix
from vitweave.training.pictures import class_colours, colour_classes
from vitweave.training.segmentation import train_segmentation
from vitweave.training.segmentation_data import FolderSamples, SegmentationDataset

SPLITS = ("train", "val", "test")
CELLS = Path(__file__).parent / "data" / "cells"
ID2LABEL = {0: "background", 1: "nucleus", 2: "boundary"}
WINDOW = 64  # pixels; what the model sees at once


def otsu_threshold(grey: np.ndarray) -> float:
    """The grey value that parts a picture into the two classes with the largest variance between them (Otsu, 1979)."""
    share = np.bincount(grey.ravel(), minlength=256) / grey.size
    below, mean_below = share.cumsum(), (share * np.arange(256)).cumsum()
    between = (mean_below[-1] * below - mean_below) ** 2 / np.maximum(below * (1 - below), 1e-12)
    return between.argmax() + 0.5


def even_out(picture: PIL.Image.Image) -> PIL.Image.Image:
    """Grey values on the picture's own scale, 0 = background and 1 = threshold, as root, plain and logarithm.

    Exposure differs a hundredfold between the pictures; stained tissue is bright, with dark nuclei.
    """
    grey = np.asarray(picture.convert("L"))
    threshold = otsu_threshold(grey)
    grey, threshold = (255 - grey, 255 - threshold) if (grey > threshold).mean() > 0.5 else (grey, threshold)
    background = np.median(grey[grey < threshold])
    scaled = ((grey - background) / (threshold - background)).clip(-1, 6)
    root, plain, log = np.sign(scaled) * np.abs(scaled) ** 0.5, scaled.clip(-1, 2), np.log1p(scaled.clip(0))
    channels = [(root + 1) / 3.45, (plain + 1) / 3, log / 1.95]  # each from 0 to 1
    return PIL.Image.fromarray((255 * np.stack(channels, axis=-1)).round().astype(np.uint8))


def read(split: str) -> list[dict]:
    """The pictures and class maps of one part, decoded once and kept in memory; `picture` is the untouched one."""
    samples = FolderSamples(CELLS / split)
    return [{**sample, "picture": sample["image"], "image": even_out(sample["image"])} for sample in samples]


def keep_samples(samples: list[dict], folder: Path) -> None:
    """Write the pictures as the model sees them, and the class maps, for `vitweave verify`."""
    for part in ("image", "label"):
        (folder / part).mkdir(parents=True)
        for sample in samples:
            sample[part].save(folder / part / f"{Path(sample['name']).stem}.png")


def otsu(picture: PIL.Image.Image) -> np.ndarray:
    """The baseline without learning: threshold the grey values, take the smaller side for nuclei."""
    grey = np.asarray(picture.convert("L"))
    nucleus = grey > otsu_threshold(grey)
    nucleus = ~nucleus if nucleus.mean() > 0.5 else nucleus  # stained tissue is bright, with dark nuclei
    inner, outer = ~grown(~nucleus), grown(nucleus)  # one pixel inside and one outside: the best rim on the train part
    return np.where(inner, 1, np.where(outer, 2, 0))


def grown(mask: np.ndarray) -> np.ndarray:
    """The mask and its four neighbours."""
    padded = np.pad(mask, 1)
    return mask | padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:]


def make_backbone(encoder: str | None) -> SpecializedViTBackbone:
    """A ViT small enough for two CPU cores, with 4-pixel patches because nuclei are small, or `encoder`."""
    if encoder is not None:
        depth = AutoConfig.from_pretrained(encoder).num_hidden_layers
        return SpecializedViTBackbone.from_vit(encoder, out_indices=[depth // 4, depth // 2, depth * 3 // 4, depth])
    config = SpecializedViTConfig(
        hidden_size=96,
        num_hidden_layers=2,
        num_attention_heads=3,
        patch_size=4,
        image_size=WINDOW,
        qkv_blocks=1,
        position_embedding_type="rotary",  # learns what lies next to what sooner than a learned table
        out_indices=[2],
    )
    return SpecializedViTBackbone(config)


def score(predictions: list, samples: list[dict]) -> dict:
    """mean_iou and per_class_iou over all pixels of the samples."""
    confusion = ConfusionMatrix(len(ID2LABEL))
    for prediction, sample in zip(predictions, samples, strict=True):
        confusion.update(torch.as_tensor(prediction), torch.tensor(np.array(sample["label"])))
    return confusion.compute()


def in_windows(compute: Callable, pixel_values: Tensor, zoom: float) -> Tensor:
    """Maps as large as the images, from overlapping windows of the size the model was trained on."""
    window = round(WINDOW * zoom)
    maps = sliding_window_logits(compute, enlarged(pixel_values, zoom), window, stride=window * 3 // 4, batch_size=32)
    return enlarged(maps, 1 / zoom)


def predict(model, processor, samples: list[dict], zoom: float) -> list[Tensor]:
    """Class maps (height, width)."""
    images = [processor(sample["image"], return_tensors="pt")["pixel_values"] for sample in samples]
    return [in_windows(model, pixel_values, zoom)[0].argmax(dim=0) for pixel_values in images]


def enlarged(maps: Tensor, zoom: float) -> Tensor:
    """Maps (batch, channels, height, width) resized by the factor `zoom`."""
    return maps if zoom == 1 else F.interpolate(maps, scale_factor=zoom, mode="bilinear", antialias=zoom < 1)


@torch.no_grad()
def write_report(path: Path, model, processor, samples: list[dict], predictions: list, zoom: float) -> None:
    """One row per image: picture, truth, prediction, and the first three principal components of the patches."""
    pixel_values = processor([sample["image"] for sample in samples], return_tensors="pt")["pixel_values"]
    features = in_windows(lambda pixels: model.backbone(pixels).feature_maps[-1], pixel_values, zoom)
    features = F.avg_pool2d(features, 4)  # (images, hidden, height / 4, width / 4)
    maps = pca_maps(features.flatten(2).transpose(1, 2), tuple(features.shape[-2:])).maps
    colours = class_colours(len(ID2LABEL))
    rows = []
    for sample, prediction, pca in zip(samples, predictions, maps, strict=True):
        pca = PIL.Image.fromarray((pca * 255).byte().numpy()).resize(sample["image"].size, PIL.Image.Resampling.NEAREST)
        truth = colour_classes(np.array(sample["label"]), colours)
        picture = ImageOps.autocontrast(sample["picture"].convert("RGB"), cutoff=0.1)  # most are nearly black
        rows.append(np.hstack([picture, truth, colour_classes(prediction, colours), pca]))
    PIL.Image.fromarray(np.vstack(rows)).save(path)


def start_afresh(folder: Path) -> None:
    """Empty the folder of an earlier demo; refuse one that holds anything else."""
    mark = folder / ".vitweave-demo"
    if folder.exists() and any(folder.iterdir()) and not mark.exists():
        raise SystemExit(f"{folder} holds other files, which the demo would delete; give a new folder with --out")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    mark.touch()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder that is replaced by the results")
    parser.add_argument("--encoder", help="start from this vanilla ViT (folder or Hub id) instead of from scratch")
    parser.add_argument("--steps", type=int, help="default: 1500 from scratch, 200 from an encoder")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--tiny", action="store_true", help="two steps on a few images")
    args = parser.parse_args()
    steps = 2 if args.tiny else args.steps or (200 if args.encoder else 1500)
    set_seed(0)
    torch.set_num_threads(min(2, torch.get_num_threads()))
    start_afresh(args.out)

    # 1. A specialised ViT under a head with one score per pixel
    backbone = make_backbone(args.encoder)
    zoom = backbone.config.image_size / WINDOW  # an encoder sees the window enlarged to the size it knows
    model = DensePredictorForSemanticSegmentation.from_backbone(
        backbone,
        id2label=ID2LABEL,
        head_type="subpixel",  # the boundary is one pixel wide
        upsampling=4,
        losses={"cross_entropy": 1.0, "dice": 1.0},
        class_weights=[1.0, 1.0, 2.0],
    )

    # 2. Images and masks: random windows, flipped and turned
    train, val, test = (read(split)[: 3 if args.tiny else None] for split in SPLITS)
    processor = SegmentationImageProcessorPil(
        do_resize=False, image_mean=[0.49, 0.57, 0.26], image_std=[0.19, 0.22, 0.34]
    )
    windows = SegmentationAugmentation(round(WINDOW * zoom), scale=(zoom, zoom), vertical_flip=0.5, rotate=True)

    # 3. Train, with the stock Trainer and its progress bar
    train_segmentation(
        model,
        SegmentationDataset(train, processor, windows),
        processor=processor,
        output_dir=args.out / "model",
        max_steps=steps,
        learning_rate=args.learning_rate,
        encoder_lr_scale=0.05 if args.encoder else 1.0,
        per_device_train_batch_size=8,
        save_strategy="no",
        logging_steps=100,
        dataloader_pin_memory=False,
    )

    # 4. Load it back as anybody would, test it, and export it with its code
    model = AutoModelForSemanticSegmentation.from_pretrained(args.out / "model").eval()
    predictions = predict(model, processor, test, zoom)
    result, baseline = score(predictions, test), score([otsu(sample["picture"]) for sample in test], test)
    keep_samples(test, args.out / "cells" / "test")
    options = {"window": WINDOW, "stride": WINDOW * 3 // 4} if zoom == 1 else None  # `verify` does not enlarge
    card = CardInfo(
        model_name="vitweave-demo",
        summary="A small specialised ViT that tells nuclei and their boundaries from the background.",
        license="apache-2.0",
        training_data="104 microscopy images of the 2018 Data Science Bowl (BBBC038, CC0), in examples/data/cells.",
        training_command="make demo",
        data_sha256={"cells": sha256(args.out / "cells")},
        metrics=[CardMetric("mean_iou", result["mean_iou"], "make demo", "cells", "mIoU", "test", options)],
        limitations=f"Wants bright nuclei (`even_out` in examples/demo.py) and windows of {WINDOW} pixels.",
    )
    export(model, args.out / "export", processor, card)

    # 5. Pictures and figures
    shown = range(0, len(test), 10)
    rows = [test[i] for i in shown], [predictions[i] for i in shown]
    write_report(args.out / "report.png", model, processor, *rows, zoom)
    print(f"in {args.out}: model/, export/ (loads without vitweave), report.png (picture, truth, prediction, PCA)")
    print(f"measure it again: vitweave verify {args.out}/export --data cells={args.out}/cells")
    print("IoU: " + ", ".join(f"{n} {v:.3f}" for n, v in zip(ID2LABEL.values(), result["per_class_iou"], strict=True)))
    print(f"val mIoU: {score(predict(model, processor, val, zoom), val)['mean_iou']:.3f}")
    print(f"Otsu threshold baseline, test mIoU: {baseline['mean_iou']:.3f}")
    print(f"test mIoU: {result['mean_iou']:.3f}")


if __name__ == "__main__":
    main()
