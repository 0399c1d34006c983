"""Generation of text about images that are encoded once, before the first token."""

from torch import Tensor
from transformers import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vitweave.modeling.image_batches import images_per_sample, repeat_by_sample

IMAGE_INPUTS = ("pixel_values", "num_tiles", "image_sizes", "encoder_outputs")


class ImageGenerationMixin(GenerationMixin):
    """What `generate` does with images, alike in every supported version of transformers.

    A model has `get_image_features` with the arguments `IMAGE_INPUTS`, and takes what it returns as
    `mm_encoder_outputs={"image": ...}`.
    """

    def prepare_inputs_for_generation(self, *args, is_first_iteration: bool = False, **kwargs) -> dict:
        """As in transformers; what was read of the images is in the cache after the first step."""
        inputs = super().prepare_inputs_for_generation(*args, is_first_iteration=is_first_iteration, **kwargs)
        if not is_first_iteration and kwargs.get("use_cache", True):
            for name in (*IMAGE_INPUTS, "mm_encoder_outputs"):
                inputs.pop(name, None)
        return inputs

    def with_images_encoded(self, inputs: dict) -> dict:
        """The inputs of `generate` with images encoded once and for all steps."""
        given = {name: inputs.pop(name, None) for name in IMAGE_INPUTS}
        if given["pixel_values"] is not None or given["encoder_outputs"] is not None:
            inputs["mm_encoder_outputs"] = {"image": self.get_image_features(**given, return_dict=True)}
        return inputs

    def _prepare_multimodal_encoder_kwargs_for_generation(self, model_kwargs: dict) -> dict:
        return self.with_images_encoded(model_kwargs)  # transformers would drop encoder_outputs unread

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **model_kwargs,
    ) -> tuple[Tensor | None, dict]:
        """As in transformers, with the images of a sample for each of its beams."""
        model_kwargs = self.with_images_encoded(model_kwargs)
        encoded = model_kwargs.pop("mm_encoder_outputs", None)
        if expand_size > 1 and encoded and encoded.get("image") is not None:
            images = encoded["image"].pooler_output
            mask = self.base_model.get_placeholder_mask(input_ids, model_kwargs.get("inputs_embeds", input_ids))
            counts = images_per_sample(mask.sum(dim=(1, 2)).tolist(), [len(one) for one in images])
            repeated = BaseModelOutputWithPooling(pooler_output=repeat_by_sample(images, counts, expand_size))
            encoded = {**encoded, "image": repeated}
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        return input_ids, model_kwargs if encoded is None else {**model_kwargs, "mm_encoder_outputs": encoded}
