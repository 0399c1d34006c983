"""`vitweave cost MODEL`: parameters, FLOPs, tokens and memory of a tower or a vision-language model, part by part."""

import argparse


def add_cost_command(subparsers: argparse._SubParsersAction) -> None:
    """Register the sub-command; what it needs is imported when it runs."""
    parser = subparsers.add_parser(
        "cost",
        help="what each encoder, the fusion, the projector and the language model cost, before any training",
        description="Count parameters, FLOPs, tokens and memory of one image on the meta device: no weights are loaded"
        " or allocated. Two FLOPs are a multiplication and its addition; forward pass only.",
    )
    parser.add_argument("model", metavar="MODEL", help="preset (e.g. llava-hr), config.json, its folder, or Hub id")
    parser.add_argument("--language-model", metavar="LM", help="config.json, folder or Hub id, on top of a tower")
    parser.add_argument("--image-size", type=int, nargs="+", metavar="PIXELS", help="side, or height and width")
    parser.add_argument("--tiles", type=int, default=1, help="of the image, each encoded (default: %(default)s)")
    parser.add_argument("--text-tokens", type=int, default=64, help="beside the image's (default: %(default)s)")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--tiny", action="store_true", help="of a preset the small one")
    parser.add_argument("--json", metavar="FILE", help="write the rows there, too")
    parser.set_defaults(run=run_cost)


def read_config(name: str):
    """The config in a file, a folder or on the Hub."""
    from pathlib import Path

    from transformers import AutoConfig

    from vitweave.auto import register

    register()
    path = Path(name)
    return AutoConfig.from_pretrained(path.parent if path.name == "config.json" and path.is_file() else name)


def config_of(args: argparse.Namespace):
    """The config of what the command line names: a tower, or a vision-language model."""
    from vitweave.configuration.configuration_multi_encoder_vlm import MultiEncoderVlmConfig, tower_of_one
    from vitweave.configuration.encoder_facts import vision_part
    from vitweave.configuration.multi_encoder_presets import PRESETS, multi_encoder_preset

    is_preset = args.model in PRESETS
    if args.tiny and not is_preset:
        raise ValueError(f"--tiny is for presets, got {args.model!r}; known: {sorted(PRESETS)}")
    try:
        config = multi_encoder_preset(args.model, tiny=args.tiny) if is_preset else read_config(args.model)
    except OSError as error:
        raise ValueError(f"{args.model!r} is neither a preset ({sorted(PRESETS)}) nor a config: {error}") from error
    if isinstance(config, MultiEncoderVlmConfig):
        if args.language_model:
            raise ValueError("the model has a language model of its own; --language-model is for towers")
        return config
    if not isinstance(getattr(config, "encoder_configs", None), list):
        config = tower_of_one(vision_part(config))
    if args.language_model:
        return MultiEncoderVlmConfig(vision_config=config, text_config=read_config(args.language_model))
    return config


def run_cost(args: argparse.Namespace) -> None:
    """Print the table, write the JSON if asked for."""
    import json
    from pathlib import Path

    from vitweave.analysis.cost import as_json, cost_table, model_cost

    size = args.image_size
    if size is not None and len(size) > 2:
        raise ValueError(f"expected --image-size as a side, or height and width, got {size}")
    size = None if size is None else size * 2 if len(size) == 1 else size
    rows = model_cost(config_of(args), size, args.tiles, args.text_tokens, args.dtype)
    print(cost_table(rows))
    if args.json:
        Path(args.json).write_text(json.dumps(as_json(rows), indent=1))
        print(f"wrote {args.json}")
