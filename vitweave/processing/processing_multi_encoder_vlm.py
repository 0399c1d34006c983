"""Images and text of a vision-language model to tensors: each placeholder repeated as often as its image has tokens."""

from collections.abc import Sequence

from transformers.image_processing_utils import BatchFeature
from transformers.processing_utils import MultiModalData, ProcessorMixin

from vitweave.configuration.image_tokens import check_token_layout, tokens_per_image
from vitweave.processing.chat_templates import chat_template_for
from vitweave.processing.image_placeholders import check_placeholders, split_by_sample
from vitweave.processing.image_processing_pil_multi_encoder import MultiEncoderImageProcessorPil
from vitweave.processing.multi_encoder_steps import images_per_sample


class MultiEncoderVlmProcessor(ProcessorMixin):
    """A `MultiEncoderImageProcessor(Pil)` and a tokenizer that knows the image token.

    Returns `input_ids` and `attention_mask`, and for images `pixel_values` (tiles of all images, channels, height,
    width), `num_tiles` (images,) and `image_sizes` (images, 2). Images are a nested list with one list per text, or a
    flat list that is dealt out by the placeholders; the images of one text share the tiles. Texts are padded on the
    left, where generation needs it, unless the call says `padding_side`.

    Args:
        num_image_tokens: what the tower returns for one tile.
        grid: (rows, columns) of these tokens; needed by the next two.
        image_newline: one more token ends each row of the grid (Cambrian-1).
        unpad: only rows and columns that show the image and not the square padding are kept (Cambrian-1).
        image_token: the placeholder, one per image in the text.
        image_start_token, image_end_token: stand around the tokens of an image, as LEO's `<img>` and `</img>`.
        token_budget: the most tokens of a sample, text and images; longer ones are refused.
        chat_template: None is the tokenizer's, taught to take images, or a plain one (`chat_templates.py`).
    """

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        num_image_tokens: int = 576,
        grid: Sequence[int] | None = None,
        image_newline: bool = False,
        unpad: bool = False,
        image_token: str = "<image>",
        image_start_token: str | None = None,
        image_end_token: str | None = None,
        token_budget: int | None = None,
        chat_template: str | None = None,
        **kwargs,
    ):
        super().__init__(image_processor, tokenizer, chat_template=chat_template, **kwargs)
        self.num_image_tokens = num_image_tokens
        self.grid = None if grid is None else list(grid)
        self.image_newline, self.unpad = image_newline, unpad
        self.image_token, self.image_start_token, self.image_end_token = image_token, image_start_token, image_end_token
        self.token_budget = token_budget
        check_token_layout(num_image_tokens, grid, image_newline, unpad)
        check_unpadding(unpad, image_processor)
        own = {name: token_id(tokenizer, name) for name in (image_token, image_start_token, image_end_token) if name}
        self.image_token_id = own[image_token]
        self.image_token_ids = list(own.values())
        if chat_template is None:
            self.chat_template = chat_template_for(tokenizer.chat_template, image_token)

    @classmethod
    def from_model_config(cls, config, tokenizer, image_processor=None, tiling: dict | None = None, **options):
        """The processor of a `MultiEncoderVlmConfig`.

        Args:
            tokenizer: one that has `config.image_token_id`, as a token of its own.
            image_processor: made from the tower's config if None.
            tiling: options of dynamic tiling, for an image processor that is made here.
            options: arguments of the constructor, over what the config says.
        """
        tower = config.vision_config
        if image_processor is None:
            image_processor = MultiEncoderImageProcessorPil.from_model_config(tower, tiling=tiling)
        if config.image_token_id is None or config.image_token_id >= len(tokenizer):
            raise ValueError(
                f"expected image_token_id below the tokenizer's {len(tokenizer)} tokens, got {config.image_token_id}; "
                "add the image token to the tokenizer, then put its id into the config"
            )
        facts = {
            "num_image_tokens": tower.num_tokens,
            "grid": tower.fused_grid,
            "image_newline": config.image_newline,
            "unpad": config.unpad,
            "image_token": tokenizer.convert_ids_to_tokens(config.image_token_id),
            "token_budget": getattr(config.text_config, "max_position_embeddings", None),
        }
        return cls(image_processor, tokenizer, **facts | options)

    @property
    def model_input_names(self) -> list[str]:
        return [*self.tokenizer.model_input_names, *self.image_processor.model_input_names]

    def __call__(self, images=None, text=None, **kwargs) -> BatchFeature:
        """Encode images, texts, or both; options go to the tokenizer and the image processor as in all processors.

        Args:
            images: one image, a list dealt out by the placeholders, or one list of images per text.
            text: a text or a list of texts, one image token for each image.
        """
        encoded = super().__call__(images=images, text=text, **kwargs)
        if text is not None and self.token_budget is not None:
            self._check_budget(encoded)
        return encoded

    def _merge_kwargs(self, *args, **kwargs) -> dict[str, dict]:
        """Options sorted by modality; a padding side the tokenizer was saved with does not count."""
        merged = super()._merge_kwargs(*args, **kwargs)
        asked = kwargs | (kwargs.get("text_kwargs") or {})
        merged["text_kwargs"]["padding_side"] = asked.get("padding_side") or "left"
        return merged

    def prepare_inputs_layout(self, images=None, text=None, **kwargs):
        """Texts as a list, and images as one list per text."""
        text = [text] if isinstance(text, str) else text
        listed = isinstance(text, (list, tuple)) and len(text) > 0 and all(isinstance(one, str) for one in text)
        if text is not None and not listed:
            raise ValueError(f"expected a text or a list of at least one text, got {type(text).__name__} {text!r:.100}")
        images, text, *others = super().prepare_inputs_layout(
            images=images, text=None if text is None else list(text), **kwargs
        )
        if images is not None and text is not None and images_per_sample(images) is None:
            flat = list(self.image_processor._prepare_images_structure(images))
            images = split_by_sample(flat, self._count_placeholders(text))
        if images_per_sample(images) is not None and not any(images):
            images = None
        return images, text, *others

    def validate_inputs(self, images=None, text=None, **kwargs):
        """Refuse other modalities, and samples whose placeholders are not as many as their images."""
        strange = [name for name in ("videos", "audio") if kwargs.get(name) is not None]
        if strange:
            raise ValueError(f"expected images and text, got {strange} too, which this model does not take")
        if text is not None:
            images = [[] for _ in text] if images is None else images
            check_placeholders(images, self._count_placeholders(text), self.image_token)
        super().validate_inputs(images=images, text=text, **kwargs)

    def _count_placeholders(self, text: list[str]) -> list[int]:
        return [one.count(self.image_token) for one in text]

    def count_tokens(self, num_tiles: int = 1, image_size: Sequence[int] | None = None) -> int:
        """Placeholders of one image, from its tiles and its (height, width)."""
        return tokens_per_image(self.num_image_tokens, num_tiles, self.grid, self.image_newline, self.unpad, image_size)

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        """What one placeholder becomes."""
        size = [int(length) for length in image_inputs["image_sizes"][image_idx]]
        count = self.count_tokens(int(image_inputs["num_tiles"][image_idx]), size)
        return (self.image_start_token or "") + self.image_token * count + (self.image_end_token or "")

    def _get_num_multimodal_tokens(self, image_sizes=None, **kwargs) -> MultiModalData:
        """Tokens and tiles of images that are not read yet, as serving engines ask for them.

        Args:
            image_sizes: (height, width) per image, each a sample of its own; or one such list per sample, whose images
                share the tiles.
        """
        if image_sizes is None:
            return MultiModalData()
        samples = [[one] if one and not isinstance(one[0], (list, tuple)) else one for one in image_sizes]
        tiling = (kwargs.get("images_kwargs") or kwargs).get("tiling")
        around = sum(token is not None for token in (self.image_start_token, self.image_end_token))
        tokens, tiles = [], []
        for own in samples:
            for height, width in own:
                tiles.append(self.image_processor.count_tiles(height, width, len(own), tiling))
                tokens.append(around + self.count_tokens(tiles[-1], (height, width)))
        return MultiModalData(num_image_tokens=tokens, num_image_patches=tiles)

    def _check_special_mm_tokens(self, text, text_inputs, modalities):
        """Refuse placeholders that truncation cut off, with the sample they belong to."""
        try:
            super()._check_special_mm_tokens(text, text_inputs, modalities=modalities)
        except ValueError as error:
            for sample, (one, ids) in enumerate(zip(text, text_inputs["input_ids"], strict=False)):
                expected, found = one.count(self.image_token), [int(index) for index in ids].count(self.image_token_id)
                if expected != found:
                    raise ValueError(
                        f"sample {sample}: its images take {expected} tokens, but {found} of them are left in "
                        f"{len(ids)} tokens; likely cause: truncation to max_length. Raise max_length, truncate the "
                        "text before, or let images take fewer tokens (max_tiles, fewer images)"
                    ) from error
            raise

    def _check_budget(self, encoded: BatchFeature) -> None:
        """Refuse samples with more tokens than the language model takes."""
        masks = encoded.get("attention_mask")
        for sample, ids in enumerate(encoded["input_ids"]):
            ids = [int(index) for index in ids]
            length = len(ids) if masks is None else sum(int(one) for one in masks[sample])
            if length > self.token_budget:
                raise ValueError(
                    f"sample {sample} has {length} tokens, {ids.count(self.image_token_id)} of them of images; the "
                    f"language model takes {self.token_budget}. Give fewer images, lower max_tiles, or shorten the text"
                )


def token_id(tokenizer, token: str) -> int:
    """The id of a token that every text must keep whole, refused where the tokenizer does not know it."""
    index = tokenizer.convert_tokens_to_ids(token)
    read = tokenizer.encode(token + token, add_special_tokens=False)
    if index is None or index == tokenizer.unk_token_id or read.count(index) != 2:
        raise ValueError(
            f"the tokenizer has no token {token!r} of its own (it reads two of them as {read}); add it: "
            f"tokenizer.add_tokens([{token!r}], special_tokens=True), then resize the model's embeddings"
        )
    return index


def check_unpadding(unpad: bool, image_processor) -> None:
    """Refuse to cut padding off where none is added."""
    if not unpad or image_processor is None:
        return
    if image_processor.tiling is not None or image_processor.do_pad_square is False:
        raise ValueError(
            "unpad cuts square padding off the token grid, but this image processor adds none; use do_pad_square=True "
            "and tiling=None, or unpad=False"
        )


__all__ = ["MultiEncoderVlmProcessor"]
