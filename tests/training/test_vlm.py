"""The vision-language recipe on the real Trainer: it learns, goes on exactly, counts every token once, and cached
features change nothing."""

import pytest
import torch
from tiny_vlm import tiny_vlm_config, tiny_vlm_processor
from tiny_vlm_data import captioned, mixed_records, tiny_dataset
from transformers import AutoModelForImageTextToText, TrainerCallback

from vitweave.modeling.modeling_multi_encoder_vlm import MultiEncoderVlmForConditionalGeneration
from vitweave.training.vlm import LengthsOf, train_vlm
from vitweave.training.vlm_captions import generate_captions
from vitweave.training.vlm_data import VlmCollator, VlmDataset
from vitweave.training.vlm_loss import TokenLoss, token_losses
from vitweave.training.vlm_stages import apply_stage

PROCESSOR = tiny_vlm_processor()
PROMPT = "what is in this picture ?"
BOTH = "projector_and_fusion+language_model"
FEW_STEPS = {
    "per_device_train_batch_size": 4,
    "learning_rate": 3e-3,
    "disable_tqdm": True,
    "use_cpu": True,
    "max_steps": 6,
    "save_strategy": "steps",
    "save_steps": 3,
}


def tiny_model(**options):
    torch.manual_seed(0)
    return MultiEncoderVlmForConditionalGeneration(tiny_vlm_config(**options))


def run(folder, model, train=None, evaluate=None, **options):
    train = tiny_dataset(10, PROCESSOR, draw=True) if train is None else train
    evaluate = tiny_dataset(5, PROCESSOR, start=10) if evaluate is None else evaluate
    return train_vlm(model, train, evaluate, output_dir=folder, **FEW_STEPS | options)


def same_weights(one, other):
    expected = other.state_dict()
    return all(torch.equal(tensor, expected[name]) for name, tensor in one.state_dict().items())


def loss_of(model, dataset, batch_size=3):
    """The mean loss of all learnt tokens, by hand."""
    total, count = 0.0, 0
    with torch.no_grad():
        for start in range(0, len(dataset), batch_size):
            items = [dataset[index] for index in range(start, min(start + batch_size, len(dataset)))]
            batch = VlmCollator(dataset.processor.tokenizer)(items)
            learnt = (batch["labels"][:, 1:] != -100).sum()
            total, count = total + float(model.eval()(**batch).loss) * int(learnt), count + int(learnt)
    return total / count


@pytest.mark.slow
def test_two_stages_learn_what_they_should_and_the_folder_opens_by_itself(tmp_path):
    model = tiny_model()
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first = run(tmp_path / "1", model, stage="projector_and_fusion", max_steps=3)
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, start[name])}
    assert moved and all("multi_modal_projector" in name or "fusion" in name for name in moved)
    second = run(tmp_path / "2", model, stage=BOTH, max_steps=20, save_steps=10, sample_captions=2)
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, start[name])}
    assert any("language_model" in name for name in moved) and not any("encoder_" in name for name in moved)
    assert second["loss"] < 0.8 * first["loss"]
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "2")
    assert same_weights(loaded, model)
    assert loss_of(loaded, tiny_dataset(5, PROCESSOR, start=10)) == pytest.approx(second["loss"], abs=1e-5)
    assert (tmp_path / "2" / "tokenizer.json").is_file()
    assert {path.name for path in (tmp_path / "2").glob("*.png")} == {"captions-10.png", "captions-20.png"}


def test_every_token_counts_once_whatever_the_batches(tmp_path):
    """Long answers and text-only samples in one dataset: two small batches must give the step of a large one."""
    records = [*mixed_records(), {**captioned(1)[0], "caption": "a red car . " * 6}, *captioned(3)]
    models = []
    for batch, accumulated in ((8, 1), (2, 4)):
        model = tiny_model()
        apply_stage(model, BOTH)
        data = VlmDataset(records, PROCESSOR)
        options = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulated}
        train_vlm(model, data, output_dir=tmp_path / str(batch), **FEW_STEPS | options | {"max_steps": 2})
        models.append(model.state_dict())
    for name, tensor in models[0].items():
        torch.testing.assert_close(models[1][name], tensor, atol=2e-4, rtol=1e-3)


def test_the_evaluated_loss_is_that_of_all_tokens(tmp_path):
    data = VlmDataset([*mixed_records(), {**captioned(1)[0], "caption": "a red car . " * 6}], PROCESSOR)
    found = run(tmp_path, model := tiny_model(), evaluate=data, max_steps=1, save_steps=1, per_device_eval_batch_size=2)
    assert found["loss"] == pytest.approx(loss_of(model, data, batch_size=5), abs=1e-5)
    assert "token_loss" not in found


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise InterruptedError


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
def test_a_broken_run_goes_on_to_the_same_bits(tmp_path, strategy):
    options = {"stage": BOTH, "train_sampling_strategy": strategy}
    options |= {"max_steps": 8, "save_steps": 4, "gradient_accumulation_steps": 1}
    whole, broken, resumed = (tiny_model(text={"attention_dropout": 0.2}) for _ in range(3))
    expected = run(tmp_path / "whole", whole, **options)
    with pytest.raises(InterruptedError):
        run(tmp_path / "broken", broken, callbacks=[StopAt(7)], **options)
    found = run(tmp_path / "broken", resumed, resume=True, **options)
    assert same_weights(resumed, whole)
    assert found["loss"] == expected["loss"]


def test_batches_by_length_decode_nothing_to_get_them(tmp_path, monkeypatch):
    data = VlmDataset(mixed_records() * 16, PROCESSOR)  # of fewer the stock sampler makes no groups
    with monkeypatch.context() as patch:
        patch.setattr(VlmDataset, "encode_images", None)
        lengths = [len(item["input_ids"]) for item in LengthsOf(data)]
    seen = []

    class Spy(TrainerCallback):
        def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
            seen.extend(train_dataloader.batch_sampler if hasattr(train_dataloader, "batch_sampler") else [])

    run(tmp_path, tiny_model(), train=data, callbacks=[Spy()], train_sampling_strategy="group_by_length", max_steps=1)
    assert sorted(index for batch in seen for index in batch) == list(range(64))
    spread = sum(max(lengths[i] for i in batch) - min(lengths[i] for i in batch) for batch in seen)
    assert spread < 0.3 * len(seen) * (max(lengths) - min(lengths))  # a mixture has nearly all of it in every batch


@pytest.mark.slow
@pytest.mark.parametrize(("tiling", "kind"), [(None, "drawn captions"), ({"max_tiles": 4}, "conversations")])
def test_cached_tiles_train_the_same_weights(tmp_path, tiling, kind):
    processor = tiny_vlm_processor(tiling=tiling)
    if kind == "conversations":
        train, evaluate = VlmDataset(mixed_records() * 2, processor), VlmDataset(mixed_records()[1:], processor)
    else:
        train, evaluate = tiny_dataset(9, processor, draw=True), tiny_dataset(3, processor, start=9)
    online, cached = tiny_model(), tiny_model()
    options = {"stage": BOTH, "per_device_eval_batch_size": 1}
    expected = run(tmp_path / "online", online, train, evaluate, **options)
    found = run(tmp_path / "cached", cached, train, evaluate, cache_features=tmp_path / "features", **options)
    for name, tensor in online.state_dict().items():
        torch.testing.assert_close(cached.state_dict()[name], tensor, atol=1e-5, rtol=1e-4)
    assert found["loss"] == pytest.approx(expected["loss"], abs=1e-5)


@pytest.mark.slow
def test_the_encoders_see_every_tile_once(tmp_path, monkeypatch):
    processor = tiny_vlm_processor(tiling={"max_tiles": 4})
    data = VlmDataset(mixed_records(), processor)
    model, seen = tiny_model(), []
    tower = type(model.model.vision_tower)
    read = tower.read
    monkeypatch.setattr(
        tower, "read", lambda self, pixels, *rest: seen.append(len(pixels)) or read(self, pixels, *rest)
    )
    first = run(tmp_path / "1", model, data, evaluate=tiny_dataset(2, processor), stage="projector",
                cache_features=tmp_path / "features", max_steps=4, save_steps=4)  # fmt: skip
    tiles = sum(sum(data.tiles(index)[0]) for index in range(4)) + sum(tiny_dataset(2, processor).tiles(0)[0]) * 2
    # the first of every dataset is also measured, and batches without images look at a blank one
    assert tiles <= sum(seen) <= tiles + 2 + 4
    seen.clear()
    run(tmp_path / "2", model, data, evaluate=tiny_dataset(2, processor), stage=BOTH,
        cache_features=tmp_path / "features", max_steps=2, save_steps=2)  # fmt: skip
    assert sum(seen) <= 2 and first["loss"] > 0


def test_what_cannot_be_cached(tmp_path):
    folder = {"cache_features": tmp_path / "features"}
    with pytest.raises(ValueError, match="expected a frozen encoder"):
        run(tmp_path / "1", tiny_model(), stage="all", **folder)
    injecting = tiny_model(tower={"fusion_type": "mixture_of_resolution"})
    with pytest.raises(ValueError, match="acts between the blocks of encoder 0"):
        run(tmp_path / "2", injecting, stage="projector", **folder)
    with pytest.raises(ValueError, match="expected VlmDatasets"):
        run(tmp_path / "3", tiny_model(), train=[{}], stage="projector", **folder)


def test_captions_come_one_per_image_in_batches_of_any_size():
    model = tiny_model()
    pictures = [record["image"] for record in captioned(5)]
    found = generate_captions(model, PROCESSOR, pictures, PROMPT, max_new_tokens=5, batch_size=2)
    alone = [generate_captions(model, PROCESSOR, [picture], PROMPT, max_new_tokens=5)[0] for picture in pictures]
    assert found == alone
    assert len(generate_captions(model, PROCESSOR, [pictures[:2], pictures[2:3]], PROMPT, max_new_tokens=2)) == 2


@pytest.mark.slow
def test_it_says_back_what_it_has_learnt(tmp_path):
    data = tiny_dataset(6, PROCESSOR)
    model = tiny_model()
    train_vlm(model, data, output_dir=tmp_path, stage="all", **FEW_STEPS | {"max_steps": 60, "save_strategy": "no"})
    captions = generate_captions(model, PROCESSOR, [record["image"] for record in captioned(6)], PROMPT)
    assert [text.replace(" .", "") for text in captions] == ["a red car", "a green car", "a blue car"] * 2


def test_token_loss_adds_up_batches():
    logits = torch.randn(3, 5, 7)
    labels = torch.randint(7, (3, 5))
    labels[0, :4] = labels[2] = -100
    metric = TokenLoss()

    class Predictions:
        def __init__(self, rows):
            self.predictions = token_losses((logits[rows], None), labels[rows]).numpy()

    assert metric(Predictions(slice(0, 2)), compute_result=False) == {}
    found = metric(Predictions(slice(2, 3)), compute_result=True)["token_loss"]
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, 7), labels[:, 1:].reshape(-1))
    assert found == pytest.approx(float(expected), abs=1e-6)
    again = Predictions(slice(1, 2))
    expected = torch.nn.functional.cross_entropy(logits[1, :-1], labels[1, 1:])
    assert metric(again, compute_result=True)["token_loss"] == pytest.approx(float(expected), abs=1e-6)  # from nothing


def test_one_dataset_cannot_serve_both_roles(tmp_path):
    data = tiny_dataset(2, PROCESSOR)
    with pytest.raises(ValueError, match="one object"):
        train_vlm(tiny_model(), data, data, output_dir=tmp_path)
