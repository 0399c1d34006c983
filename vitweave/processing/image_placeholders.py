"""Which images belong to which text of a batch, checked before anything is computed."""

from collections.abc import Sequence


def split_by_sample(images: list, placeholders: Sequence[int]) -> list[list]:
    """A flat list of images as one list per text, in the order of their placeholders.

    Where the numbers differ no split is right: then one image per text if there are as many, else all go to the last
    text that has placeholders, and `check_placeholders` says so.
    """
    if len(placeholders) == 1:
        return [list(images)]
    if sum(placeholders) != len(images) and len(images) == len(placeholders):
        return [[image] for image in images]
    samples, start = [], 0
    for count in placeholders:
        samples.append(list(images[start : start + count]))
        start += count
    left_over = list(images[start:])
    if left_over:
        last = max((index for index, count in enumerate(placeholders) if count), default=len(samples) - 1)
        samples[last] += left_over
    return samples


def likely_cause(expected: int, found: int, image_token: str) -> str:
    """What usually stands behind a text with `found` placeholders and `expected` images."""
    if found == 0:
        return f"the text has no {image_token!r}: write one where each image belongs, or use apply_chat_template"
    if expected == 0:
        return f"no image came with this text: pass it, or remove the {image_token!r} it speaks of"
    if found > 100 * expected:
        return f"the placeholders were expanded already: write one {image_token!r} per image, they are repeated here"
    if found > expected:
        return f"an image is missing, or the text speaks of {image_token!r} literally"
    return f"an {image_token!r} is missing in the text, or images of another sample came with it"


def check_placeholders(images: Sequence[Sequence], placeholders: Sequence[int], image_token: str) -> None:
    """Refuse the first sample whose placeholders are not as many as its images."""
    if len(images) != len(placeholders):
        raise ValueError(
            f"expected one list of images per text, got {len(images)} lists for {len(placeholders)} texts; give [] to "
            "a text without images"
        )
    for sample, (own, found) in enumerate(zip(images, placeholders, strict=True)):
        if len(own) != found:
            raise ValueError(
                f"sample {sample}: expected one {image_token!r} for each of its images ({len(own)}), found {found} in "
                f"the text; likely cause: {likely_cause(len(own), found, image_token)}"
            )
