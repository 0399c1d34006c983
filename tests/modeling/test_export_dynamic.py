"""One exported graph per family, by transformers' exporters, for every batch size and every size of images."""

from collections.abc import Callable

import pytest
import torch
from distributed_heads import dense, vit
from modality_translators import pyramid_generator
from retrieval_models import retriever
from tiny_modality_models import aligned, mit_fusion
from torch import Tensor, nn
from torch.export import Dim
from transformers import SegformerConfig

from vitweave.configuration.configuration_layer_fusion import LayerFusionConfig
from vitweave.configuration.configuration_modality_fusion import ModalityFusionConfig
from vitweave.configuration.configuration_multi_encoder import MultiEncoderConfig
from vitweave.modeling.modeling_dense_predictor import DensePredictorForSemanticSegmentation
from vitweave.modeling.modeling_depth import DensePredictorForDepthEstimation
from vitweave.modeling.modeling_layer_fusion import LayerFusionBackbone, LayerFusionModel
from vitweave.modeling.modeling_modality_fusion import ModalityFusionForSemanticSegmentation
from vitweave.modeling.modeling_modality_translation import ModalityFusionForImageToImage
from vitweave.modeling.modeling_multi_encoder import MultiEncoderModel
from vitweave.modeling.modeling_specialized_vit import SpecializedViTForImageClassification


class VisionSide(nn.Module):
    """Images to the embeddings that a retriever compares with texts."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        return {"image_embeds": self.model.get_image_features(pixel_values).pooler_output}


def fused(model_class: type, fusion_type: str, **options) -> nn.Module:
    facts = {"layers": [1, 2], "fusion_type": fusion_type, "fusion_options": options}
    return model_class(LayerFusionConfig(encoder_config=vit(), **facts))


def tower() -> MultiEncoderModel:
    encoders = [vit(), vit(image_size=48, num_register_tokens=1)]  # transformers' Dinov2 keeps its grid in the graph
    return MultiEncoderModel(
        MultiEncoderConfig(encoder_configs=encoders, encoder_options=[{}, {"image_size": 48}], image_size=32)
    )


def translator() -> ModalityFusionForImageToImage:
    stages = {"depths": [1, 1], "hidden_sizes": [16, 32], "num_attention_heads": [1, 2], "sr_ratios": [2, 1]}
    stages |= {"patch_sizes": [3, 3], "strides": [2, 2], "mlp_ratios": [2, 2], "num_encoder_blocks": 2}
    streams = SegformerConfig(**stages, drop_path_rate=0.0)
    return ModalityFusionForImageToImage(
        ModalityFusionConfig(modalities=("rgb", "depth"), stream_config=streams, fusion_type="token_exchange")
    )


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "specialised-vit": lambda: SpecializedViTForImageClassification(vit(num_register_tokens=2, mlp_blocks=1)),
    "specialised-vit-rotary": lambda: SpecializedViTForImageClassification(vit(position_embedding_type="rotary")),
    "layer-fusion": lambda: fused(LayerFusionModel, "cross_layer_attention", num_heads=4, dense=True),
    "layer-fusion-pyramid": lambda: fused(LayerFusionBackbone, "fpn", out_channels=8, scales=[2, 1]),
    "multi-encoder": tower,
    "modality-fusion": lambda: ModalityFusionForSemanticSegmentation(mit_fusion()),
    "modality-translation": translator,
    "modality-translation-vit": lambda: pyramid_generator("vit"),
    "segmentation": lambda: DensePredictorForSemanticSegmentation(dense("linear")),
    "depth": lambda: DensePredictorForDepthEstimation(dense("dpt")),
    "retriever-vision": lambda: VisionSide(retriever()),
}
every_family = pytest.mark.parametrize("name", FAMILIES)
UNIT = 16  # every family above takes multiples of it


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = FAMILIES[name]()
    for parameter in model.parameters():  # what starts at zero would hide mistakes
        parameter.data += 0.02 * torch.randn(parameter.shape)
    return model.eval()


def images(name: str, batch: int, height: int, width: int) -> dict[str, Tensor]:
    if name.startswith("modality"):
        return {"pixel_values": aligned(batch, height=height, width=width)}
    return {"pixel_values": torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(batch))}


def free_axes(inputs: dict[str, Tensor]) -> dict[str, dict]:
    axes = inputs["pixel_values"].ndim
    height, width = UNIT * Dim("rows", min=1, max=16), UNIT * Dim("columns", min=1, max=16)
    return {"pixel_values": {0: Dim("batch", min=1, max=8), axes - 2: height, axes - 1: width}}


def flat(outputs) -> list[Tensor]:
    """All tensors of an output, in order."""
    if isinstance(outputs, Tensor):
        return [outputs]
    parts = outputs.values() if isinstance(outputs, dict) else outputs or ()
    return [tensor for part in parts if part is not None for tensor in flat(part)]


def assert_right_for_other_sizes(name: str, model: nn.Module, run: Callable, tolerance: float):
    for batch, height, width in ((2, 32, 32), (1, 48, 32), (3, 16, 64)):
        inputs = images(name, batch, height, width)
        with torch.no_grad():
            expected = flat(model(**inputs))
        found = flat(run(inputs))
        assert len(found) == len(expected) > 0
        for left, right in zip(found, expected, strict=True):
            torch.testing.assert_close(torch.as_tensor(left), right, atol=tolerance, rtol=tolerance)


def exported(exporter, config, name: str, model: nn.Module):
    inputs = images(name, 2, 32, 32)
    return exporter.export(model, inputs, config(dynamic=True, dynamic_shapes=free_axes(inputs)))


@pytest.mark.slow
@every_family
def test_the_graph_of_torch_is_right_for_other_sizes(name):
    from transformers.exporters.exporter_dynamo import DynamoConfig, DynamoExporter

    model = build(name)
    graph = exported(DynamoExporter(), DynamoConfig, name, model)
    program = graph.program if hasattr(graph, "program") else graph  # the program itself before 5.23
    assert_right_for_other_sizes(name, model, lambda inputs: program.module()(**inputs), 1e-5)


@pytest.mark.slow
@every_family
def test_the_onnx_graph_is_right_for_other_sizes(name, tmp_path):
    pytest.importorskip("onnxscript", reason="needs the extra onnx")
    runtime = pytest.importorskip("onnxruntime", reason="needs the extra onnx")
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    model = build(name)
    graph = exported(OnnxExporter(), OnnxConfig, name, model)
    if hasattr(graph, "program"):
        graph.save_pretrained(tmp_path)
    else:  # before 5.23
        graph.save(tmp_path / "model.onnx")
    session = runtime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])

    def run(inputs: dict[str, Tensor]) -> list[Tensor]:
        given = {node.name: inputs[node.name].numpy() for node in session.get_inputs()}
        return [torch.from_numpy(array) for array in session.run(None, given)]

    assert_right_for_other_sizes(name, model, run, 1e-4)
