"""`_no_split_modules`: what device maps keep together and what FSDP wraps."""

import pytest
from distributed_heads import HEADS, vit
from test_every_class import SUBJECTS
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from vitweave.configuration.configuration_layer_fusion import LayerFusionConfig
from vitweave.configuration.configuration_multi_encoder import MultiEncoderConfig
from vitweave.modeling.encoder_fusion.registry import ENCODER_FUSIONS
from vitweave.modeling.layer_fusion.registry import LAYER_FUSIONS
from vitweave.modeling.modeling_layer_fusion import LayerFusionModel
from vitweave.modeling.modeling_multi_encoder import MultiEncoderModel
from vitweave.modeling.pretrained import VitweavePreTrainedModel

BUILDERS = {f"head-{name}": head.build for name, head in HEADS.items()}
BUILDERS |= {name: lambda subject=subject: subject.model_class(subject.config()) for name, subject in SUBJECTS.items()}
every_model = pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)


def names_inside(model: nn.Module) -> set[str]:
    """The modules that are, or lie in, one that is not split."""
    kept = [name for name, part in model.named_modules() if type(part).__name__ in model._no_split_modules]
    return {name for name, _ in model.named_modules() if any(f"{name}.".startswith(f"{whole}.") for whole in kept)}


@every_model
def test_every_name_is_of_a_module_and_every_block_is_named(build):
    model = build()
    assert model._no_split_modules
    assert model._no_split_modules <= {type(part).__name__ for part in model.modules()}
    inside = names_inside(model)
    blocks = {name for name, part in model.named_modules() if isinstance(part, GradientCheckpointingLayer)}
    assert blocks and blocks <= inside
    fusions = {name for name, _ in model.named_modules() if name.rpartition(".")[2] == "fusion"}
    assert fusions <= inside


@every_model
def test_parameters_outside_are_those_of_single_layers(build):
    """A part with parameters of its own and layers beside them adds them up: it must be on one device."""
    model = build()
    inside, native = names_inside(model), model._native_prefixes()
    for name, part in model.named_modules():
        if (
            name
            and name not in inside
            and not name.startswith(native)
            and any(True for _ in part.parameters(recurse=False))
        ):
            assert not any(True for _ in part.children()), name


def test_a_model_names_only_the_fusion_that_it_has():
    every = {fusion.__name__ for fusion in (*LAYER_FUSIONS.values(), *ENCODER_FUSIONS.values())}
    fused = LayerFusionModel(LayerFusionConfig(encoder_config=vit(), layers=[1, 2], fusion_type="weighted_sum"))
    joined = MultiEncoderModel(MultiEncoderConfig(encoder_configs=[vit(), vit()], image_size=32))
    assert every & fused._no_split_modules == {"WeightedSumFusion"}
    assert every & joined._no_split_modules == {"ChannelConcatFusion"}


def test_the_embeddings_are_named_where_they_lie_inside_a_part_that_is_named():
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.patches = nn.Conv2d(3, 4, 2)

    class Toy(VitweavePreTrainedModel):
        config_class = type(vit())
        _no_split_modules = ["Wrapped", "Absent"]

        def __init__(self, config, inside: bool):
            super().__init__(config)
            self.wrapped, self.patches = Wrapped(), nn.Linear(2, 2)
            self.inside = inside
            self.post_init()

        def get_input_embeddings(self):
            return self.wrapped.patches if self.inside else self.patches

    assert Toy(vit(), inside=True)._no_split_modules == {"Wrapped", "Conv2d"}
    assert Toy(vit(), inside=False)._no_split_modules == {"Wrapped"}
