"""`vitweave index MODEL DATA OUT` and `vitweave search OUT "query"`."""

import argparse


def add_index_command(subparsers: argparse._SubParsersAction) -> None:
    """Register the sub-command; what it needs is imported when it runs."""
    parser = subparsers.add_parser(
        "index",
        help="embed images, so that they can be searched by text",
        description="Write the embeddings of all images of DATA into OUT. Under `accelerate launch -m vitweave.cli"
        " index ...` the processes share the work.",
    )
    parser.add_argument("model", metavar="MODEL", help="folder or Hub id of an image-text retriever with its processor")
    parser.add_argument("data", metavar="DATA", help="jsonl of image paths, folder of pictures, or `datasets` id")
    parser.add_argument("out", metavar="OUT", help="folder to write")
    parser.add_argument("--split", help="only this split (of a jsonl: the records whose field `split` says so)")
    parser.add_argument("--image-column", default="image", help="field with the picture or its path (default: image)")
    parser.add_argument("--skip-missing", action="store_true", help="go on without images whose file is not there")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--shard-size", type=int, default=4096, help="images per file (default: %(default)s)")
    parser.add_argument("--num-workers", type=int, default=0, help="processes that read images")
    parser.add_argument("--device", help="e.g. cpu or cuda (default: the accelerator where there is one)")
    parser.set_defaults(run=run_index)


def add_search_command(subparsers: argparse._SubParsersAction) -> None:
    """Register the sub-command; what it needs is imported when it runs."""
    parser = subparsers.add_parser(
        "search", help="find images of an index by text", description="The images of OUT that fit QUERY best."
    )
    parser.add_argument("index", metavar="OUT", help="folder that `vitweave index` wrote")
    parser.add_argument("query", metavar="QUERY", help="a text, one or several sentences")
    parser.add_argument("--top", type=int, default=10, help="how many images (default: %(default)s)")
    parser.add_argument("--sheet", metavar="PNG", help="write the hits as a contact sheet")
    parser.add_argument("--model", help="folder or Hub id of the model (default: the one the index was made with)")
    parser.add_argument("--backend", choices=("torch", "faiss"), default="torch", help="(default: %(default)s)")
    parser.add_argument("--alpha", type=float, help="weight of the global cosine against tiles and sentences, 0 to 1")
    parser.set_defaults(run=run_search)


def load_retriever(name: str):
    """A retriever and its processor."""
    from transformers import AutoModel
    from transformers.models.auto.processing_auto import AutoProcessor

    processor = AutoProcessor.from_pretrained(name)
    model = AutoModel.from_pretrained(name)
    if not hasattr(model, "get_image_features") or not hasattr(processor, "tokenizer"):
        raise ValueError(
            f"expected an image-text retriever with its processor, got {type(model).__name__} and "
            f"{type(processor).__name__} from {name}"
        )
    return model.eval(), processor


def run_index(args: argparse.Namespace) -> None:
    """Embed the images, print what was written."""
    from pathlib import Path

    from accelerate import PartialState

    from vitweave.training.image_index import build_index
    from vitweave.training.retrieval_records import open_records

    options = {"image_column": args.image_column} if Path(args.data).exists() else {}
    if options:
        options["on_missing"] = "skip" if args.skip_missing else "error"
    records = open_records(args.data, args.split, **options)
    model, processor = load_retriever(args.model)
    state = PartialState()
    folder = build_index(
        model.to(args.device or state.device),
        processor,
        records,
        args.out,
        source=str(Path(args.model).resolve()) if Path(args.model).is_dir() else args.model,
        batch_size=args.batch_size,
        shard_size=args.shard_size,
        num_workers=args.num_workers,
        image_column=args.image_column,
    )
    if state.is_main_process:
        skipped = len(getattr(records, "skipped", []))
        print(f"{folder}: {len(records)} images" + (f", {skipped} missing ones left out" if skipped else ""))


def run_search(args: argparse.Namespace) -> None:
    """Print one line per hit, write the sheet if asked for."""
    from vitweave.training.contact_sheet import write_contact_sheet
    from vitweave.training.image_index import ImageIndex, embed_query

    index = ImageIndex(args.index)
    model, processor = load_retriever(args.model or index.manifest["model"])
    hits = index.search(*embed_query(model, processor, args.query), args.top, args.backend, args.alpha)
    for place, hit in enumerate(hits, start=1):
        print(
            f"{place:3d}  {hit.score:.4f}  {hit.record['name']}  {hit.record.get('caption', hit.record['path'])[:90]}"
        )
    if args.sheet:
        write_contact_sheet(args.sheet, args.query, hits)
        print(f"wrote {args.sheet}")
