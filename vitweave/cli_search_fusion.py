"""`vitweave search-fusion ENCODER [ENCODER ...] --data FOLDER --task TASK`: the best fusion within a budget."""

import argparse
import json
from pathlib import Path

TASKS = ("segmentation", "depth", "classification", "retrieval")
EVAL_SPLITS = ("validation", "val")


def add_search_fusion_command(subparsers: argparse._SubParsersAction) -> None:
    """Register the sub-command; what it needs is imported when it runs."""
    parser = subparsers.add_parser(
        "search-fusion",
        help="search layers, their fusion and encoders for a task, under a budget",
        description="Successive halving over layers and fusions on the frozen ENCODERs' features, computed once; the"
        " chosen candidate is trained on all training images beside the last layer alone and the last four"
        " concatenated. Writes model/, search.md, .json and .png. A broken search goes on with the same command.",
    )
    parser.add_argument("encoders", metavar="ENCODER", nargs="+", help="folders or Hub ids of vision models")
    parser.add_argument("--data", required=True, help="folder with train/ and val/ or validation/, or lists of names")
    parser.add_argument("--task", required=True, choices=TASKS)
    parser.add_argument("--out", type=Path, default=Path("runs/search_fusion"), help="(default: %(default)s)")
    parser.add_argument("--budget-ms", type=float, help="milliseconds per image, measured here")
    parser.add_argument("--budget-mib", type=float, help="mebibytes of weights, features read, and one image's tensors")
    parser.add_argument("--budget-of", choices=("after", "whole"), default="after", help="behind the encoders, or all")
    parser.add_argument("--layers", nargs="+", help="last4 quarters thirds middle_last all singles, or 3,6,9,12")
    parser.add_argument("--fusions", nargs="+", help="layer fusions (default: all that suit the task)")
    parser.add_argument("--encoder-fusions", nargs="+", help="of several encoders (default: channel_concat add)")
    parser.add_argument("--fusion-options", default="{}", help='JSON: \'{"film": {"direct": false}}\'')
    parser.add_argument("--steps", type=int, default=320, help="of the final training (default: %(default)s)")
    parser.add_argument(
        "--first-steps",
        type=int,
        help="of the first round (default: 24, or more so that the last round takes half of --steps)",
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--held-out", type=float, default=0.2, help="share of the training images that judges rounds")
    parser.add_argument("--train-images", type=int, help="only so many, evenly spread (default: all)")
    parser.add_argument("--eval-images", type=int, help="only so many to report on (default: all)")
    parser.add_argument("--size", type=int, nargs="+", help="pixels, side or height and width (default: the encoder's)")
    parser.add_argument("--label-stride", type=int, default=1, help="search on every n-th row and column of labels")
    parser.add_argument("--depth-scale", type=float, default=0.001, help="metres = stored * scale + offset")
    parser.add_argument("--depth-offset", type=float, default=0.0)
    parser.add_argument("--max-depth", type=float, default=10.0, help="metres that a model can say")
    parser.add_argument(
        "--protocol", default="nyu", help="of AbsRel, which says up to which depth (default: nyu, 10 m)"
    )
    parser.add_argument("--where", default="{}", help="retrieval: only records with these values, JSON")
    parser.add_argument("--text-columns", nargs="+", default=["caption"], help="retrieval: one is drawn per epoch")
    parser.add_argument("--feature-dtype", choices=("float16", "bfloat16"), help="keep the features in half precision")
    parser.add_argument("--no-plot", action="store_true", help="write no search.png, which needs the extra viz")
    parser.add_argument("--quiet", action="store_true", help="show no progress bar")
    parser.set_defaults(run=run_search_fusion)


def eval_split(data: Path) -> str:
    """The name of the part to report on."""
    found = [name for name in EVAL_SPLITS if (data / name).is_dir() or (data / f"{name}.txt").is_file()]
    if not found:
        raise FileNotFoundError(f"expected {' or '.join(EVAL_SPLITS)} in {data}, as a folder or as a list (val.txt)")
    return found[0]


def thinned(dataset, count: int | None):
    """A dataset of files with only so many of them, evenly spread over their order, so that every class stays."""
    from vitweave.training.pictures import evenly_spread

    for name in ("pairs", "files") if count is not None else ():
        entries = getattr(dataset.samples, name, None)
        if entries is not None and not 0 < count <= len(entries):
            raise ValueError(f"expected between 1 and {len(entries)} images, got {count}")
        if entries is not None:
            setattr(dataset.samples, name, [entries[place] for place in evenly_spread(len(entries), count)])
    return dataset


def image_size(args: argparse.Namespace, encoder) -> list[int]:
    """Height and width of the images."""
    size = args.size or [getattr(encoder.config, "image_size", None)]
    size = list(size[0]) if isinstance(size[0], (list, tuple)) else size
    if len(size) > 2 or not all(isinstance(pixels, int) for pixels in size):
        raise ValueError(f"expected --size as a side, or height and width, got {size}")
    return size * 2 if len(size) == 1 else size


def image_parts(args: argparse.Namespace, size: list[int], mean: list[float], std: list[float]) -> tuple:
    """Training and validation images with labels, normalised for an encoder."""
    from transformers.models.auto.image_processing_auto import AutoImageProcessor  # top-level, 5.13 wants torchvision

    from vitweave.processing.image_processing_pil_depth import DepthImageProcessorPil
    from vitweave.processing.image_processing_pil_segmentation import SegmentationImageProcessorPil
    from vitweave.training.classification_data import open_parts
    from vitweave.training.depth_data import DepthDataset, DepthFolderSamples
    from vitweave.training.paired_data import place_of_part
    from vitweave.training.segmentation_data import FolderSamples, SegmentationDataset

    data, parts = Path(args.data), ("train", eval_split(Path(args.data)))
    shown = {"size": {"height": size[0], "width": size[1]}, "image_mean": mean, "image_std": std}
    if args.task == "classification":
        processor = AutoImageProcessor.from_pretrained(args.encoders[0], do_center_crop=False, **shown)
        return open_parts(data, processor, names=parts)
    if args.task == "segmentation":
        processor = SegmentationImageProcessorPil(**shown)
        return tuple(SegmentationDataset(FolderSamples(*place_of_part(data, part)), processor) for part in parts)
    known = {"depth_scale": args.depth_scale, "depth_offset": args.depth_offset}
    processor = DepthImageProcessorPil(**shown, **known, depth_range=(0.0, 2 * args.max_depth))
    return tuple(DepthDataset(DepthFolderSamples(*place_of_part(data, part)), processor) for part in parts)


def image_task(args: argparse.Namespace, encoders: list, candidates: list):
    """The task of labelled images."""
    from vitweave.analysis.fusion_search_features import KeptFeatures
    from vitweave.analysis.fusion_search_tasks import SEARCH_TASKS
    from vitweave.cli_compare_encoders import tower_fields
    from vitweave.training.segmentation_data import read_id2label

    size, tower = image_size(args, encoders[0]), {}
    fields, _ = tower_fields(args.encoders, [max(size)] * len(encoders))
    mean, std = fields["image_mean"], fields["image_std"]
    own = [
        (entry.get("image_mean", mean), entry.get("image_std", std)) for entry in fields["encoder_options"]
    ]  # what each encoder is used to
    parts = [image_parts(args, size, *normalisation) for normalisation in own]
    for train, validation in parts:
        thinned(train, args.train_images), thinned(validation, args.eval_images)
    if len(encoders) > 1:
        tower = {**fields, "image_size": size}
    head = {}
    if args.task == "classification":
        head = {"id2label": parts[0][0].id2label}
    elif args.task == "segmentation":
        head = {"id2label": read_id2label(args.data)}
        if head["id2label"] is None:
            raise FileNotFoundError(f"expected {args.data}/meta.json, which names the classes (id2label)")
    else:
        head = {"max_depth": args.max_depth, "protocol": args.protocol}
    task_class = SEARCH_TASKS[args.task]
    features = KeptFeatures(encoders, parts, tower, candidates, task_class.dense)
    return task_class(features, args.label_stride, **head)


def retrieval_task(args: argparse.Namespace, encoders: list, candidates: list):
    """The task of images with texts, on the first encoder."""
    from vitweave.analysis.fusion_search_features import KeptFeatures
    from vitweave.analysis.fusion_search_retrieval import RetrievalSearch
    from vitweave.cli_compare import figure_processor
    from vitweave.processing.processing_figure_text import FigureTextProcessor
    from vitweave.training.retrieval_data import RetrievalDataset, corpus_of
    from vitweave.training.retrieval_records import open_records
    from vitweave.training.text_tokenizer import train_tokenizer

    if len(encoders) > 1:
        raise ValueError(f"expected one encoder for retrieval, whose layers are searched, got {len(encoders)}")
    if args.train_images is not None or args.eval_images is not None:
        raise ValueError("--train-images and --eval-images thin labelled images; choose records with --where")
    if args.size is not None and len(args.size) > 1:
        raise ValueError(f"expected --size as the side of the square canvas of retrieval, got {args.size}")
    where = json.loads(args.where)
    train, validation = (open_records(args.data, split, where) for split in ("train", "validation"))
    tokenizer = train_tokenizer(corpus_of(train, args.text_columns), 4000, max_length=64)
    size = None if args.size is None else args.size[0]
    processor = FigureTextProcessor(figure_processor(args.encoders[0], encoders[0], size), tokenizer)
    train = RetrievalDataset(train, processor, args.text_columns, draw=True)
    validation = RetrievalDataset(validation, processor, args.text_columns[:1])
    features = KeptFeatures(encoders, [(train.images(), validation.images())], {}, candidates, RetrievalSearch.dense)
    return RetrievalSearch(features, train, validation)


def told_facts(args: argparse.Namespace, task, budget) -> dict[str, str]:
    """What was searched, as the report tells it."""
    train, validation = (len(part) for part in task.features.parts[0])
    protocol = f" under {args.protocol}" if args.task == "depth" else ""
    what = "behind the encoders" if args.budget_of == "after" else "encoders included"
    return {
        "encoders": ", ".join(Path(name).name for name in args.encoders) + ", frozen",
        "data": f"{Path(args.data).name}, {args.task}{protocol}; {train} training images, of which {args.held_out:.0%}"
        f" judge the rounds, and {validation} for the report",
        "training": f"{args.steps} steps of {args.batch_size} images, AdamW, learning rate {args.learning_rate:g}",
        "budget": " and ".join(f"{limit:g} {unit}" for unit, limit in budget.limits.items()) or "none",
        "costs": f"of one image on {task.features.device.type}, {what}",
    }


def run_search_fusion(args: argparse.Namespace) -> None:
    """Search, print a line per round and the table."""
    import torch
    from transformers.utils import logging

    from vitweave.analysis.fusion_candidates import ENCODER_FUSION_CHOICES, LAYER_CHOICES, baselines, search_space
    from vitweave.analysis.fusion_search import FusionSearch, SearchOptions
    from vitweave.analysis.fusion_search_costs import Budget
    from vitweave.analysis.fusion_search_report import write_report
    from vitweave.analysis.plots import new_figure
    from vitweave.cli_compare import load_encoder
    from vitweave.modeling.layer_fusion.registry import LAYER_FUSIONS

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    budget = Budget(args.budget_ms, args.budget_mib, args.budget_of)
    options = SearchOptions(
        steps=args.steps,
        first_steps=args.first_steps,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        held_out=args.held_out,
        seeds=tuple(args.seeds),
        budget=budget,
        feature_dtype=args.feature_dtype,
    )
    if not args.no_plot:
        new_figure(1, 1)  # a missing matplotlib is told now, not after the search
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    encoders = [load_encoder(name).to(device) for name in args.encoders]
    configs, given = [encoder.config for encoder in encoders], json.loads(args.fusion_options)
    dense = args.task in ("segmentation", "depth")
    space = search_space(
        configs,
        dense,
        args.layers or LAYER_CHOICES,
        args.fusions or tuple(LAYER_FUSIONS),
        args.encoder_fusions or ENCODER_FUSION_CHOICES,
        given,
    )
    make = retrieval_task if args.task == "retrieval" else image_task
    search = FusionSearch(
        make(args, encoders, space),
        space,
        baselines(configs[0], dense, given),
        args.out,
        options,
        tell=print,
        progress=not args.quiet,
    )
    facts = told_facts(args, search.task, budget)
    print(write_report(search.run(), args.out, facts, plot=not args.no_plot, limit=args.budget_ms))
    print(f"wrote {args.out}/model, search.md, .json" + ("" if args.no_plot else ", .png"))
