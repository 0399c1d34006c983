"""`vitweave convert SOURCE --preset P --out OUT`: a released multi-encoder checkpoint becomes one of ours."""

import argparse
from pathlib import Path

DTYPES = ("float32", "float16", "bfloat16")


def numbered(text: str) -> tuple[int, str]:
    """0=NAME: the number of an encoder, and where its weights are."""
    number, _, name = text.partition("=")
    if not number.isdigit() or not name:
        raise argparse.ArgumentTypeError(f"{text!r} is not NUMBER=NAME, such as 0=google/siglip-so400m-patch14-384")
    return int(number), name


def add_convert_command(subparsers: argparse._SubParsersAction) -> None:
    """Register the sub-command; what it needs is imported when it runs."""
    parser = subparsers.add_parser(
        "convert",
        help="turn a released LLaVA-HR, Mini-Gemini, EAGLE, LEO, Cambrian-1 or InternVL checkpoint into one of ours",
        description="Convert the released checkpoint SOURCE (safetensors), write it into OUT, and say what became of"
        " every tensor. With a language model in it, it becomes a vision-language model, else a tower of encoders.",
    )
    parser.add_argument("source", metavar="SOURCE", type=Path, help="folder of the release, or a safetensors file")
    parser.add_argument("--preset", required=True, help="llava-hr, eagle-x5, mgm, leo, cambrian, ...")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; it must not hold a model yet")
    parser.add_argument("--config", help="folder with the config of a tower of other sizes (default: the preset)")
    parser.add_argument("--text-config", help="folder with a config of the language model (default: SOURCE's)")
    parser.add_argument(
        "--encoder",
        dest="encoders",
        metavar="NUMBER=NAME",
        type=numbered,
        action="append",
        default=[],
        help="weights of an encoder that SOURCE does not hold (Cambrian-1), folder or Hub id; may be repeated",
    )
    parser.add_argument("--tower-only", action="store_true", help="leave the projector and the language model out")
    parser.add_argument("--image-token-id", type=int, default=0, help="placeholder of image tokens (default: 0)")
    parser.add_argument("--dtype", choices=DTYPES, help="(default: the one SOURCE is stored in)")
    parser.set_defaults(run=run_convert)


def run_convert(args: argparse.Namespace) -> None:
    """Convert SOURCE, write OUT, print the report."""
    import torch
    from transformers import AutoConfig, AutoModel

    from vitweave.modeling.convert_multi_encoder import convert_multi_encoder

    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise ValueError(f"{args.out} exists and is not an empty folder; choose another OUT")
    model, report = convert_multi_encoder(
        args.source,
        args.preset,
        None if args.config is None else AutoConfig.from_pretrained(args.config),
        text_config=None if args.text_config is None else AutoConfig.from_pretrained(args.text_config),
        encoders={number: AutoModel.from_pretrained(name) for number, name in args.encoders},
        tower_only=args.tower_only,
        image_token_id=args.image_token_id,
        dtype=None if args.dtype is None else getattr(torch, args.dtype),
    )
    model.save_pretrained(args.out)
    print(report)
    print(f"{args.out}: {type(model).__name__}, {model.dtype}")
