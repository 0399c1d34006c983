"""The retrieval recipe on the real Trainer: it learns, goes on exactly, and cached features change nothing."""

import pytest
import torch
from tiny_retriever import tiny_dataset
from transformers import AutoModel, TrainerCallback

from vitweave.modeling.modeling_image_text_retriever import ImageTextRetrieverModel
from vitweave.modeling.modeling_layer_fusion import LayerFusionModel
from vitweave.modeling.modeling_specialized_vit import SpecializedViTConfig, SpecializedViTModel
from vitweave.modeling.text_encoder import build_text_model
from vitweave.training.retrieval import train_retrieval
from vitweave.training.retrieval_evaluation import evaluate_retrieval
from vitweave.training.text_tokenizer import small_text_config

FEW_STEPS = {
    "per_device_train_batch_size": 4,
    "disable_tqdm": True,
    "use_cpu": True,
    "max_steps": 6,
    "save_strategy": "steps",
    "save_steps": 3,
}
VISION = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 64, "patch_size": 8}
TRAIN, VALIDATION = tiny_dataset(9), tiny_dataset(5)


def tiny_model(fusion="attentive_probe", fusion_options=None, **options):
    torch.manual_seed(0)
    vision = SpecializedViTModel(SpecializedViTConfig(**VISION, use_mask_token=False))
    if fusion is not None:
        options_of_fusion = {"fusion_type": fusion, "fusion_options": fusion_options}
        vision = LayerFusionModel.from_encoder(vision, layers=[1, 2], **options_of_fusion)
    text = build_text_model(small_text_config(TRAIN.processor.tokenizer, 32, 1, 2))
    return ImageTextRetrieverModel.from_encoders(vision, text, projection_dim=16, **options)


def run(folder, model, **options):
    return train_retrieval(model, TRAIN, VALIDATION, output_dir=folder, **FEW_STEPS | options)


def same_weights(one, other):
    expected = other.state_dict()
    return all(torch.equal(tensor, expected[name]) for name, tensor in one.state_dict().items())


def test_metrics_are_those_of_the_evaluator_and_the_folder_opens_by_itself(tmp_path):
    metrics = run(tmp_path, tiny_model(local_loss_weight=0.5))
    assert {"train_loss", "rsum", "rsum_low", "combined_rsum", "text_to_image_median_rank"} <= metrics.keys()
    model = AutoModel.from_pretrained(tmp_path)
    again = evaluate_retrieval(model, VALIDATION)
    assert again == {name: metrics[name] for name in again}
    assert (tmp_path / "tokenizer.json").is_file()


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise InterruptedError


def test_a_broken_run_goes_on_to_the_same_bits(tmp_path):
    whole, broken, resumed = (tiny_model() for _ in range(3))
    expected = run(tmp_path / "whole", whole)
    with pytest.raises(InterruptedError):
        run(tmp_path / "broken", broken, callbacks=[StopAt(5)])
    found = run(tmp_path / "broken", resumed, resume=True)
    assert same_weights(resumed, whole)
    assert found["rsum"] == expected["rsum"]


@pytest.mark.parametrize(
    ("fusion", "options"),
    [
        (None, {}),
        pytest.param("concat", {}, marks=pytest.mark.slow),
        pytest.param("attentive_probe", {"local_loss_weight": 0.5}, marks=pytest.mark.slow),
        ("film", {"local_loss_weight": 0.5, "embedding_chunk_size": 3}),
    ],
)
def test_cached_features_train_the_same_weights(tmp_path, fusion, options):
    chunk = options.pop("embedding_chunk_size", None)
    online, cached = (tiny_model(fusion, freeze_vision_encoder=True, **options) for _ in range(2))
    start = {name: tensor.clone() for name, tensor in online.state_dict().items()}
    expected = run(tmp_path / "online", online, embedding_chunk_size=chunk)
    found = run(tmp_path / "cached", cached, cache_features=tmp_path / "features", embedding_chunk_size=chunk)
    assert same_weights(cached, online)
    assert found["rsum"] == expected["rsum"]
    assert not same_weights(online, type("Start", (), {"state_dict": lambda self: start})())
    encoder = online.vision_encoder.state_dict(
        prefix="vision_model." if fusion is None else "vision_model.encoder.model."
    )
    assert all(torch.equal(tensor, start[name]) for name, tensor in encoder.items())


def test_a_trained_encoder_has_no_features_to_keep(tmp_path):
    with pytest.raises(ValueError, match="expected a frozen encoder"):
        run(tmp_path, tiny_model(), cache_features=tmp_path / "features")


def test_too_few_pairs_for_a_batch(tmp_path):
    with pytest.raises(ValueError, match="at least one whole batch, 10 pairs, got 9"):
        run(tmp_path, tiny_model(), per_device_train_batch_size=10)
