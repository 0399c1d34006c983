"""`vitweave convert SOURCE --preset P --out OUT`: a released checkpoint of several encoders or sensors becomes ours."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from vitweave.modeling.options import closest

if TYPE_CHECKING:
    import torch

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
        help="turn a released checkpoint (LLaVA-HR, Mini-Gemini, EAGLE, LEO, Cambrian-1, InternVL; GeminiFusion,"
        " TokenFusion, CMX, SegFormer) into one of ours",
        description="Convert the released checkpoint SOURCE (safetensors), write it into OUT, and say what became of"
        " every tensor. One of several encoders becomes a vision-language model, or a tower of encoders if it has no"
        " language model; one of several sensors becomes a segmenter.",
    )
    parser.add_argument("source", metavar="SOURCE", type=Path, help="folder of the release, or a safetensors file")
    parser.add_argument(
        "--preset",
        required=True,
        help="llava-hr, eagle-x5, mgm, leo, cambrian, ...; of sensors gemini-fusion, gemini-fusion-swin,"
        " gemini-fusion-deliver, token-fusion, cmx, segformer, mit",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write; it must not hold a model yet")
    parser.add_argument("--config", help="folder with a config of other sizes (default: the preset, or the tensors)")
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
    parser.add_argument("--modalities", nargs="+", metavar="NAME", help="of the sensors (default: rgb depth ...)")
    parser.add_argument("--dtype", choices=DTYPES, help="(default: the one SOURCE is stored in)")
    parser.set_defaults(run=run_convert)


def run_convert(args: argparse.Namespace) -> None:
    """Convert SOURCE, write OUT, print the report."""
    import torch

    from vitweave.modeling.conversion.modality_release_registry import MODALITY_RELEASES
    from vitweave.modeling.conversion.release_registry import RELEASES

    if args.preset not in RELEASES and args.preset not in MODALITY_RELEASES:
        known = sorted([*RELEASES, *MODALITY_RELEASES])
        raise ValueError(f"unknown preset {args.preset!r}{closest(args.preset, known)}; known: {known}")
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise ValueError(f"{args.out} exists and is not an empty folder; choose another OUT")
    convert = sensors if args.preset in MODALITY_RELEASES else encoders
    model, report = convert(args, None if args.dtype is None else getattr(torch, args.dtype))
    model.save_pretrained(args.out)
    print(report)
    print(f"{args.out}: {type(model).__name__}, {model.dtype}")


def encoders(args: argparse.Namespace, dtype: "torch.dtype | None") -> tuple:
    """A release of several encoders: the model and the report."""
    from transformers import AutoConfig, AutoModel

    from vitweave.modeling.convert_multi_encoder import convert_multi_encoder

    refuse_options(args, "--modalities")
    return convert_multi_encoder(
        args.source,
        args.preset,
        None if args.config is None else AutoConfig.from_pretrained(args.config),
        text_config=None if args.text_config is None else AutoConfig.from_pretrained(args.text_config),
        encoders={number: AutoModel.from_pretrained(name) for number, name in args.encoders},
        tower_only=args.tower_only,
        image_token_id=args.image_token_id,
        dtype=dtype,
    )


def sensors(args: argparse.Namespace, dtype: "torch.dtype | None") -> tuple:
    """A release of several sensors: the model and the report."""
    from transformers import AutoConfig

    from vitweave.modeling.convert_modality_fusion import convert_modality_fusion

    refuse_options(args, "--text-config", "--encoders", "--tower-only", "--image-token-id")
    config = None if args.config is None else AutoConfig.from_pretrained(args.config)
    return convert_modality_fusion(args.source, args.preset, config, modalities=args.modalities, dtype=dtype)


def refuse_options(args: argparse.Namespace, *options: str) -> None:
    """Options that say nothing about a preset are an error, not ignored."""
    given = [option for option in options if getattr(args, option.removeprefix("--").replace("-", "_"))]
    if given:
        raise ValueError(f"{' and '.join(given).replace('--encoders', '--encoder')} mean nothing to {args.preset!r}")
