"""Coloured pictures whose captions say their colour, for the tiny vision-language model."""

import json

import numpy as np
import PIL.Image

from vitweave.training.vlm_data import VlmDataset

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 60), "blue": (40, 60, 220)}


def coloured(index: int, size=(40, 32)) -> PIL.Image.Image:
    noise = np.random.default_rng(index).integers(-20, 20, (size[1], size[0], 3))
    return PIL.Image.fromarray((np.array(list(COLOURS.values())[index % 3]) + noise).clip(0, 255).astype(np.uint8))


def captioned(length: int, size=(40, 32)) -> list[dict]:
    names = list(COLOURS)
    return [{"image": coloured(i, size), "caption": f"a {names[i % 3]} car .", "id": f"r{i}"} for i in range(length)]


def written(folder, records: list[dict]) -> list[dict]:
    """Records with their pictures as files of a folder, and their jsonl."""
    lines = []
    for number, record in enumerate(records):
        record = dict(record)
        for name in ("image", "images"):
            if name in record:
                pictures = record[name] if isinstance(record[name], list) else [record[name]]
                paths = [f"{number}-{place}.png" for place in range(len(pictures))]
                for path, picture in zip(paths, pictures, strict=True):
                    picture.save(folder / path)
                record[name] = paths if isinstance(record[name], list) else paths[0]
        lines.append(record)
    (folder / "captions.jsonl").write_text("\n".join(json.dumps(record) for record in lines))
    return lines


def mixed_records() -> list[dict]:
    """One image, two images, text alone, a conversation of two turns."""
    said = {"role": "assistant", "content": "two dog ."}
    turns = [{"role": "user", "content": "<image>what is this ?"}, {"role": "assistant", "content": "a cat ."}]
    turns += [{"role": "user", "content": "what of the dog ?"}, {"role": "assistant", "content": "one red dog ."}]
    parts = [{"type": "image"}, {"type": "text", "text": "and"}, {"type": "image"}]
    asked = {"role": "user", "content": parts}
    return [
        *captioned(1),
        {"id": "two", "images": [coloured(1), coloured(2, (20, 60))], "messages": [asked, said]},
        {"id": "text", "messages": [{"role": "user", "content": "what is red ?"}, said]},
        {"id": "turns", "image": coloured(4, (64, 20)), "messages": turns},
    ]


def tiny_dataset(length: int, processor, start: int = 0, **options) -> VlmDataset:
    return VlmDataset(captioned(start + length)[start:], processor, prompt="what is in this picture ?", **options)
