"""The layers that draw images over encoders that cannot be run backwards."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitweave.configuration.configuration_modality_fusion import ModalityFusionConfig
from vitweave.modeling.dpt_neck import DptNeck
from vitweave.modeling.heads.base import DeepConv
from vitweave.modeling.modality_streams.base import StreamOutput
from vitweave.modeling.modality_streams.present import split_modalities
from vitweave.modeling.options import check_options


class PyramidTranslationDecoder(nn.Module):
    """The maps of every stream as a pyramid, refined from coarse to fine over its own pixels, to an image in (-1, 1).

    For Swin and plain ViTs, pretrained ones above all: the neck of DPT (arXiv:2103.13413) over the stages and, as in
    UNETR (arXiv:2103.10504), a convolution of the sensor's own image, for edges that patches are too coarse for.

    Args:
        config: `decoder_hidden_size` is the width of the neck, `decoder_options` further arguments of `DptNeck`.
        channels: of every stage.
    """

    def __init__(self, config: ModalityFusionConfig, channels: list[int]):
        super().__init__()
        if config.num_streams != config.num_modalities:
            raise ValueError(
                "expected auxiliary='pairwise': over a Swin or a ViT, every sensor's image is drawn over its own pixels"
            )
        width = config.decoder_hidden_size
        options, given = config.decoder_options or {}, ("in_channels", "fusion_size", "readout")
        check_options(DptNeck, options, given=given, owner="the decoder of images")
        self.neck = DptNeck(channels, fusion_size=width, readout="ignore", **options)
        fine = max(width // 2, 1)
        self.coarse = DeepConv(width, fine, kernel_size=3, padding=1)
        self.pixels = DeepConv(config.num_channels, fine, kernel_size=3, padding=1)
        self.merge = DeepConv(2 * fine, fine, kernel_size=3, padding=1)
        self.project = nn.Conv2d(fine, config.num_channels, kernel_size=1)  # small at first: tanh has a slope

    def forward(self, output: StreamOutput, pixel_values: Tensor) -> Tensor:
        """Images (streams, batch, channels, height, width) of the sensors' size."""
        size, sensors = pixel_values.shape[-2:], output.maps[0].shape[:2]
        present = None if output.present is None else output.present.transpose(0, 1)
        images, _ = split_modalities(pixel_values.reshape(sensors[1], sensors[0], -1, *size), present)
        hidden = self.coarse(self.neck([stage_map.flatten(0, 1) for stage_map in output.maps])[-1])
        hidden = F.interpolate(hidden, size=size, mode="bilinear", align_corners=False)
        hidden = self.merge(torch.cat([hidden, self.pixels(images.flatten(0, 1))], dim=1).relu())
        return self.project(hidden.relu()).tanh().unflatten(0, sensors)
