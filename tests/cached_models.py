"""Tiny frozen models with `encode`, and data for them."""

import torch

from vitweave.configuration.configuration_dense_predictor import DensePredictorConfig
from vitweave.configuration.configuration_specialized_vit import SpecializedViTConfig
from vitweave.modeling.modeling_dense_predictor import DensePredictorForSemanticSegmentation
from vitweave.processing.image_processing_pil_segmentation import SegmentationImageProcessorPil
from vitweave.training.segmentation_data import SegmentationDataset
from vitweave.training.synthetic_shapes import SyntheticShapes

PROCESSOR = SegmentationImageProcessorPil(size=32)
# 32 wide, since in narrower ones torch sums in an order that depends on the batch
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}


class CountingSegmenter(DensePredictorForSemanticSegmentation):
    """Counts the images that run through the encoder."""

    encoded = 0

    def run_backbone(self, pixel_values, **kwargs):
        CountingSegmenter.encoded += len(pixel_values)
        return super().run_backbone(pixel_values, **kwargs)


def tiny_model(freeze=True, backbone=None, **options):
    torch.manual_seed(0)
    config = SpecializedViTConfig(
        **SMALL, qkv_blocks="all", hidden_dropout_prob=0.1, out_indices=[1, 2], **(backbone or {})
    )
    options = {"id2label": SyntheticShapes.id2label, "head_options": {"dropout": 0.1}} | options
    return CountingSegmenter(DensePredictorConfig(backbone_config=config, freeze_backbone=freeze, **options))


def data(length=7, seed=0, processor=PROCESSOR, **options):
    return SegmentationDataset(SyntheticShapes(length, seed=seed), processor, **options)
