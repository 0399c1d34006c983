"""`vitweave specialize SRC OUT`: a pretrained vanilla ViT becomes a specialised one with the same outputs."""

import argparse
import shutil
from pathlib import Path

PROCESSOR_FILE = "preprocessor_config.json"
KINDS = ("auto", "model", "backbone", "classifier")


def blocks(text: str) -> str | int | list[int]:
    """ "all", "first_third", "none", a number of blocks, or indices such as 0,1,5."""
    if text in ("all", "first_third", "none"):
        return text
    try:
        numbers = [int(part) for part in text.split(",") if part]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not all, first_third, none, a number of blocks, or indices such as 0,1,5"
        ) from None
    return numbers if "," in text else numbers[0]


def add_specialize_command(subparsers: argparse._SubParsersAction) -> None:
    """Register the sub-command; what it needs is imported when it runs."""
    parser = subparsers.add_parser(
        "specialize",
        help="give a pretrained ViT separate [CLS] and patch weights, with unchanged outputs",
        description="Convert the vanilla ViT SRC, write it with its image processor into OUT, and say what was copied."
        " BLOCKS: all, first_third, none, a number (first blocks), or indices from 0 such as 0,1,5 ('3,': block 3).",
    )
    parser.add_argument(
        "src", metavar="SRC", help="folder or Hub id of a ViT, DeiT, DINOv2/3, BEiT, CLIP, MAE or timm ViT"
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write; it must not hold a model yet")
    parser.add_argument("--kind", choices=KINDS, default="auto", help="what to write (default: what SRC is)")
    parser.add_argument("--num-labels", type=int, help="classes of a new head (default: keep the head of SRC)")
    for name in ("norm", "qkv", "proj", "mlp"):
        parser.add_argument(f"--{name}-blocks", type=blocks, metavar="BLOCKS", help=f"where {name} is specialised")
    parser.add_argument("--qkv-parts", help="which of q, k, v (default: qkv)")
    parser.add_argument("--no-norm", dest="specialize_norm", action="store_false", default=None, help="share the norms")
    parser.add_argument("--no-layer-scale", dest="specialize_layer_scale", action="store_false", default=None)
    parser.add_argument("--final-norm", dest="specialize_final_norm", action="store_true", default=None)
    parser.add_argument("--register-role", choices=("patch", "cls"))
    parser.add_argument("--attention-bias", choices=("kv",), help="add a learnt key and value; changes the outputs")
    parser.add_argument("--cls-rank", type=int, help="rank of a low-rank [CLS] update instead of full [CLS] weights")
    parser.add_argument("--cls-alpha", type=float, help="its scale is alpha / rank (default: 1)")
    parser.add_argument("--out-indices", type=int, nargs="+", help="layers whose maps a backbone gives")
    parser.set_defaults(run=run_specialize)


def run_specialize(args: argparse.Namespace) -> None:
    """Convert SRC, write OUT, print the report."""
    from vitweave.modeling.checkpoint_files import replace_when_done
    from vitweave.modeling.specialize import specialize

    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise ValueError(f"{args.out} exists and is not an empty folder; choose another OUT")
    known = ("src", "out", "kind", "run", "debug")
    flags = {name: value for name, value in vars(args).items() if name not in known and value is not None}
    model = specialize(args.src, class_of_kind(args.kind, args.src), **flags)
    with replace_when_done(args.out) as folder:
        model.save_pretrained(folder)
        has_processor = copy_processor(args.src, folder)
    print(model.conversion_report)
    print(f"{args.out}: model" + (" and image processor" if has_processor else "; SRC has no image processor to copy"))


def copy_processor(source: str, folder: Path) -> bool:
    """Write the image processor of `source` into `folder`, if it has one."""
    from transformers.models.auto.image_processing_auto import AutoImageProcessor  # top-level, 5.13 wants torchvision
    from transformers.utils import cached_file

    try:
        AutoImageProcessor.from_pretrained(source).save_pretrained(folder)
    except ImportError:  # older transformers ask for torchvision here; the file alone says enough
        try:
            shutil.copy(cached_file(source, PROCESSOR_FILE), folder / PROCESSOR_FILE)
        except OSError:
            return False
    except (OSError, ValueError):
        return False
    return True


def class_of_kind(kind: str, source: str) -> type:
    """The model class to make; "auto" is a classifier where the checkpoint is one, else the base model."""
    from transformers import AutoConfig

    from vitweave.modeling.modeling_specialized_vit import (
        SpecializedViTBackbone,
        SpecializedViTForImageClassification,
        SpecializedViTModel,
    )

    if kind == "auto":
        saved_as = (AutoConfig.from_pretrained(source).architectures or [""])[0]
        is_backbone = saved_as.endswith("Backbone")
        kind = "classifier" if "ForImageClassification" in saved_as else "backbone" if is_backbone else "model"
    classes = (SpecializedViTModel, SpecializedViTBackbone, SpecializedViTForImageClassification)
    return dict(zip(KINDS[1:], classes, strict=True))[kind]
