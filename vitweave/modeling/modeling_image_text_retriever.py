"""Images and texts in one space: any vision encoder and any text encoder, with tiles and sentences aligned."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import can_return_tuple

from vitweave.configuration.configuration_image_text_retriever import ImageTextRetrieverConfig
from vitweave.modeling.contrastive_losses import CONTRASTIVE_LOSSES, at_least_float32, pair_targets
from vitweave.modeling.encoded_images import EncodedImages
from vitweave.modeling.gather import gather_rows
from vitweave.modeling.image_text_embeddings import (
    ImageEmbeddings,
    ImageTextRetrieverOutput,
    TextEmbeddings,
    check_one,
    check_rows,
    encode_in_chunks,
    gathered,
)
from vitweave.modeling.own_models import build_model
from vitweave.modeling.pretrained import VitweavePreTrainedModel, keep_weights
from vitweave.modeling.text_encoder import (
    build_text_model,
    check_text_model,
    check_texts,
    drop_unread_pooler,
    longest_text,
    pool_text,
    run_text_model,
    text_hash,
)
from vitweave.modeling.tile_alignment import TileAlignment, check_alignment, count_sentences
from vitweave.modeling.vision_encoder import find_vision_model
from vitweave.modeling.vision_tower import VisionTower

LARGEST_SCALE = 100.0  # CLIP's limit of the factor on cosines


class ImageTextRetrieverModel(VitweavePreTrainedModel):
    """Dual encoder of images and texts with a contrastive loss, global and, by option, tile <-> sentence.

    In training the pairs of all processes are compared with each other (every process computes the loss of the joint
    batch); in evaluation each process compares its own. `embedding_chunk_size` encodes training batches chunk by chunk
    (`vitweave.training.cached_gradients`).

    Args:
        vision_model, text_model: taken as they are, weights and all; None builds them from the config.
    """

    config: ImageTextRetrieverConfig
    config_class = ImageTextRetrieverConfig
    base_model_prefix = "image_text_retriever"
    input_modalities = ("image", "text")

    def __init__(
        self,
        config: ImageTextRetrieverConfig,
        vision_model: PreTrainedModel | None = None,
        text_model: PreTrainedModel | None = None,
    ):
        super().__init__(config)
        self.vision_model = build_model(config.vision_config) if vision_model is None else vision_model
        self.text_model = build_text_model(config.text_config) if text_model is None else text_model
        check_text_model(self.text_model)
        if config.text_pooling != "pooler":
            drop_unread_pooler(self.text_model)
        self.tower = VisionTower(self.vision_model, len(config.tile_levels), config.tile_source)
        self.text_limit = longest_text(self.text_model)
        self.embedding_chunk_size: int | None = None
        text_size = config.text_config.hidden_size
        self.visual_projection = nn.Linear(self.tower.pooled_size, config.projection_dim, bias=False)
        self.text_projection = nn.Linear(text_size, config.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.empty(()))
        self.alignment = None
        if config.local_loss_weight > 0:
            self.alignment = TileAlignment(
                config.tile_levels,
                self.tower.map_channels,
                text_size,
                config.projection_dim,
                config.local_temperature,
            )
            self.local_logit_scale = nn.Parameter(torch.empty(()))
        if config.contrastive_loss == "siglip":
            self.logit_bias = nn.Parameter(torch.empty(()))
            if self.alignment is not None:
                self.local_logit_bias = nn.Parameter(torch.empty(()))
        self.set_start_values()
        self.post_init()
        self.freeze()

    @classmethod
    def from_encoders(
        cls, vision_model: PreTrainedModel, text_model: PreTrainedModel, **options
    ) -> "ImageTextRetrieverModel":
        """Join a loaded vision model and a loaded text model, whose weights are kept; the projections are new.

        Args:
            vision_model: any vision model (of CLIP and the like the vision part is taken), or a layer fusion.
            text_model: any text encoder. Its pooler is taken off unless `text_pooling="pooler"` reads it.
            options: other fields of `ImageTextRetrieverConfig`.
        """
        check_text_model(text_model)
        vision_model = find_vision_model(vision_model)
        parts = {"vision_config": vision_model.config, "text_config": text_model.config}
        implementations = {name: part._attn_implementation for name, part in parts.items()}
        config = ImageTextRetrieverConfig(**parts, attn_implementation=implementations, **options)
        keep_weights(vision_model, text_model)
        model = cls(config, vision_model, text_model)
        given = {id(tensor) for part in (vision_model, text_model) for tensor in part.parameters()}
        for parameter in model.parameters():
            if id(parameter) not in given:
                parameter.data = parameter.data.to(device=vision_model.device, dtype=vision_model.dtype)
        return model

    def frozen_parts(self) -> list[nn.Module]:
        """What the config says to keep as it is."""
        chosen = (self.config.freeze_vision_encoder, self.config.freeze_text_model)
        frozen = zip(chosen, (self.vision_encoder, self.text_model), strict=True)
        return [part for chosen, part in frozen if chosen]

    def set_start_values(self) -> None:
        """Scales and biases of the logits."""
        for name, parameter in self.named_parameters(recurse=False):
            value = self.config.logit_scale_init if name.endswith("scale") else self.config.logit_bias_init
            init.constant_(parameter, value)

    def get_input_embeddings(self) -> nn.Module:
        return self.text_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.text_model.set_input_embeddings(value)

    # Images ----------------------------------------------------------------------------------------------------------

    @property
    def vision_encoder(self) -> PreTrainedModel:
        """The vision encoder, below a layer fusion."""
        return self.tower.encoder.model

    def encode(self, pixel_values: Tensor, patch_mask: Tensor | None = None) -> EncodedImages:
        """What is read of the vision encoder, for `forward(encoder_outputs=...)`: a frozen one need not run again."""
        return self.tower.encode(pixel_values, patch_mask, tiles=self.alignment is not None)

    def encode_images(
        self,
        pixel_values: Tensor | None = None,
        patch_mask: Tensor | None = None,
        encoder_outputs: EncodedImages | None = None,
    ) -> ImageEmbeddings:
        """Embed images: (batch, channels, height, width) and, with padding, a patch_mask (batch, patches); or instead
        of both what `encode` returned for them."""
        check_one(pixel_values, encoder_outputs)
        if encoder_outputs is None:
            seen = self.tower.run(pixel_values, patch_mask)
        else:
            seen = self.tower.run_encoded(encoder_outputs, tiles=self.alignment is not None)
        pooled = F.normalize(self.visual_projection(seen.pooled), dim=-1)
        tiles = () if self.alignment is None else self.alignment.tiles(seen.maps, seen.masks)
        return ImageEmbeddings(pooled, *tiles)

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: Tensor,
        patch_mask: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """Embed images.

        Args:
            pixel_values: (batch, channels, height, width).
            patch_mask: (batch, patches), True where a patch shows the image, not padding.
            output_attentions, output_hidden_states: those of the vision model.

        Returns:
            pooler_output (batch, projection_dim), unit vectors; last_hidden_state (batch, tokens, hidden).
        """
        seen = self.tower.run(pixel_values, patch_mask, output_attentions, output_hidden_states)
        return BaseModelOutputWithPooling(
            last_hidden_state=seen.tokens,
            pooler_output=F.normalize(self.visual_projection(seen.pooled), dim=-1),
            hidden_states=seen.hidden_states,
            attentions=seen.attentions,
        )

    def get_tile_features(self, pixel_values: Tensor, patch_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Tiles of images: (batch, tiles, projection_dim) unit vectors, and their mask (batch, tiles)."""
        check_alignment(self.alignment)
        return self.encode_images(pixel_values, patch_mask)[1:]

    # Texts -----------------------------------------------------------------------------------------------------------

    def encode_texts(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        sentence_ids: Tensor | None = None,
        num_sentences: int | None = None,
    ) -> TextEmbeddings:
        """Embed texts; the arguments are those of `forward`.

        Args:
            num_sentences: of the longest caption; None counts them.
        """
        check_texts(input_ids, attention_mask, sentence_ids, self.text_limit)
        outputs = run_text_model(self.text_model, input_ids, attention_mask, token_type_ids)
        pooled = self.project_text(outputs, attention_mask)
        if self.alignment is None or sentence_ids is None:
            return TextEmbeddings(pooled)
        if attention_mask is not None:
            sentence_ids = sentence_ids.masked_fill(attention_mask == 0, -1)  # padding belongs to no sentence
        num_sentences = count_sentences(sentence_ids) if num_sentences is None else num_sentences
        return TextEmbeddings(pooled, *self.alignment.sentences(outputs.last_hidden_state, sentence_ids, num_sentences))

    def project_text(self, outputs: BaseModelOutputWithPooling, attention_mask: Tensor | None) -> Tensor:
        """(batch, projection_dim), unit vectors."""
        return F.normalize(self.text_projection(pool_text(outputs, attention_mask, self.config.text_pooling)), dim=-1)

    @can_return_tuple
    def get_text_features(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """Embed texts (batch, tokens); kwargs go to the text model.

        Returns:
            pooler_output (batch, projection_dim), unit vectors; last_hidden_state (batch, tokens, hidden).
        """
        check_texts(input_ids, attention_mask, None, self.text_limit)
        outputs = run_text_model(self.text_model, input_ids, attention_mask, token_type_ids, **kwargs)
        return BaseModelOutputWithPooling(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=self.project_text(outputs, attention_mask),
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
        )

    def get_sentence_features(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        sentence_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Sentences of texts: (batch, sentences, projection_dim) unit vectors, and their mask (batch, sentences)."""
        check_alignment(self.alignment, sentence_ids)
        return self.encode_texts(input_ids, attention_mask, token_type_ids, sentence_ids)[1:]

    # Both ------------------------------------------------------------------------------------------------------------

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        patch_mask: Tensor | None = None,
        sentence_ids: Tensor | None = None,
        caption_ids: Tensor | None = None,
        return_loss: bool = True,
        encoder_outputs: EncodedImages | None = None,
        **kwargs,
    ) -> ImageTextRetrieverOutput:
        """Compare images with texts.

        Args:
            pixel_values: (images, channels, height, width).
            input_ids: (texts, tokens); attention_mask and token_type_ids as the tokenizer gives them.
            patch_mask: (images, patches), True where a patch shows the image, not padding.
            sentence_ids: (texts, tokens), the sentence each token belongs to, -1 for none. A text may have none; it
                then takes no part in the local loss.
            caption_ids: (texts,) int64, equal where captions are; None compares the tokens.
            return_loss: compute the loss of the pairs, image i with text i. In evaluation mode it is None where there
                are not as many images as texts (candidate labels for one image).
        """
        check_one(pixel_values, encoder_outputs)
        images = (encoder_outputs["pooled"] if pixel_values is None else pixel_values).shape[0]
        check_rows(images, input_ids, patch_mask, caption_ids, must_pair=return_loss and self.training)
        has_pairs = return_loss and images == input_ids.shape[0]
        if has_pairs and self.training and self.alignment is not None:
            check_alignment(self.alignment, sentence_ids)
        images, texts = self.embed_pairs(
            {"pixel_values": pixel_values, "patch_mask": patch_mask, "encoder_outputs": encoder_outputs},
            {
                "input_ids": input_ids,
                "attention_mask": attention_mask,
                "token_type_ids": token_type_ids,
                "sentence_ids": sentence_ids,
            },
        )
        logits = self.scaled(images.pooled @ texts.pooled.T)
        loss = None
        if has_pairs:
            captions = text_hash(input_ids, attention_mask) if caption_ids is None else caption_ids
            loss = self.contrastive_loss(images, texts, captions)
        return ImageTextRetrieverOutput(
            loss=loss,
            logits_per_image=logits,
            logits_per_text=logits.T,
            text_embeds=texts.pooled,
            image_embeds=images.pooled,
            local_scores=None if self.training else self.local_scores(images, texts),
        )

    def embed_pairs(self, image_inputs: dict, text_inputs: dict) -> tuple[ImageEmbeddings, TextEmbeddings]:
        """Both towers; in training in chunks, if `embedding_chunk_size` says so."""
        size = self.embedding_chunk_size
        if not self.training or size is None:
            return self.encode_images(**image_inputs), self.encode_texts(**text_inputs)
        sentence_ids = text_inputs["sentence_ids"]
        num_sentences = None if sentence_ids is None else count_sentences(sentence_ids)
        images = encode_in_chunks(self.encode_images, size, **image_inputs)
        return images, encode_in_chunks(self.encode_texts, size, **text_inputs, num_sentences=num_sentences)

    def contrastive_loss(self, images: ImageEmbeddings, texts: TextEmbeddings, caption_ids: Tensor) -> Tensor:
        """The loss of the pairs; in training of those of all processes.

        Args:
            caption_ids: (texts,), equal where captions are.
        """
        if self.training:
            images, texts, caption_ids = gathered(images), gathered(texts), gather_rows(caption_ids)
        criterion = CONTRASTIVE_LOSSES[self.config.contrastive_loss]
        positive, ignored = pair_targets(caption_ids, self.config.duplicate_captions)
        cosines = at_least_float32(images.pooled) @ at_least_float32(texts.pooled).T
        loss = criterion(self.scaled(cosines), positive, ignored)
        scores = self.local_scores(images, texts)
        if scores is None:
            return loss
        has_sentences = texts.sentence_mask.any(dim=1)
        local = criterion(self.scaled(scores, "local_"), positive & has_sentences, ignored | ~has_sentences)
        return loss + self.config.local_loss_weight * local

    def scaled(self, similarity: Tensor, which: str = "") -> Tensor:
        """Similarities as logits: times the factor, which stays below its limit, plus the bias if there is one."""
        factor = getattr(self, f"{which}logit_scale").exp()
        # the gradient passes the limit: a factor that has run into it must find back
        factor = factor + (factor.clamp(max=LARGEST_SCALE) - factor).detach()
        bias = getattr(self, f"{which}logit_bias", None)
        return similarity * factor if bias is None else similarity * factor + bias

    def local_scores(self, images: ImageEmbeddings, texts: TextEmbeddings) -> Tensor | None:
        """(images, texts), how well tiles and sentences fit; None without alignment or sentences."""
        if self.alignment is None or texts.sentences is None:
            return None
        return self.alignment.scores(images.tiles, images.tile_mask, texts.sentences, texts.sentence_mask)

    def ranking_scores(self, images: ImageEmbeddings, texts: TextEmbeddings, alpha: float | None = None) -> Tensor:
        """Scores to rank by: `alpha * cosine + (1 - alpha) * local`; the cosine alone for texts without sentences.

        Args:
            images, texts: from `encode_images` and `encode_texts`.
            alpha: None takes `config.ranking_alpha`.

        Returns:
            (images, texts).
        """
        cosines = images.pooled @ texts.pooled.T
        local = self.local_scores(images, texts)
        if local is None:
            return cosines
        alpha = self.config.ranking_alpha if alpha is None else alpha
        return torch.where(texts.sentence_mask.any(dim=1), alpha * cosines + (1 - alpha) * local, cosines)
