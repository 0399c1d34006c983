"""Train a vision-language model in two stages: first what joins encoders and words, then the language model, too.

    python examples/train_vlm.py --tiny
    python examples/train_vlm.py --data FOLDER --encoders facebook/dinov2-small facebook/convnext-tiny-224

Data is a jsonl of images with captions or messages, its folder (with a folder or a field per split), or a `datasets`
id. The encoders are frozen; with `--cache_features FOLDER` every tile runs through them once.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    ViTConfig,
    ViTModel,
    set_seed,
)

from vitweave.modeling.modeling_multi_encoder import MultiEncoderModel
from vitweave.modeling.modeling_multi_encoder_vlm import MultiEncoderVlmForConditionalGeneration
from vitweave.processing.processing_multi_encoder_vlm import MultiEncoderVlmProcessor
from vitweave.training.small_language_model import small_language_config, train_causal_tokenizer
from vitweave.training.synthetic_figures import write_figures
from vitweave.training.vlm import train_vlm
from vitweave.training.vlm_captions import generate_captions, write_caption_sheet
from vitweave.training.vlm_data import VlmDataset
from vitweave.training.vlm_records import VlmRecords
from vitweave.training.vlm_stages import part_rows, stage_table

STAGES = ("projector_and_fusion", "projector_and_fusion+language_model")


@dataclass
class Arguments:
    data: str = field(default="", metadata={"help": "jsonl, folder, or `datasets` id"})
    train_split: str = "train"
    eval_split: str = "validation"
    encoders: list[str] = field(default_factory=list, metadata={"help": "vision models, folders or ids"})
    encoder_options: str = field(default="[]", metadata={"help": 'JSON, e.g. [{}, {"image_size": 448}]'})
    fusion: str = field(default="channel_concat", metadata={"help": "name of the encoder fusion"})
    fusion_options: str = field(default="{}", metadata={"help": 'JSON, e.g. {"grid": 14}'})
    image_size: int = 224
    max_tiles: int = field(default=0, metadata={"help": "tiles per image; 0: images are padded to squares"})
    language_model: str = field(default="", metadata={"help": "folder or id; empty: a small one and its tokenizer"})
    prompt: str = "Describe the image."
    cache_features: str = field(default="", metadata={"help": "folder for the features of the frozen encoders"})
    steps: list[int] = field(default_factory=lambda: [200, 600], metadata={"help": "of the first and second stage"})
    lr: list[float] = field(default_factory=lambda: [1e-3, 5e-4], metadata={"help": "of the stages"})
    eval_every: int = 100
    batch_size: int = 16
    seed: int = 0
    out: str = "runs/vlm"
    resume: bool = False
    skip_missing: bool = field(default=False, metadata={"help": "go on without images whose file is not there"})
    show: int = field(default=8, metadata={"help": "captions to print"})
    tiny: bool = field(default=False, metadata={"help": "a dry run on drawn figures, in seconds"})


def main() -> dict[str, float]:
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    out = Path(args.out)
    if args.tiny:
        args.data, args.image_size, args.batch_size = str(out / "figures"), 32, 8
        args.steps, args.eval_every, args.show = [6, 12], 6, 4
        write_figures(args.data, {"train": 16, "validation": 4})
    elif not args.data or not args.encoders:
        raise SystemExit("--data and --encoders are missing: give both, or --tiny")
    set_seed(args.seed)

    # 1. Several encoders in one tower; one normalisation comes in, each encoder gets its own
    reading = {"on_missing": "skip" if args.skip_missing else "error"}
    train, val = (VlmRecords.open(args.data, split, **reading) for split in (args.train_split, args.eval_split))
    if args.tiny:
        small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
        encoders = [ViTModel(ViTConfig(**small, image_size=32, patch_size=size)) for size in (8, 16)]
        looks, args.fusion_options = [([0.5] * 3, [0.5] * 3)] * 2, '{"grid": 4}'
    else:
        encoders = [AutoModel.from_pretrained(name) for name in args.encoders]
        processors = [AutoImageProcessor.from_pretrained(name) for name in args.encoders]
        looks = [(list(one.image_mean), list(one.image_std)) for one in processors]
    given = json.loads(args.encoder_options) or [{}] * len(encoders)
    options = [
        {"image_mean": mean, "image_std": std, "frozen": True} | own
        for (mean, std), own in zip(looks, given, strict=True)
    ]
    tower = MultiEncoderModel.from_encoders(
        encoders,
        encoder_options=options,
        image_size=args.image_size,
        image_mean=looks[0][0],
        image_std=looks[0][1],
        fusion_type=args.fusion,
        fusion_options=json.loads(args.fusion_options),
    )

    # 2. A language model: loaded, or a small one whose tokenizer knows the training captions
    if args.language_model:
        tokenizer = AutoTokenizer.from_pretrained(args.language_model)
        language_model = AutoModelForCausalLM.from_pretrained(args.language_model)
        tokenizer.add_tokens(["<image>"], special_tokens=True)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        language_model.resize_token_embeddings(max(len(tokenizer), language_model.config.vocab_size))
    else:
        tokenizer = train_causal_tokenizer([args.prompt, "USER: ASSISTANT:", *train.corpus()], vocab_size=3000)
        config = small_language_config(tokenizer, *((48, 1, 2) if args.tiny else ()))
        language_model = AutoModelForCausalLM.from_config(config)
    image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    model = MultiEncoderVlmForConditionalGeneration.from_models(tower, language_model, image_token_id)
    tiling = {"max_tiles": args.max_tiles} if args.max_tiles else None
    processor = MultiEncoderVlmProcessor.from_model_config(model.config, tokenizer, tiling=tiling)
    train = VlmDataset(train, processor, args.prompt, draw=True, seed=args.seed)
    val = VlmDataset(val, processor, args.prompt)

    # 3. Two stages, the second from where the first ended
    metrics = {}
    for number, (stage, steps, rate) in enumerate(zip(STAGES, args.steps, args.lr, strict=True), start=1):
        metrics = train_vlm(
            model,
            train,
            val,
            output_dir=out / f"stage-{number}",
            stage=stage,
            resume=args.resume,
            sample_captions=args.show,
            cache_features=args.cache_features or None,
            max_steps=steps,
            learning_rate=rate,
            per_device_train_batch_size=args.batch_size,
            save_strategy="steps",
            save_steps=args.eval_every,
            logging_steps=args.eval_every,
            eval_on_start=True,
            seed=args.seed,
        )
        state = json.loads((out / f"stage-{number}" / "trainer_state.json").read_text())
        before = next(entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry)
        print(stage_table(part_rows(model)))
        print(f"stage {number}: validation loss per token {before:.3f} before, {metrics['loss']:.3f} after")

    # 4. What it says about images it has not seen
    shown = range(min(args.show, len(val)))
    pictures = [val.records.pictures(index) for index in shown]
    truths = [val.records.texts(index)[0] if val.records.texts(index) else "" for index in shown]
    captions = generate_captions(model, processor, pictures, args.prompt)
    write_caption_sheet(out / "captions.png", [group[0] for group in pictures], captions, truths)
    for caption, truth in zip(captions, truths, strict=True):
        print(f"  {caption}\n    true: {truth}")
    return metrics


if __name__ == "__main__":
    main()
