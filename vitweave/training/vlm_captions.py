"""What a vision-language model says about images: captions in batches, and a sheet of images with them."""

from collections.abc import Sequence
from pathlib import Path

import PIL.Image
from torch import nn
from transformers import TrainerCallback
from transformers.utils import logging

from vitweave.processing.figure_steps import figure_box
from vitweave.processing.image_steps import picture_to_rgb
from vitweave.training.heat_maps import text_block
from vitweave.training.modes import evaluating
from vitweave.training.vlm_data import VlmDataset
from vitweave.training.vlm_text import PROMPT, ConversationEncoder, caption_messages

GROUND = (255, 255, 255)
GAP = 8  # pixels


def generate_captions(
    model: nn.Module,
    processor,
    images: Sequence,
    prompt: str = PROMPT,
    max_new_tokens: int = 40,
    batch_size: int = 8,
    **options,
) -> list[str]:
    """One text per entry of `images`, greedily unless `options` say otherwise.

    Args:
        model: a `MultiEncoderVlmForConditionalGeneration`, or a PEFT model of one.
        processor: its `MultiEncoderVlmProcessor`.
        images: pictures, or a list of pictures for each text.
        options: of `generate`, e.g. `num_beams`.
    """
    tokenizer, texts = processor.tokenizer, []
    write = ConversationEncoder(processor)
    groups = [list(entry) if isinstance(entry, (list, tuple)) else [entry] for entry in images]
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    options = {"do_sample": False, "use_cache": True} | {k: v for k, v in ends.items() if v is not None} | options
    bar = logging.tqdm(total=len(groups), desc="Captions", unit="text", disable=len(groups) <= batch_size)
    with bar, evaluating(model):
        for start in range(0, len(groups), batch_size):
            batch = groups[start : start + batch_size]
            asked = [write.render(caption_messages(prompt, len(group)), answer_next=True) for group in batch]
            special = write.adds_special_tokens(asked[0])
            pictures = batch if any(batch) else None
            inputs = processor(pictures, asked, padding=True, add_special_tokens=special, return_tensors="pt")
            inputs = inputs.to(next(model.parameters()).device)
            said = model.generate(**inputs, max_new_tokens=max_new_tokens, **options)
            said = said[:, inputs["input_ids"].shape[1] :]
            texts += [text.strip() for text in tokenizer.batch_decode(said, skip_special_tokens=True)]
            bar.update(len(batch))
    return texts


def caption_tile(picture: PIL.Image.Image, lines: Sequence[str], size: int) -> PIL.Image.Image:
    """One picture, whole, above its texts."""
    picture = picture_to_rgb(picture)
    top, left, height, width = figure_box((picture.height, picture.width), (size, size))
    blocks = [text_block(line, size) for line in lines]
    tile = PIL.Image.new("RGB", (size, size + sum(block.height for block in blocks)), GROUND)
    tile.paste(picture.resize((width, height), PIL.Image.Resampling.BICUBIC), (left, top))
    below = size
    for block in blocks:
        tile.paste(block, (0, below))
        below += block.height
    return tile


def write_caption_sheet(
    path: str | Path,
    pictures: Sequence[PIL.Image.Image],
    captions: Sequence[str],
    truths: Sequence[str] | None = None,
    columns: int = 4,
    size: int = 220,
) -> None:
    """Write pictures row by row, each above its caption and, where given, the true one."""
    if not pictures or len(pictures) != len(captions):
        raise ValueError(f"expected a caption per picture, got {len(captions)} for {len(pictures)} pictures")
    texts = [[f"> {caption}"] for caption in captions]
    if truths is not None:
        texts = [[*lines, f"true: {truth}"] for lines, truth in zip(texts, truths, strict=True)]
    tiles = [caption_tile(picture, lines, size) for picture, lines in zip(pictures, texts, strict=True)]
    columns = min(columns, len(tiles))
    rows = [tiles[start : start + columns] for start in range(0, len(tiles), columns)]
    heights = [max(tile.height for tile in row) for row in rows]
    sheet = PIL.Image.new("RGB", (columns * (size + GAP) + GAP, sum(heights) + GAP * (len(rows) + 1)), GROUND)
    top = GAP
    for row, height in zip(rows, heights, strict=True):
        for column, tile in enumerate(row):
            sheet.paste(tile, (GAP + column * (size + GAP), top))
        top += height + GAP
    sheet.save(path)


class CaptionSamples(TrainerCallback):
    """Writes `captions-<step>.png` into the run's folder at every evaluation: the first images with captions.

    Args:
        dataset: records whose first captions are the true ones.
        count: how many.
        prompt: None is the dataset's first.
    """

    def __init__(self, dataset: VlmDataset, count: int, prompt: str | None = None, max_new_tokens: int = 40):
        self.dataset, self.max_new_tokens = dataset, max_new_tokens
        self.prompt = dataset.prompts[0] if prompt is None else prompt
        found = (index for index in range(len(dataset)) if dataset.records.texts(index) and dataset.count_images(index))
        self.chosen = [index for index, _ in zip(found, range(count), strict=False)]

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        if not state.is_world_process_zero or not self.chosen:
            return
        records = self.dataset.records
        pictures = [records.pictures(index) for index in self.chosen]
        captions = generate_captions(model, self.dataset.processor, pictures, self.prompt, self.max_new_tokens)
        truths = [records.texts(index)[0] for index in self.chosen]
        path = Path(args.output_dir) / f"captions-{state.global_step}.png"
        write_caption_sheet(path, [group[0] for group in pictures], captions, truths)
