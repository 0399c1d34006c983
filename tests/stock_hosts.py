"""Every class of transformers that takes a registered backbone, tiny, and our backbones for them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers
from transformers import BertConfig, CLIPTextConfig, PreTrainedConfig, PreTrainedModel, SegformerConfig

from vitweave.configuration.configuration_layer_fusion import LayerFusionConfig
from vitweave.configuration.configuration_modality_fusion import ModalityFusionConfig
from vitweave.configuration.configuration_multi_encoder import MultiEncoderConfig
from vitweave.configuration.configuration_specialized_vit import SpecializedViTConfig

SIZE, WIDTH, QUERIES, LABELS = 64, 32, 6, 3

# Our backbones: how many maps the host wants (0: token sequences) and the stride of the middle one -> config ----------


def vit(maps: int, stride: int) -> SpecializedViTConfig:
    """One stride for all maps."""
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 4, "num_attention_heads": 2, "mlp_ratio": 2}
    sizes |= {"patch_size": stride, "image_size": SIZE}
    chosen = list(range(5 - (maps or 4), 5))
    return SpecializedViTConfig(**sizes, out_indices=chosen, reshape_hidden_states=maps > 0)


def fused_layers(maps: int, stride: int) -> LayerFusionConfig:
    """A pyramid: maps of half and twice the stride, and of a quarter."""
    return pyramid(maps, vit(1, stride), layers="all", style="fpn")


def two_encoders(maps: int, stride: int) -> MultiEncoderConfig:
    """One map, whatever is asked for."""
    conv = {"model_type": "convnext", "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
    return MultiEncoderConfig(encoder_configs=[vit(1, stride), conv], image_size=SIZE, hidden_size=WIDTH)


def pyramid_of_two_encoders(maps: int, stride: int) -> LayerFusionConfig:
    """The same tower below a pyramid: an encoder of ours is an encoder for every other."""
    return pyramid(maps, two_encoders(1, stride), layers=[1], style="last")


def pyramid(maps: int, encoder: PreTrainedConfig, **options) -> LayerFusionConfig:
    scales = {0: [4, 2, 1, 0.5], 1: [1], 3: [2, 1, 0.5], 4: [4, 2, 1, 0.5]}[maps]
    layers, style = options["layers"], options["style"]
    options = {"style": style, "scales": scales, "out_channels": WIDTH}
    return LayerFusionConfig(encoder_config=encoder, layers=layers, fusion_type="fpn", fusion_options=options)


def modalities(maps: int, stride: int) -> ModalityFusionConfig:
    """Two sensors; MiT's stages have the strides 4, 8, 16 and 32."""
    stream = {"hidden_sizes": [WIDTH] * 4, "depths": [1] * 4, "num_attention_heads": [1, 1, 2, 2]}
    stream |= {"sr_ratios": [4, 2, 1, 1], "mlp_ratios": [2] * 4, "drop_path_rate": 0.0}
    last = {8: 4, 16: 3}[stride]
    kept = [f"stage{index + 1}" for index in range(max(0, last - (maps or 4)), last)]
    return ModalityFusionConfig(stream_config=SegformerConfig(**stream), out_features=kept)


BACKBONES = {
    "specialized_vit": vit,
    "layer_fusion": fused_layers,
    "multi_encoder": two_encoders,
    "multi_encoder_pyramid": pyramid_of_two_encoders,
    "modality_fusion": modalities,
}


def pixels(backbone: str) -> torch.Tensor:
    """Two images; those of two sensors stand side by side."""
    channels = 6 if backbone == "modality_fusion" else 3
    return torch.randn(2, channels, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


# What the hosts are trained on ----------------------------------------------------------------------------------------


def boxes() -> dict:
    two = {"class_labels": torch.tensor([0, 1]), "boxes": torch.tensor([[0.3, 0.3, 0.2, 0.2], [0.6, 0.5, 0.4, 0.3]])}
    return {"labels": [two, {name: value[:1] for name, value in two.items()}]}


def boxes_and_masks() -> dict:
    labels = boxes()["labels"]
    return {"labels": [{**one, "masks": torch.ones(len(one["boxes"]), SIZE, SIZE)} for one in labels]}


def boxes_and_phrases() -> dict:
    ids = torch.tensor([[101, 5, 1012, 6, 1012, 102]] * 2)  # [CLS] a . b . [SEP]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **boxes()}


def phrases() -> dict:
    classes = torch.ones(4, 6, dtype=torch.long)
    return {
        "classes_input_ids": classes,
        "classes_attention_mask": classes,
        "tasks_input_ids": classes[:2],
        "tasks_attention_mask": classes[:2],
        "classes_structure": torch.tensor([2, 2]),
    }


def masks() -> dict:
    squares = torch.zeros(2, SIZE, SIZE)
    squares[0, :20, :20], squares[1, 30:, 10:50] = 1, 1
    return {"mask_labels": [squares, squares[:1]], "class_labels": [torch.tensor([0, 2]), torch.tensor([1])]}


def masks_and_tasks() -> dict:
    tokens = torch.ones(2, QUERIES, 7, dtype=torch.long)
    return {"task_inputs": tokens[:, 0], "text_inputs": tokens[:, 2:], **masks()}


def class_map() -> dict:
    return {"labels": torch.randint(0, LABELS, (2, SIZE, SIZE), generator=torch.Generator().manual_seed(2))}


# The hosts ------------------------------------------------------------------------------------------------------------


@dataclass
class Host:
    """A class of transformers, the sizes that make it tiny, how many maps it wants, and what it is trained on.

    Without inputs of its own it knows no loss; its output is then trained towards zero.
    """

    name: str
    maps: int
    options: dict
    inputs: Callable[[], dict] = dict
    stride: int = 8
    pairs: bool = False

    def build(self, backbone: str) -> PreTrainedModel:
        model = getattr(transformers, self.name)
        config = BACKBONES[backbone](self.maps, self.stride)
        for size in ("image_size", "patch_size") if self.pairs else ():
            if hasattr(config, size):
                setattr(config, size, (getattr(config, size),) * 2)
        return model(model.config_class(backbone_config=config, **self.options))


LAYERS = {"encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
LAYERS |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_queries": QUERIES}
DETR = {**LAYERS, "d_model": WIDTH, "num_labels": LABELS}
DAB_DETR = {**LAYERS, "hidden_size": WIDTH, "num_labels": LABELS}
RT_DETR = {**DETR, "encoder_hidden_dim": WIDTH, "decoder_in_channels": [WIDTH] * 3, "num_denoising": 4}
RT_DETR |= {"encoder_in_channels": [WIDTH] * 3}
D_FINE = {**RT_DETR, "lqe_hidden_dim": 8, "max_num_bins": 8}
LAYOUT = {**RT_DETR, "mask_feature_channels": [16, 16], "x4_feat_dim": WIDTH, "num_prototypes": 4}
BERT = {"vocab_size": 1100, "hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2}
GROUNDING = {**LAYERS, "d_model": WIDTH, "text_config": BertConfig(**BERT, intermediate_size=32), "max_text_len": 16}
CLIP = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "bos_token_id": 1}
CLIP |= {"eos_token_id": 2, "intermediate_size": 32, "projection_dim": 16, "max_position_embeddings": 16}
OMDET = {"text_config": CLIPTextConfig(**CLIP), "num_queries": QUERIES, "image_size": SIZE, "decoder_num_layers": 1}
OMDET |= {"encoder_in_channels": [WIDTH] * 3, "vision_features_channels": [WIDTH] * 3, "encoder_hidden_dim": WIDTH}
OMDET |= {"encoder_attention_heads": 2, "decoder_num_heads": 2, "decoder_hidden_dim": WIDTH, "class_embed_dim": 16}
OMDET |= {"text_projection_in_dim": 16, "text_projection_out_dim": 16, "encoder_dim_feedforward": 16}
OMDET |= {"decoder_dim_feedforward": 16, "task_encoder_hidden_dim": 16, "apply_layernorm_after_vision_backbone": False}
FORMER = {"hidden_dim": WIDTH, "encoder_feedforward_dim": 16, "dim_feedforward": 16, "encoder_layers": 1}
FORMER |= {"decoder_layers": 2, "num_attention_heads": 2, "num_queries": QUERIES, "train_num_points": 16}
MASK2FORMER = {**FORMER, "num_labels": LABELS, "feature_size": WIDTH, "mask_feature_size": WIDTH}
MASKFORMER = {"fpn_feature_size": WIDTH, "mask_feature_size": WIDTH, "num_labels": LABELS}
MASKFORMER |= {"decoder_config": {"model_type": "detr", **LAYERS, "d_model": WIDTH}}
ONEFORMER = {**FORMER, "hidden_dim": 64, "conv_dim": 64, "mask_dim": 64, "text_encoder_width": 64, "num_labels": LABELS}
ONEFORMER |= {"text_encoder_context_length": 7, "text_encoder_num_layers": 1, "text_encoder_vocab_size": 50}
ONEFORMER |= {"task_seq_len": 7, "text_encoder_n_ctx": 2, "is_training": True, "query_dec_layers": 1}
UPERNET = {"hidden_size": 16, "auxiliary_in_channels": WIDTH, "auxiliary_channels": 8, "pool_scales": [1, 2]}
NECK = {"neck_hidden_sizes": [8] * 4, "fusion_hidden_size": 8}
ANY_DEPTH = {**NECK, "patch_size": 8, "head_hidden_size": 8, "reassemble_hidden_size": WIDTH}
ZOE = {**NECK, "bottleneck_features": 8, "num_relative_features": 8, "bin_embedding_dim": 8}
ZOE |= {"num_attractors": [4, 2, 2, 1], "bin_configurations": [{"n_bins": 4, "min_depth": 0.001, "max_depth": 10.0}]}
CANOPY = {"patch_size": 8, "reassemble_factors": [4, 2, 1, 0.5], "post_process_channels": [8] * 4}
CANOPY |= {"fusion_hidden_size": 8, "head_hidden_size": 8, "number_output_channels": 8}
MATTE = {"hidden_size": WIDTH, "fusion_hidden_sizes": [16, 8, 8, 8], "convstream_hidden_sizes": [8, 8, 8]}

HOSTS = [
    Host("DetrForObjectDetection", 1, DETR, boxes),
    Host("DetrForSegmentation", 4, {**DETR, "encoder_attention_heads": 8}, boxes_and_masks),
    Host("ConditionalDetrForObjectDetection", 1, DETR, boxes),
    Host("DabDetrForObjectDetection", 1, DAB_DETR, boxes),
    Host("TableTransformerForObjectDetection", 1, DETR, boxes),
    Host("DeformableDetrForObjectDetection", 3, {**DETR, "num_feature_levels": 4}, boxes),
    Host("RTDetrForObjectDetection", 3, RT_DETR, boxes),
    Host("RTDetrV2ForObjectDetection", 3, RT_DETR, boxes),
    Host("DFineForObjectDetection", 3, D_FINE, boxes),
    Host("Deimv2ForObjectDetection", 3, D_FINE, boxes),
    Host("PPDocLayoutV3ForObjectDetection", 4, LAYOUT),
    Host("GroundingDinoForObjectDetection", 3, GROUNDING, boxes_and_phrases),
    Host("MMGroundingDinoForObjectDetection", 3, GROUNDING, boxes_and_phrases),
    Host("OmDetTurboForObjectDetection", 3, OMDET, phrases),
    Host("MaskFormerForInstanceSegmentation", 4, MASKFORMER, masks),
    Host("Mask2FormerForUniversalSegmentation", 4, MASK2FORMER, masks),
    Host("OneFormerForUniversalSegmentation", 4, ONEFORMER, masks_and_tasks),
    Host("UperNetForSemanticSegmentation", 4, {**UPERNET, "num_labels": LABELS}, class_map),
    Host("DPTForDepthEstimation", 0, NECK),
    Host("DepthAnythingForDepthEstimation", 0, ANY_DEPTH),
    Host("PromptDepthAnythingForDepthEstimation", 0, ANY_DEPTH),
    Host("ZoeDepthForDepthEstimation", 0, ZOE),
    Host("CHMv2ForDepthEstimation", 4, CANOPY),
    Host("VitMatteForImageMatting", 1, MATTE, stride=16),
    Host("VitPoseForPoseEstimation", 0, {"num_labels": LABELS}, pairs=True),
    Host("TvpForVideoGrounding", 1, {}),
]
