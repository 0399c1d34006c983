"""Train a retriever of figures and captions: any vision encoder, its layers fused, and a small text model.

    python examples/train_retrieval.py --tiny
    python examples/train_retrieval.py --data figures/ --encoder facebook/dinov2-small --fusion film

Data is a folder with `captions.jsonl` (image, caption, sentences, split), such a file, or a `datasets` id. With
`--mode frozen --cache_features FOLDER` every image is encoded once.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from transformers import AutoModel, AutoTokenizer, HfArgumentParser, set_seed
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # top-level, 5.13 wants torchvision

from vitweave.configuration.configuration_specialized_vit import SpecializedViTConfig
from vitweave.hub.run_card import save_run_card
from vitweave.modeling.layer_fusion.registry import LAYER_FUSIONS
from vitweave.modeling.modeling_image_text_retriever import ImageTextRetrieverModel
from vitweave.modeling.modeling_layer_fusion import LayerFusionModel
from vitweave.modeling.modeling_specialized_vit import SpecializedViTModel
from vitweave.modeling.text_encoder import build_text_model
from vitweave.processing.image_processing_pil_figure import FigureImageProcessorPil
from vitweave.processing.processing_figure_text import FigureTextProcessor
from vitweave.training.contact_sheet import write_contact_sheet
from vitweave.training.heat_maps import write_heat_maps
from vitweave.training.image_index import ImageIndex, build_index, embed_query
from vitweave.training.pointing import pointing_test
from vitweave.training.retrieval import train_retrieval
from vitweave.training.retrieval_data import RetrievalDataset, corpus_of
from vitweave.training.retrieval_evaluation import evaluate_retrieval
from vitweave.training.retrieval_records import open_records
from vitweave.training.synthetic_figures import write_figures
from vitweave.training.text_tokenizer import small_text_config, train_tokenizer

SHOWN = [f"{way}_{what}" for way in ("image_to_text", "text_to_image") for what in ("R@1", "R@5", "R@10", "mrr")]


@dataclass
class Arguments:
    data: str = field(default="", metadata={"help": "jsonl, folder with captions.jsonl, or `datasets` id"})
    encoder: str = field(default="", metadata={"help": "a ViT to specialise (folder or id); empty: a small one anew"})
    text_encoder: str = field(default="", metadata={"help": "folder or id; empty: a small one and its tokenizer, anew"})
    fusion: str = field(default="", metadata={"help": "layer fusion; empty: none", "choices": ["", *LAYER_FUSIONS]})
    fusion_options: str = field(default="{}", metadata={"help": 'JSON, e.g. {"dense": true}'})
    layers: str = field(default="quarters", metadata={"help": "preset of the layers to fuse"})
    mode: str = field(default="frozen", metadata={"help": "of the vision encoder", "choices": ["frozen", "full"]})
    cache_features: str = field(default="", metadata={"help": "folder for the features of a frozen encoder"})
    local_loss_weight: float = field(default=0.5, metadata={"help": "of tile <-> sentence alignment; 0: none"})
    loss: str = field(default="infonce", metadata={"choices": ["infonce", "siglip"]})
    text_columns: list[str] = field(default_factory=lambda: ["caption"], metadata={"help": "one is drawn per epoch"})
    size: int = 224
    max_length: int = 96
    steps: int = 1000
    eval_every: int = 200
    batch_size: int = 64
    chunk_size: int = field(default=0, metadata={"help": "pairs in memory at a time; 0: the batch"})
    lr: float = 5e-4
    encoder_lr_scale: float = 0.1
    seed: int = 0
    out: str = "runs/retrieval"
    resume: bool = False
    test: bool = field(default=False, metadata={"help": "report on the split `test` instead, once"})
    query: str = field(default="", metadata={"help": "a text to search by; empty: the first caption"})
    tiny: bool = field(default=False, metadata={"help": "a dry run on drawn figures, in seconds"})


def main() -> dict[str, float]:
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    out = Path(args.out)
    if args.tiny:
        args.data, args.size, args.batch_size, args.steps, args.eval_every = str(out / "figures"), 64, 8, 20, 10
        write_figures(args.data, {"train": 32, "validation": 8, "test": 8})
    elif not args.data:
        raise SystemExit("--data is missing: give a jsonl, a folder or an id, or --tiny")
    set_seed(args.seed)

    # 1. A text model: loaded, or a small one with a tokenizer trained on the captions of the training split
    train, val = (open_records(args.data, split) for split in ("train", "validation"))
    if args.text_encoder:
        tokenizer = AutoTokenizer.from_pretrained(args.text_encoder)
        text_model = AutoModel.from_pretrained(args.text_encoder)
    else:
        tokenizer = train_tokenizer(corpus_of(train, args.text_columns), max_length=args.max_length)
        text_model = build_text_model(small_text_config(tokenizer, *((48, 1, 1) if args.tiny else ())))

    # 2. A specialised ViT, its layers fused; whole figures on a white square
    normalisation = {}
    if args.encoder:
        vision, own = SpecializedViTModel.from_vit(args.encoder), AutoImageProcessor.from_pretrained(args.encoder)
        normalisation = {"image_mean": own.image_mean, "image_std": own.image_std}
    else:
        small = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "patch_size": 8}
        vision = SpecializedViTModel(SpecializedViTConfig(**small, image_size=args.size, use_mask_token=False))
    images = FigureImageProcessorPil(size=args.size, patch_size=vision.config.patch_size, **normalisation)
    if args.fusion:
        options = json.loads(args.fusion_options)
        vision = LayerFusionModel.from_encoder(
            vision, layers=args.layers, fusion_type=args.fusion, fusion_options=options
        )
    processor = FigureTextProcessor(images, tokenizer)
    train = RetrievalDataset(train, processor, args.text_columns, draw=True, seed=args.seed)
    val = RetrievalDataset(val, processor, args.text_columns[:1])

    # 3. Both towers under one contrastive loss, global and tile <-> sentence; train, keep the best checkpoint by RSUM
    model = ImageTextRetrieverModel.from_encoders(
        vision,
        text_model,
        freeze_vision_encoder=args.mode == "frozen" and bool(args.encoder),
        contrastive_loss=args.loss,
        local_loss_weight=args.local_loss_weight,
    )
    arguments = {"max_steps": args.steps, "save_strategy": "steps", "save_steps": args.eval_every, "seed": args.seed}
    metrics = train_retrieval(
        model,
        train,
        val,
        output_dir=out,
        resume=args.resume,
        encoder_lr_scale=args.encoder_lr_scale if args.encoder else 1.0,
        embedding_chunk_size=args.chunk_size or None,
        cache_features=args.cache_features or None,
        learning_rate=args.lr,
        per_device_train_batch_size=args.batch_size,
        **arguments,
    )

    # 4. What it finds, on its card too, and where sentences point
    report, columns, split = val, args.text_columns[:1], "test" if args.test else "validation"
    if args.test:
        report = RetrievalDataset(open_records(args.data, split), processor, columns)
        metrics = evaluate_retrieval(model, report)
    if args.local_loss_weight:
        metrics |= pointing_test(model, report)
        caption = report.sentences(0)
        write_heat_maps(out / "heat_maps.png", model, processor, report.picture(0), caption)
    build_index(model.eval(), processor, report.records, out / "index", source=str(out))
    query = args.query or report.corpus()[0]
    hits = ImageIndex(out / "index").search(*embed_query(model, processor, query), 10)
    write_contact_sheet(out / "found.png", query, hits)
    rankings = ["", "combined_"] if args.local_loss_weight else [""]
    for ranking in rankings:
        print(" | ".join([f"{ranking}ranking", *(f"{name} {100 * metrics[ranking + name]:.1f}" for name in SHOWN)]))
        low, high = (100 * metrics[f"{ranking}rsum_{end}"] for end in ("low", "high"))
        print(f"{ranking}RSUM {100 * metrics[f'{ranking}rsum']:.1f} ({low:.1f} to {high:.1f})")
    if args.local_loss_weight:
        print(f"pointing accuracy {metrics['pointing_accuracy']:.3f}, chance {metrics['pointing_chance']:.3f}")
    if not args.tiny and Path(args.data).exists():
        shown = [f"{ranking}{name}" for ranking in rankings for name in ("rsum", *SHOWN)]
        save_run_card(out, args.data, split, [(name, metrics[name], {"text_columns": columns}) for name in shown])
    return metrics


if __name__ == "__main__":
    main()
