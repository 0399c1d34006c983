"""`vitweave compare-encoder-fusions ENCODER ENCODER ... --data DATA`: every encoder fusion in one table."""

import argparse
import json
from pathlib import Path


def add_compare_encoders_command(subparsers: argparse._SubParsersAction) -> None:
    """Register the sub-command; what it needs is imported when it runs."""
    parser = subparsers.add_parser(
        "compare-encoder-fusions",
        help="fusions of several encoders side by side, in image classification",
        description="Train a classifier per encoder fusion and seed on the frozen ENCODERs' features, computed once,"
        " and one on each encoder alone; write comparison.md, .json and .png. A broken comparison goes on.",
    )
    parser.add_argument("encoders", metavar="ENCODER", nargs="+", help="folders or Hub ids of vision models")
    parser.add_argument("--data", required=True, help="folder with a folder per split and class, or a dataset's id")
    parser.add_argument("--out", type=Path, default=Path("runs/encoder_fusions"), help="(default: %(default)s)")
    parser.add_argument("--train-split", default="train")
    parser.add_argument("--eval-split", default="validation")
    parser.add_argument("--fusions", nargs="+", help="names (default: all)")
    parser.add_argument("--fusion-options", default="{}", help='JSON: \'{"query_former": {"depth": 4}}\'')
    parser.add_argument("--adapters", action="store_true", help="mixture_of_resolution with adapters, too: much slower")
    parser.add_argument("--sizes", nargs="+", type=int, help="pixels each encoder sees (default: its image size)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument(
        "--learning-rates",
        nargs="+",
        type=float,
        default=[1e-3, 3e-3, 1e-2],
        help="each row takes the best on a fifth of the training images, tried upwards (default: %(default)s)",
    )
    parser.add_argument("--no-plot", action="store_true", help="write no comparison.png, which needs the extra viz")
    parser.set_defaults(run=run_compare_encoders)


def sizes_of(encoders: list, given: list[int] | None) -> list[int]:
    """The pixels each encoder sees: those asked for, or what its config says."""
    sizes = given or [getattr(encoder.config, "image_size", None) for encoder in encoders]
    if len(sizes) != len(encoders) or not all(isinstance(size, int) for size in sizes):
        raise ValueError(
            f"expected the side of a square image for each of {len(encoders)} encoders, got {sizes}: --sizes"
        )
    return sizes


def tower_fields(names: list[str], sizes: list[int]) -> tuple[dict, object]:
    """How a tower hands one image to all encoders, and the processor that makes this image.

    The image has the size of the encoder that sees most pixels and the first one's normalisation.
    """
    from transformers.models.auto.image_processing_auto import AutoImageProcessor  # top-level, 5.13 wants torchvision

    processors, side = [AutoImageProcessor.from_pretrained(name) for name in names], max(sizes)
    mean, std = list(processors[0].image_mean), list(processors[0].image_std)
    entries = []
    for processor, size in zip(processors, sizes, strict=True):
        own = {"image_mean": list(processor.image_mean), "image_std": list(processor.image_std)}
        entries.append({} if size == side else {"image_size": size})
        entries[-1] |= {} if own == {"image_mean": mean, "image_std": std} else own
    fields = {"image_size": side, "image_mean": mean, "image_std": std, "encoder_options": entries}
    size = {"height": side, "width": side}
    return fields, AutoImageProcessor.from_pretrained(names[0], size=size, do_center_crop=False)


def run_compare_encoders(args: argparse.Namespace) -> None:
    """Train, print a line per row and the table."""
    from transformers.utils import logging

    from vitweave.analysis.encoder_fusion_comparison import EncoderComparisonOptions, compare_encoder_fusions
    from vitweave.analysis.encoder_fusion_report import write_report
    from vitweave.cli_compare import load_encoder
    from vitweave.modeling.encoder_fusion.registry import ENCODER_FUSIONS
    from vitweave.training.classification_data import open_parts

    logging.set_verbosity_error()
    encoders = [load_encoder(name) for name in args.encoders]
    sizes = sizes_of(encoders, args.sizes)
    tower, processor = tower_fields(args.encoders, sizes)
    train, validation = open_parts(args.data, processor, names=(args.train_split, args.eval_split))
    options = EncoderComparisonOptions(
        fusion_options=json.loads(args.fusion_options),
        adapters=args.adapters,
        steps=args.steps,
        batch_size=args.batch_size,
        learning_rates=tuple(args.learning_rates),
    )
    fusions = args.fusions or list(ENCODER_FUSIONS)
    rows = compare_encoder_fusions(
        encoders, train, validation, args.out, fusions, args.seeds, options, tower, tell=print
    )
    shown = [f"{Path(name).name} at {size}" for name, size in zip(args.encoders, sizes, strict=True)]
    facts = {
        "encoders": f"{' + '.join(shown)} pixels, frozen",
        "data": f"{Path(args.data).name}, {len(train)} {args.train_split}, {len(validation)} {args.eval_split}",
        "training": f"{args.steps} steps of {args.batch_size} images, AdamW; of the learning rates"
        f" {args.learning_rates} each row takes the best on {options.held_out:.0%} of the training images, seed 0",
        "ms / image": "the fusion alone, behind the encoders",
    }
    print(write_report(rows, args.out, facts, plot=not args.no_plot))
    print(f"wrote {args.out}/comparison.md, .json" + ("" if args.no_plot else ", .png"))
