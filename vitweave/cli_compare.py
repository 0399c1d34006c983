"""`vitweave compare-fusions ENCODER DATA`: every layer fusion of one frozen encoder in one table."""

import argparse
import json
from pathlib import Path


def add_compare_command(subparsers: argparse._SubParsersAction) -> None:
    """Register the sub-command; what it needs is imported when it runs."""
    parser = subparsers.add_parser(
        "compare-fusions",
        help="layer fusions of one encoder side by side, in image-text retrieval",
        description="Train a retriever per layer fusion and seed on the frozen ENCODER's features, computed once, and"
        " one on its last layer's [CLS]; write comparison.md, .json and .png. A broken comparison goes on.",
    )
    parser.add_argument("encoder", metavar="ENCODER", help="folder or Hub id of a vision model")
    parser.add_argument("data", metavar="DATA", help="jsonl of images and captions, its folder, or `datasets` id")
    parser.add_argument("--out", type=Path, default=Path("runs/fusions"), help="(default: %(default)s)")
    parser.add_argument("--train-split", default="train")
    parser.add_argument("--eval-split", default="validation")
    parser.add_argument("--where", default="{}", help="only records with these values, JSON: '{\"mini\": true}'")
    parser.add_argument("--fusions", nargs="+", help="names (default: all)")
    parser.add_argument("--fusion-options", default="{}", help='JSON: \'{"concat": {"dense": true}}\'')
    parser.add_argument("--layers", nargs="+", default=["quarters"], help="preset or numbers (default: quarters)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--fusion-lr-scale", type=float, default=1.0, help="of the fusions, times the learning rate")
    parser.add_argument("--size", type=int, help="pixels of the square canvas (default: the encoder's image size)")
    parser.add_argument("--text-columns", nargs="+", default=["caption"], help="one text is drawn per epoch")
    parser.add_argument("--text-size", type=int, default=192, help="width of the text model, trained from scratch")
    parser.add_argument("--text-layers", type=int, default=4)
    parser.add_argument("--max-length", type=int, default=96, help="tokens of a text")
    parser.add_argument("--vocab-size", type=int, default=4000)
    parser.add_argument("--feature-dtype", choices=("float16", "bfloat16"), help="keep the features in half precision")
    parser.add_argument("--no-plot", action="store_true", help="write no comparison.png, which needs the extra viz")
    parser.set_defaults(run=run_compare)


def load_encoder(name: str):
    """A vision model without a pooler that has no weights: the [CLS] token stands for the image then.

    Its config says so, too, so that what is built around it is built without one when it is loaded again.
    """
    from transformers import AutoModel

    from vitweave.modeling.vision_encoder import find_vision_model

    model, info = AutoModel.from_pretrained(name, output_loading_info=True)
    if any(key.startswith("pooler.") for key in info["missing_keys"]):
        model.pooler, model.config.use_pooler = None, False
    return find_vision_model(getattr(model, "vision_encoder", model))  # of a layer fusion the encoder below it


def figure_processor(name: str, encoder, size: int | None):
    """Whole figures on a canvas of the encoder's size, normalised as the encoder's own processor does it."""
    from transformers.models.auto.image_processing_auto import AutoImageProcessor  # top-level, 5.13 wants torchvision

    from vitweave.processing.image_processing_pil_figure import FigureImageProcessorPil

    own = AutoImageProcessor.from_pretrained(name)
    size = encoder.config.image_size if size is None else size
    return FigureImageProcessorPil(
        size=size, patch_size=encoder.config.patch_size, image_mean=own.image_mean, image_std=own.image_std
    )


def run_compare(args: argparse.Namespace) -> None:
    """Train, print a line per run and the table."""
    from transformers.utils import logging

    from vitweave.analysis.fusion_comparison import ComparisonOptions, compare_fusions
    from vitweave.analysis.fusion_report import chance_rsum, write_report
    from vitweave.modeling.layer_fusion.registry import LAYER_FUSIONS
    from vitweave.processing.processing_figure_text import FigureTextProcessor
    from vitweave.training.retrieval_data import RetrievalDataset, corpus_of
    from vitweave.training.retrieval_records import open_records
    from vitweave.training.text_tokenizer import train_tokenizer

    logging.set_verbosity_error()
    where = json.loads(args.where)
    train, validation = (open_records(args.data, split, where) for split in (args.train_split, args.eval_split))
    encoder = load_encoder(args.encoder)
    tokenizer = train_tokenizer(corpus_of(train, args.text_columns), args.vocab_size, max_length=args.max_length)
    processor = FigureTextProcessor(figure_processor(args.encoder, encoder, args.size), tokenizer)
    layers = args.layers[0] if not args.layers[0].lstrip("-").isdigit() else tuple(map(int, args.layers))
    options = ComparisonOptions(
        layers=layers,
        fusion_options=json.loads(args.fusion_options),
        steps=args.steps,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        fusion_lr_scale=args.fusion_lr_scale,
        text_size=args.text_size,
        text_layers=args.text_layers,
        feature_dtype=args.feature_dtype,
    )
    validation = RetrievalDataset(validation, processor, args.text_columns[:1])
    rows = compare_fusions(
        encoder,
        RetrievalDataset(train, processor, args.text_columns, draw=True),
        validation,
        args.out,
        args.fusions or list(LAYER_FUSIONS),
        args.seeds,
        options,
        tell=print,
    )
    facts = {
        "encoder": f"{args.encoder}, frozen, layers {args.layers}",
        "data": f"{args.data} {where or ''}, {len(train)} {args.train_split}, {len(validation)} {args.eval_split}",
        "training": f"{args.steps} steps of {args.batch_size} pairs, learning rate {args.learning_rate},"
        f" of the fusions times {args.fusion_lr_scale}",
        "RSUM of a random order": f"{100 * chance_rsum(len(validation)):.1f}",
    }
    print(write_report(rows, args.out, facts, plot=not args.no_plot))
    print(f"wrote {args.out}/comparison.md, .json" + ("" if args.no_plot else ", .png"))
