"""Several aligned sensors to an image of another one: generator, discriminator, and both to be trained together."""

import copy
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from transformers.modeling_outputs import ImageSuperResolutionOutput
from transformers.utils.generic import can_return_tuple

from vitweave.configuration.configuration_modality_fusion import ModalityFusionConfig
from vitweave.modeling.ensemble import ModalityEnsemble
from vitweave.modeling.modality_inputs import check_modalities
from vitweave.modeling.modality_streams.block_fusions import acts_on_stages
from vitweave.modeling.modality_streams.registry import build_streams
from vitweave.modeling.modality_translation import TranslationDecoder, mean_where
from vitweave.modeling.modeling_modality_fusion import ModalityFusionModel, ModalityFusionPreTrainedModel
from vitweave.modeling.pyramid_translation import PyramidTranslationDecoder


@dataclass
class ModalityTranslationOutput(ImageSuperResolutionOutput):
    """
    `reconstruction` (batch, channels, height, width): the image of the ensemble, in (-1, 1).
    `modality_reconstructions` (batch, streams, channels, height, width): of every stream, 0 where it is absent.
    `penalty`: scalar, what the fusions ask to be added to a loss; None where they ask for nothing.
    """

    modality_reconstructions: Tensor | None = None
    penalty: Tensor | None = None


class ModalityFusionForImageToImage(ModalityFusionPreTrainedModel):
    """An encoder of all sensors, and a decoder that draws an image of each of its streams.

    Over a MiT that is the generator of TokenFusion (section 4.1 of arXiv:2204.08721): the encoder's mirror image. The
    released one has five stages of stride 2, kernels of 3, widths 64 to 1024, depths 3, 4, 4, 6, 3, `sr_ratios` 16, 8,
    4, 2, 1, and exchanges tokens in the last block of every stage: a `SegformerConfig` with these as stream_config,
    `fusion_type="token_exchange"`, `penalty_weight=1e-3`. Any other MiT does, a pretrained one of four stages too.

    Over a Swin or a plain ViT, which cannot be run backwards, it is the neck of DPT and the sensors' pixels, see
    `PyramidTranslationDecoder`.

    Where `config.fusion_blocks` is None, the last block of every encoder stage fuses.

    The loss is `config.reconstruction_weight` (100) times the sum over the streams and the ensemble of the mean
    absolute error, plus `config.penalty_weight` times what the fusions ask for. Where a stream is absent it has no
    loss.
    """

    _no_split_modules = [
        *ModalityFusionPreTrainedModel._no_split_modules,
        *("TranslationStage", "PyramidTranslationDecoder"),
    ]

    def __init__(self, config: ModalityFusionConfig):
        if config.fusion_blocks is None and not acts_on_stages(config):
            config = copy.deepcopy(config)  # the caller's may serve another model
            config.fusion_blocks = [1] * len(config.stage_names)
        super().__init__(config)
        self.modality_fusion = ModalityFusionModel(config)
        if self.modality_fusion.streams.makes_map:
            raise ValueError('every stream is drawn by itself, but fuse="map" makes one map of all; take fuse="add"')
        channels = self.modality_fusion.streams.channels
        mirrored = config.stream == "mit"
        self.decoder = TranslationDecoder(config) if mirrored else PyramidTranslationDecoder(config, channels)
        self.ensemble = ModalityEnsemble(config.num_streams, trained=config.ensemble == "trained")
        self.post_init()

    @property
    def exchange_ratios(self) -> dict[str, Tensor]:
        """What the last forward exchanged: "stage1.block0" -> (streams,), the part of the tokens or channels."""
        return self.modality_fusion.exchange_ratios

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        modality_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs,
    ) -> ModalityTranslationOutput:
        """Draw an image.

        Args:
            pixel_values: (batch, modalities, channels, height, width).
            modality_mask: (batch, modalities), 1 or True where the sensor is there, whose pixels are not read where it
                is not; None where all are there.
            labels: (batch, channels, height, width), the image wanted, in [-1, 1]; NaN where nothing was measured.
        """
        check_target(labels, pixel_values)
        output = self.modality_fusion.run_streams(pixel_values, modality_mask)
        images = self.decoder(output, pixel_values)
        if output.present is not None:
            images = images.masked_fill(~output.present[..., None, None, None], 0)
        ensemble = self.ensemble(images, output.present)
        loss = None if labels is None else self.loss(images, ensemble, labels, output.present, output.penalty)
        return ModalityTranslationOutput(
            loss=loss,
            reconstruction=ensemble,
            hidden_states=self.modality_fusion.states_asked_for(output, output_hidden_states),
            modality_reconstructions=images.transpose(0, 1),
            penalty=output.penalty,
        )

    def loss(
        self, images: Tensor, ensemble: Tensor, labels: Tensor, present: Tensor | None, penalty: Tensor | None
    ) -> Tensor:
        """Of the images (streams, batch, ...), the ensemble (batch, ...), and the penalty."""
        measured = ~labels.isnan()
        terms = []
        for index in range(images.shape[0]):
            counted = measured
            if present is not None:
                counted = measured & present[index, :, None, None, None]
            terms.append(mean_where((images[index] - labels.nan_to_num()).abs(), counted))
        if images.shape[0] > 1:
            terms.append(mean_where((ensemble - labels.nan_to_num()).abs(), measured))
        loss = self.config.reconstruction_weight * sum(terms[1:], start=terms[0])
        return loss if penalty is None else loss + self.config.penalty_weight * penalty


def check_target(labels: Tensor | None, pixel_values: Tensor) -> None:
    """Refuse a target image that does not fit."""
    if labels is None or pixel_values.ndim != 5:
        return
    expected = (pixel_values.shape[0], *pixel_values.shape[2:])
    if tuple(labels.shape) != expected:
        raise ValueError(
            f"expected labels (batch, channels, height, width) {expected}, one image per sample, got"
            f" {tuple(labels.shape)}; repeat the channel of a target that has only one"
        )


class ModalityDiscriminator(ModalityFusionPreTrainedModel):
    """Tells drawn images from real ones, knowing what each sensor saw: a map of logits per modality.

    The discriminator of TokenFusion: the encoder of the generator, without fusion, on a sensor's image and the judged
    one as channels, then a 1x1 convolution. Its sigmoid stands here in the loss.

    Args:
        config: of the generator, or with other sizes.
    """

    def __init__(self, config: ModalityFusionConfig):
        super().__init__(config)
        paired = copy.deepcopy(config)
        paired.stream_config.num_channels = 2 * config.num_channels
        paired.fusion_type, paired.auxiliary = None, "pairwise"
        self.streams = build_streams(paired)
        self.score = nn.Conv2d(self.streams.channels[-1], 1, kernel_size=1)
        self.post_init()

    def get_input_embeddings(self):
        return self.streams.get_input_embeddings()

    def set_input_embeddings(self, value) -> None:
        self.streams.set_input_embeddings(value)

    def forward(self, pixel_values: Tensor, images: Tensor, modality_mask: Tensor | None = None) -> Tensor:
        """
        Args:
            pixel_values: (batch, modalities, channels, height, width), what the sensors saw.
            images: what is judged, (batch, channels, height, width), or one per modality (batch, modalities, channels,
                height, width).
            modality_mask: (batch, modalities), False where a sensor is absent.

        Returns:
            logits (batch, modalities, height', width'), high for real images, 0 where a sensor is absent.
        """
        pixel_values, present = check_modalities(pixel_values, modality_mask, self.config)
        if images.ndim == 4:
            images = images[:, None].expand_as(pixel_values)
        maps = self.streams(torch.cat([pixel_values, images], dim=2), present).maps[-1]
        logits = self.score(maps.flatten(0, 1))[:, 0].unflatten(0, maps.shape[:2]).transpose(0, 1)
        return logits if present is None else logits.masked_fill(~present[..., None, None], 0)

    @staticmethod
    def loss(logits: Tensor, real: bool, modality_mask: Tensor | None = None) -> Tensor:
        """Cross-entropy with what the judged images are, the mean per modality, summed over the modalities."""
        target = torch.full_like(logits, float(real))
        errors = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
        if modality_mask is None:
            return errors.mean(dim=(0, 2, 3)).sum()
        counted = modality_mask.bool()[..., None, None]
        terms = [mean_where(errors[:, index], counted[:, index]) for index in range(logits.shape[1])]
        return sum(terms[1:], start=terms[0])


class ModalityAdversarialTranslator(ModalityFusionPreTrainedModel):
    """A generator and its discriminator as one model with one loss, for the stock Trainer and one optimiser.

    The loss is the generator's (its own plus that its images pass for real) and `discriminator_weight` (half) the
    discriminator's (that real and drawn images are told apart). Each part gets gradients of its own loss only: the
    generator is judged by fixed weights, and the discriminator sees fixed images. Both losses are of the same weights,
    where TokenFusion's code updates one network before the other reads it. With an optimiser that treats every number
    by itself (Adam), this is two optimisers in step; clip no gradients by their common norm.

    No gradient checkpointing: what runs again in the backward pass would not have the fixed weights.
    """

    supports_gradient_checkpointing = False
    _no_split_modules = ModalityFusionForImageToImage._no_split_modules
    discriminator_weight = 0.5

    def __init__(self, config: ModalityFusionConfig):
        if config.num_streams != config.num_modalities:
            raise ValueError("expected auxiliary='pairwise': every sensor's own image is judged")
        super().__init__(config)
        self.generator = ModalityFusionForImageToImage(config)
        self.discriminator = ModalityDiscriminator(config)
        self.post_init()

    @property
    def vision_encoder(self) -> ModalityFusionModel:
        """The generator's, which recipes may train at a rate of its own."""
        return self.generator.modality_fusion

    @can_return_tuple
    def forward(
        self, pixel_values: Tensor, modality_mask: Tensor | None = None, labels: Tensor | None = None, **kwargs
    ) -> ModalityTranslationOutput:
        """As the generator; with labels, the loss of both. Where nothing was measured, the drawn image counts as real.

        While evaluating, the loss is the generator's own.
        """
        output = self.generator(pixel_values, modality_mask, labels, return_dict=True)
        if labels is not None and self.training:
            drawn = output.modality_reconstructions
            real = torch.where(labels.isnan()[:, None], drawn.detach(), labels[:, None])
            judge = partial(self.judge, pixel_values, modality_mask)
            told = judge(real, True) + judge(drawn.detach(), False)
            fixed = {name: tensor.detach() for name, tensor in self.discriminator.state_dict().items()}
            passed = functional_call(self.discriminator, fixed, (pixel_values, drawn, modality_mask), tie_weights=False)
            passed = self.discriminator.loss(passed, True, modality_mask)
            output.loss = output.loss + passed + self.discriminator_weight * told
        return output

    @classmethod
    def around(cls, generator: ModalityFusionForImageToImage) -> "ModalityAdversarialTranslator":
        """A generator, not a copy of it, with a new discriminator of its sizes."""
        both = cls(generator.config).to(device=generator.device, dtype=generator.dtype)
        both.generator = generator
        return both

    def judge(self, pixel_values: Tensor, modality_mask: Tensor | None, images: Tensor, real: bool) -> Tensor:
        """The discriminator's loss on images that are real or not."""
        return self.discriminator.loss(self.discriminator(pixel_values, images, modality_mask), real, modality_mask)
