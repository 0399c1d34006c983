"""A vision-language model: a tower of vision encoders, a projector, and a causal language model."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast, LlavaModelOutputWithPast
from transformers.utils.generic import can_return_tuple

from vitweave.configuration.configuration_multi_encoder_vlm import MultiEncoderVlmConfig
from vitweave.configuration.reductions import as_pair
from vitweave.modeling.image_batches import check_images, image_lengths, images_per_sample
from vitweave.modeling.image_generation import ImageGenerationMixin
from vitweave.modeling.modeling_multi_encoder import EncodedByAll
from vitweave.modeling.multi_encoder_vlm_base import MultiEncoderVlmPreTrainedModel
from vitweave.modeling.own_models import build_model
from vitweave.modeling.pretrained import keep_weights
from vitweave.modeling.projectors import build_projector
from vitweave.modeling.visible_tokens import ImageNewline, shown_tokens


class MultiEncoderVlmModel(MultiEncoderVlmPreTrainedModel):
    """Tower, projector and language model, without the head on top.

    Args:
        vision_tower, language_model: taken as they are, weights and all; None builds them from the config.
    """

    def __init__(
        self,
        config: MultiEncoderVlmConfig,
        vision_tower: PreTrainedModel | None = None,
        language_model: PreTrainedModel | None = None,
    ):
        super().__init__(config)
        self.vision_tower = build_model(config.vision_config) if vision_tower is None else vision_tower
        width = config.text_config.hidden_size
        self.multi_modal_projector = build_projector(
            config.projector_type, config.vision_config.fused_size, width, **(config.projector_options or {})
        )
        self.image_newline = ImageNewline(width) if config.image_newline else None
        self.language_model = build_model(config.text_config) if language_model is None else language_model
        self.post_init()
        self.freeze()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    # Images ----------------------------------------------------------------------------------------------------------

    def see(
        self,
        pixel_values: Tensor | None,
        image_sizes: Tensor | None,
        encoder_outputs: EncodedByAll | None,
        **kwargs,
    ) -> tuple[Tensor, list[int] | int, BaseModelOutputWithPooling]:
        """The tokens of all tiles one after the other, (tokens, hidden); how many each tile has; the tower's output."""
        if not self.config.unpad:
            image_sizes = None  # nobody says that these images were padded to squares
        elif image_sizes is None:
            raise ValueError("unpad=True needs image_sizes (images, 2), the (height, width) before square padding")
        seen = self.vision_tower(
            pixel_values, image_sizes=image_sizes, encoder_outputs=encoder_outputs, return_dict=True, **kwargs
        )
        tokens = self.multi_modal_projector(seen.last_hidden_state)  # (tiles, tokens, hidden)
        if self.image_newline is None and not self.config.unpad:
            return tokens.flatten(0, 1), tokens.shape[1], seen
        if pixel_values is None:
            grid = self.vision_tower.fusion.plan_for([tuple(part.shape[-2:]) for part in encoder_outputs["maps"]]).grid
        else:
            grid = self.config.vision_config.plan_for(tuple(pixel_values.shape[-2:])).grid
        newline = None if self.image_newline is None else self.image_newline(tokens)
        return *shown_tokens(tokens, grid, image_sizes, newline), seen

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: Tensor | None = None,
        num_tiles: Tensor | None = None,
        image_sizes: Tensor | None = None,
        encoder_outputs: EncodedByAll | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """What the language model reads of images.

        Args:
            pixel_values: (tiles, channels, height, width), the tiles of all images.
            num_tiles: (images,), int64; None is one tile per image.
            image_sizes: (images, 2), int64, (height, width) before square padding; needed by `unpad`.
            encoder_outputs: instead of pixel_values, what `encode` returned for them.

        Returns:
            pooler_output, one (tokens, hidden) per image; last_hidden_state (tiles, tokens, channels) of the tower.
        """
        check_images(pixel_values, num_tiles, image_sizes, encoder_outputs, self.config.unpad)
        tokens, per_tile, seen = self.see(pixel_values, image_sizes, encoder_outputs, **kwargs)
        return BaseModelOutputWithPooling(
            last_hidden_state=seen.last_hidden_state,
            pooler_output=list(tokens.split(image_lengths(tokens, per_tile, num_tiles))),
            hidden_states=seen.hidden_states,
            attentions=seen.attentions,
        )

    def get_placeholder_mask(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor,
        image_features: Tensor | None = None,
        lengths: list[int] | None = None,
    ) -> Tensor:
        """Where the text has image tokens, (batch, tokens, 1); refused where their number is not that of the images.

        Args:
            image_features: (tokens, hidden) of all images.
            lengths: tokens of every image; None takes them for one image, or checks nothing if there are none.
        """
        if input_ids is None:
            token = torch.full((), self.config.image_token_id, dtype=torch.long, device=inputs_embeds.device)
            mask = (inputs_embeds == self.get_input_embeddings()(token)).all(-1)
        else:
            mask = input_ids == self.config.image_token_id
        if lengths is None and image_features is not None:
            lengths = [image_features.shape[0]]
        if lengths is not None and not torch.compiler.is_compiling():
            images_per_sample(mask.sum(dim=1).tolist(), lengths)
        return mask.unsqueeze(-1).to(inputs_embeds.device)

    def without_images(self, input_ids: Tensor | None, inputs_embeds: Tensor) -> Tensor:
        """The embeddings of a batch without images, refused where its text has placeholders.

        In training, the tokens of a blank tile are added with a weight of zero, as in LEO: every vision parameter gets
        a gradient, so that processes that train together do not wait for each other.
        """
        self.get_placeholder_mask(input_ids, inputs_embeds, lengths=[])
        parts = (self.vision_tower, self.multi_modal_projector, self.image_newline)
        vision = [weight for part in parts if part is not None for weight in part.parameters()]
        if not self.training or not any(weight.requires_grad for weight in vision):
            return inputs_embeds
        config, tower = self.config.vision_config, self.vision_tower
        size = as_pair(config.image_size)
        blank = torch.zeros(1, config.num_channels, *size, dtype=tower.dtype, device=tower.device)
        tokens, _, _ = self.see(blank, torch.tensor([size], device=tower.device), None)
        return inputs_embeds + 0 * tokens.sum().to(inputs_embeds)

    # Both ------------------------------------------------------------------------------------------------------------

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        num_tiles: Tensor | None = None,
        image_sizes: Tensor | None = None,
        encoder_outputs: EncodedByAll | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs,
    ) -> LlavaModelOutputWithPast:
        """Read images and text; see `MultiEncoderVlmForConditionalGeneration.forward`."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected either input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        images = (mm_encoder_outputs or {}).get("image")
        has_images = pixel_values is not None or encoder_outputs is not None
        if images is not None and has_images:
            raise ValueError("expected either images or mm_encoder_outputs, which are images already encoded; got both")
        features, lengths = None, None
        if images is not None:
            features, lengths = torch.cat(list(images.pooler_output)), [len(one) for one in images.pooler_output]
        elif has_images:
            check_images(pixel_values, num_tiles, image_sizes, encoder_outputs, self.config.unpad)
            features, per_tile, _ = self.see(pixel_values, image_sizes, encoder_outputs)
            if not torch.compiler.is_compiling():
                lengths = image_lengths(features, per_tile, num_tiles)
        if features is not None:
            features = features.to(inputs_embeds)
            mask = self.get_placeholder_mask(input_ids, inputs_embeds, features, lengths)
            inputs_embeds = inputs_embeds.masked_scatter(mask, features)
        elif past_key_values is None or past_key_values.get_seq_length() == 0:
            inputs_embeds = self.without_images(input_ids, inputs_embeds)
        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            return_dict=True,
            **kwargs,
        )
        return LlavaModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.get("past_key_values"),
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
            image_hidden_states=features,
        )


class MultiEncoderVlmForConditionalGeneration(MultiEncoderVlmPreTrainedModel, ImageGenerationMixin):
    """Text about images: any tower of vision encoders in front of any causal language model.

    Args:
        vision_tower, language_model, lm_head: taken as they are, weights and all; None builds them from the config.
    """

    accepts_loss_kwargs = True  # the loss below divides by num_items_in_batch
    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(
        self,
        config: MultiEncoderVlmConfig,
        vision_tower: PreTrainedModel | None = None,
        language_model: PreTrainedModel | None = None,
        lm_head: nn.Linear | None = None,
    ):
        super().__init__(config)
        self.loss_type = "ForCausalLM"
        self.model = MultiEncoderVlmModel(config, vision_tower, language_model)
        text = config.text_config
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False) if lm_head is None else lm_head
        self._tied_weights_keys = {"lm_head.weight": f"model.{embedding_name(self.model)}.weight"}
        self.post_init()
        self.freeze()

    @classmethod
    def from_models(
        cls, vision_tower: PreTrainedModel, language_model: PreTrainedModel, image_token_id: int, **options
    ) -> "MultiEncoderVlmForConditionalGeneration":
        """Join a loaded tower and a loaded causal language model, whose weights are kept; the projector is new.

        Args:
            vision_tower: a `MultiEncoderModel`.
            language_model: with its head, e.g. from `AutoModelForCausalLM`.
            options: other fields of `MultiEncoderVlmConfig`.
        """
        head, text = language_model.get_output_embeddings(), language_model.base_model
        if head is None or text is language_model or getattr(head, "bias", None) is not None:
            raise ValueError(
                f"expected a causal language model with a head of one Linear without bias, got"
                f" {type(language_model).__name__}"
            )
        config = MultiEncoderVlmConfig(
            vision_config=vision_tower.config,
            text_config=text.config,
            image_token_id=image_token_id,
            attn_implementation={
                "vision_config": vision_tower.config._attn_implementation,
                "text_config": text.config._attn_implementation,
            },
            **options,
        )
        keep_weights(vision_tower, language_model)
        model = cls(config, vision_tower, text, head)
        for part in (model.model.multi_modal_projector, model.model.image_newline):
            if part is not None:
                part.to(device=text.device, dtype=text.dtype)
        model.generation_config = language_model.generation_config
        return model

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings

    def get_image_features(
        self,
        pixel_values: Tensor | None = None,
        num_tiles: Tensor | None = None,
        image_sizes: Tensor | None = None,
        encoder_outputs: EncodedByAll | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """As `MultiEncoderVlmModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, num_tiles, image_sizes, encoder_outputs, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        num_tiles: Tensor | None = None,
        image_sizes: Tensor | None = None,
        encoder_outputs: EncodedByAll | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs,
    ) -> LlavaCausalLMOutputWithPast:
        """Read images and text.

        Args:
            input_ids: (batch, tokens), `image_token_id` once for every token of an image.
            pixel_values: (tiles, channels, height, width), the tiles of all images of all samples in their order.
            labels: (batch, tokens), the ids of the tokens to be said, -100 where the loss does not look.
            num_tiles: (images,), int64; None is one tile per image.
            image_sizes: (images, 2), int64, (height, width) before square padding; needed by `unpad`.
            encoder_outputs: instead of pixel_values, what `encode` returned for them.
            mm_encoder_outputs: instead of both, {"image": what `get_image_features` returned for them}.
            logits_to_keep: only the logits of so many last tokens, 0 for all; or the indices of the tokens.

        Returns:
            loss where there are labels, logits (batch, tokens, vocabulary), image_hidden_states (tokens of all images,
            hidden).
        """
        loss_options = {name: kwargs.pop(name) for name in ("num_items_in_batch", "shift_labels") if name in kwargs}
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            num_tiles=num_tiles,
            image_sizes=image_sizes,
            encoder_outputs=encoder_outputs,
            mm_encoder_outputs=mm_encoder_outputs,
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept, :])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.text_config.vocab_size, **loss_options)
        return LlavaCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
        )


def embedding_name(model: MultiEncoderVlmModel) -> str:
    """Where the embeddings are, e.g. "language_model.embed_tokens"."""
    embeddings = model.get_input_embeddings()
    return next(name for name, module in model.named_modules() if module is embeddings)
