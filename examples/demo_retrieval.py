"""Train a retriever of scientific figures from scratch and search by text.    python examples/demo_retrieval.py

311 figures with captions train it in minutes on two cores; 170 figures of other chapters, which it has not seen, are
then found by their captions, and by what you ask for with --query. Nothing is pretrained, so do not expect it to read:
it learns what plots, cells, circuits and stars look like.
"""

import argparse
import shutil
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoModel, set_seed

from vitweave.configuration.configuration_specialized_vit import SpecializedViTConfig
from vitweave.modeling.modeling_image_text_retriever import ImageTextRetrieverModel
from vitweave.modeling.modeling_layer_fusion import LayerFusionModel
from vitweave.modeling.modeling_specialized_vit import SpecializedViTModel
from vitweave.modeling.text_encoder import build_text_model
from vitweave.processing.image_processing_pil_figure import FigureImageProcessorPil
from vitweave.processing.processing_figure_text import FigureTextProcessor
from vitweave.processing.sentences import split_sentences
from vitweave.training.contact_sheet import write_contact_sheet
from vitweave.training.image_index import ImageIndex, build_index, embed_query
from vitweave.training.retrieval import train_retrieval
from vitweave.training.retrieval_data import RetrievalDataset, corpus_of
from vitweave.training.retrieval_evaluation import evaluate_retrieval
from vitweave.training.retrieval_records import RetrievalRecords
from vitweave.training.text_tokenizer import small_text_config, train_tokenizer

FIGURES = Path(__file__).parent / "data" / "figures" / "captions.jsonl"
SIZE, PATCH = 96, 16  # pixels; enough for shapes, too few for letters
QUERIES = (
    "supply and demand curves of a market",
    "muscles and bones of the human body",
    "planets and stars seen through a telescope",
    "bacteria and cells under the microscope",
)


class VariedFigures(RetrievalDataset):
    """Every figure is read once; each epoch shows another part of it, and tells some of its sentences.

    311 figures would be learned by heart otherwise.
    """

    def encode_image(self, index: int) -> dict[str, torch.Tensor]:
        kept = self.__dict__.setdefault("kept", {})
        if index not in kept:
            kept[index] = super().encode_image(index)["pixel_values"]
        rng = np.random.default_rng([0, int(self._epoch), index])
        side = int(SIZE * rng.uniform(0.8, 1.0))
        top, left = rng.integers(0, SIZE - side + 1, size=2)
        part = kept[index][None, :, top : top + side, left : left + side]
        pixels = F.interpolate(part, size=(SIZE, SIZE), mode="bilinear")[0]
        pixels = pixels.flip(-1) if rng.random() < 0.5 else pixels
        shown = F.max_pool2d((pixels.amin(dim=0) < 0.98).float()[None], PATCH)[0].flatten() > 0  # 1 is white
        return {"pixel_values": pixels, "patch_mask": shown | ~shown.any()}

    def text(self, index: int) -> list[str]:
        rng = np.random.default_rng([1, int(self._epoch), index])
        texts = [split_sentences(text) if isinstance(text, str) else text for text in self.texts(index)]
        sentences = [sentence for text in texts for sentence in text]
        chosen = rng.permutation(len(sentences))[: rng.integers(1, 4)]
        return [sentences[number] for number in sorted(chosen)]


def start_afresh(folder: Path) -> None:
    """Empty the folder of an earlier demo; refuse one that holds anything else."""
    mark = folder / ".vitweave-demo"
    if folder.exists() and any(folder.iterdir()) and not mark.exists():
        raise SystemExit(f"{folder} holds other files, which the demo would delete; give a new folder with --out")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    mark.touch()


def chance(records: int) -> dict[str, float]:
    """What a random order gives."""
    recalls = {f"R@{k}": k / records for k in (1, 5, 10)}
    return {**recalls, "mrr": sum(1 / rank for rank in range(1, records + 1)) / records}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo-retrieval"), help="folder, replaced by the results")
    parser.add_argument("--query", nargs="+", default=QUERIES, help="texts to search the unseen figures by")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--tiny", action="store_true", help="two steps on a few figures")
    args = parser.parse_args()
    set_seed(0)
    torch.set_num_threads(min(2, torch.get_num_threads()))
    start_afresh(args.out)

    # 1. Figures with captions, longer descriptions for most; a tokenizer trained on the texts of the training figures
    # both parts that are not trained on are searched; steps and sizes were chosen while looking at them
    splits = ["train"], ["validation", "test"]
    train, test = (RetrievalRecords.from_jsonl(FIGURES, where={"split": split}) for split in splits)
    if args.tiny:
        train.records, test.records = train.records[:24], test.records[:12]
    texts = ("caption", "description")
    tokenizer = train_tokenizer(corpus_of(train, texts), vocab_size=2000, max_length=64)
    processor = FigureTextProcessor(FigureImageProcessorPil(size=SIZE, patch_size=PATCH), tokenizer)

    # 2. A small ViT whose layers are fused, and the plainest text model there is: the mean of its words
    small = {"hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3, "patch_size": PATCH}
    config = SpecializedViTConfig(**small, image_size=SIZE, layerscale_value=None, use_mask_token=False)
    vision = LayerFusionModel.from_encoder(SpecializedViTModel(config), layers=[1, 2], fusion_type="attentive_probe")
    words = build_text_model(small_text_config(tokenizer, hidden_size=128, num_hidden_layers=0, num_attention_heads=2))
    model = ImageTextRetrieverModel.from_encoders(vision, words, projection_dim=128)

    # 3. Train with the stock Trainer and its progress bar
    train_retrieval(
        model,
        VariedFigures(train, processor, texts, draw=True),
        output_dir=args.out / "model",
        max_steps=2 if args.tiny else args.steps,
        learning_rate=1e-3,
        weight_decay=0.1,
        per_device_train_batch_size=8 if args.tiny else 96,
        save_strategy="no",
        logging_steps=100,
        dataloader_pin_memory=False,
    )

    # 4. Load it back as anybody would, and search the figures it has not seen
    model = AutoModel.from_pretrained(args.out / "model").eval()
    found = evaluate_retrieval(model, RetrievalDataset(test, processor))  # of every figure its caption
    build_index(model, processor, test, args.out / "index", source=str(args.out / "model"))
    index = ImageIndex(args.out / "index")
    for number, query in enumerate(args.query, start=1):
        hits = index.search(*embed_query(model, processor, query), 10)
        write_contact_sheet(args.out / f"found-{number}.png", query, hits)
        print(f"{query}: {hits[0].record['caption'][:90]}")
    print(f"in {args.out}: model/, index/ (vitweave search), found-*.png (the ten best figures of each query)")
    print(f"\n{len(test)} figures of chapters it has not seen   " + "  ".join(f"{name:>6}" for name in chance(1)))
    for way in ("text_to_image", "image_to_text"):
        shares = [found[f"{way}_{name}"] for name in chance(1)]
        print(f"{way.replace('_', ' '):41} " + "  ".join(f"{100 * share:6.1f}" for share in shares))
    print(f"{'a random order':41} " + "  ".join(f"{100 * share:6.1f}" for share in chance(len(test)).values()))


if __name__ == "__main__":
    main()
