import pytest
import torch
from peft import LoraConfig, get_peft_model
from retrieval_models import pairs, retriever
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import Trainer, TrainingArguments

from vitweave.training.cached_gradients import cache_gradients

DROPOUT = {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3}


def gradients(model: nn.Module, inputs: dict, seed: int = 0) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(seed)
    model(**inputs).loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def assert_equal_gradients(found: dict, expected: dict):
    assert found.keys() == expected.keys() and found
    for name, gradient in expected.items():
        torch.testing.assert_close(
            found[name], gradient, atol=1e-10, rtol=1e-9, msg=lambda text, name=name: name + text
        )


@pytest.mark.parametrize("loss", ["infonce", "siglip"])
@pytest.mark.parametrize("chunk_size", [1, 2, 3, 8])
def test_chunks_give_the_gradient_of_the_whole_batch(loss, chunk_size):
    inputs = pairs(5)
    inputs["sentence_ids"][1] = -1
    model = retriever(contrastive_loss=loss).double().train()
    expected, value = gradients(model, inputs), model(**inputs).loss
    cache_gradients(model, chunk_size)
    torch.testing.assert_close(model(**inputs).loss, value)
    assert_equal_gradients(gradients(model, inputs), expected)


def test_dropout_draws_the_same_masks_in_both_passes(monkeypatch):
    model, inputs = retriever(text=DROPOUT).double().train(), pairs(5)
    cache_gradients(model, 2)
    found = gradients(model, inputs)
    assert not torch.equal(gradients(model, inputs, seed=1)["logit_scale"], found["logit_scale"])  # dropout is there

    def with_graph(encode, size, **chunked):
        parts = []
        for start in range(0, 5, size):
            cut = {k: v[start : start + size] if isinstance(v, torch.Tensor) else v for k, v in chunked.items()}
            parts.append(encode(**cut))
        return type(parts[0])(*(None if c[0] is None else torch.cat(c) for c in zip(*parts, strict=True)))

    monkeypatch.setattr("vitweave.modeling.modeling_image_text_retriever.encode_in_chunks", with_graph)
    assert_equal_gradients(found, gradients(model, inputs))


def kept_for_backward(model: nn.Module, inputs: dict) -> int:
    """Bytes of activations that the forward pass keeps."""
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    own = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        model(**inputs)
    return sum(size for pointer, size in kept.items() if pointer not in own)


def test_the_forward_pass_keeps_no_activations_of_the_encoders():
    model, inputs = retriever().train(), pairs(8)
    whole = kept_for_backward(model, inputs)
    assert kept_for_backward(cache_gradients(model, 2), inputs) < whole / 4


def test_evaluation_is_not_cut_into_chunks_and_none_ends_it():
    model, inputs = retriever().eval(), pairs(5)
    expected = model(**inputs).logits_per_image
    assert torch.equal(cache_gradients(model, 2)(**inputs).logits_per_image, expected)
    assert cache_gradients(model, None).embedding_chunk_size is None


def test_works_below_adapters():
    adapted = get_peft_model(retriever().double().train(), LoraConfig(r=2, target_modules=["q_proj", "query"]))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            weight.data += 0.05
    expected = gradients(adapted, pairs(5))
    assert_equal_gradients(gradients(cache_gradients(adapted, 2), pairs(5)), expected)
    assert all("lora" in name for name in expected)


def test_what_cannot_be_cached_is_refused():
    with pytest.raises(ValueError, match="holds none"):
        cache_gradients(nn.Linear(2, 2), 2)
    with pytest.raises(ValueError, match="chunk_size=0"):
        cache_gradients(retriever(), 0)
    model = retriever()
    model.vision_model.norm_of_batches = nn.BatchNorm1d(3)
    with pytest.raises(ValueError, match="norm_of_batches"):
        cache_gradients(model, 2)
    model.vision_model.requires_grad_(False)
    cache_gradients(model, 2)


class Pairs(torch.utils.data.Dataset):
    """Eight fixed pairs."""

    def __init__(self):
        self.inputs = pairs(8)

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict:
        return {name: value[index] for name, value in self.inputs.items()}


def trained(folder, chunk_size: int | None, resume_from: str | None = None, seed: int = 0, **text):
    model = cache_gradients(retriever(seed=seed, text=text).double(), chunk_size)
    arguments = TrainingArguments(
        str(folder),
        max_steps=4,
        save_steps=2,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=1,
        learning_rate=1e-2,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        remove_unused_columns=False,
    )
    Trainer(model, arguments, train_dataset=Pairs()).train(resume_from_checkpoint=resume_from)
    return model.state_dict()


def test_the_stock_trainer_learns_the_same_and_resumes_exactly(tmp_path):
    cached = trained(tmp_path / "cached", 3, **DROPOUT)
    resumed = trained(tmp_path / "resumed", 3, str(tmp_path / "cached" / "checkpoint-2"), seed=9, **DROPOUT)
    assert not [name for name, tensor in resumed.items() if not torch.equal(tensor, cached[name])]
    whole, in_chunks = trained(tmp_path / "whole", None), trained(tmp_path / "chunks", 3)
    for name, tensor in whole.items():
        torch.testing.assert_close(in_chunks[name], tensor, atol=1e-7, rtol=0)
