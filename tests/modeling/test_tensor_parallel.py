"""The rules of tensor parallelism: two processes that share the weights of a specialised ViT give what one gives."""

import pytest
import torch
from distributed_heads import HEADS, pixels
from processes import in_processes
from safetensors.torch import load_file
from tensor_parallel import VARIANTS, classifier, run_variants
from torch import nn

pytest.importorskip("transformers.distributed.tensor_parallel", reason="needs a transformers with this module")


def test_every_linear_of_the_blocks_has_a_rule_and_every_rule_a_module():
    model = classifier("plain").specialized_vit
    linears = [name for name, module in model.encoder.layer[0].named_modules() if isinstance(module, nn.Linear)]
    rules = {name.removeprefix("encoder.layer.*."): style for name, style in model._tp_plan.items()}
    assert rules.keys() == set(linears)
    assert {name for name, style in rules.items() if style == "rowwise"} == {
        f"{name}{twin}" for name in ("attention.o_proj", "mlp.fc2") for twin in ("", "_cls")
    }


@pytest.mark.parametrize("name", ["classification", "classification-fused", "classification-encoders", "segmentation"])
def test_a_model_around_a_specialised_vit_has_its_rules(name):
    model = HEADS[name].build()
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    found = {rule.replace("*", "0") for rule in model._tp_plan}
    assert found and found <= linears


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """The saved models, and the folder where two processes left what they make of them."""
    saved, folder = tmp_path_factory.mktemp("saved"), tmp_path_factory.mktemp("together")
    for name in VARIANTS:
        classifier(name).save_pretrained(saved / name)
    in_processes(run_variants, folder, str(saved))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_two_processes_share_the_weights_and_give_the_same(name, together):
    model = classifier(name)
    logits = model(pixels(1)).logits
    logits.square().sum().backward()
    gradients = {key: weight.grad for key, weight in model.named_parameters() if weight.grad is not None}
    for rank in (0, 1):
        found = load_file(together / f"{name}-{rank}.safetensors")
        torch.testing.assert_close(found.pop("logits"), logits.detach(), atol=1e-5, rtol=1e-5)
        assert found.pop("split") >= 2 * len(model.specialized_vit.encoder.layer)
        assert found.keys() == gradients.keys()
        for key, gradient in gradients.items():
            torch.testing.assert_close(found[key], gradient, atol=1e-4, rtol=1e-4, msg=lambda text, key=key: key + text)
