"""The recipe on the real Trainer: metrics, best checkpoint, refusals, exact resume."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForSemanticSegmentation,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    Trainer,
    TrainerCallback,
)

from vitweave.configuration.configuration_dense_predictor import DensePredictorConfig
from vitweave.configuration.configuration_specialized_vit import SpecializedViTConfig
from vitweave.modeling.modeling_dense_predictor import DensePredictorForSemanticSegmentation
from vitweave.processing.augmentation import SegmentationAugmentation
from vitweave.processing.image_processing_pil_segmentation import SegmentationImageProcessorPil
from vitweave.training.runs import run_arguments
from vitweave.training.segmentation import train_segmentation
from vitweave.training.segmentation_data import SegmentationDataset
from vitweave.training.synthetic_shapes import SyntheticShapes

PROCESSOR = SegmentationImageProcessorPil(size=32)
FEW_STEPS = {"per_device_train_batch_size": 2, "disable_tqdm": True, "use_cpu": True, "dataloader_num_workers": 0}


def tiny_model(**options):
    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    backbone = SpecializedViTConfig(**small, qkv_blocks="all", hidden_dropout_prob=0.1, out_indices=[1, 2])
    config = DensePredictorConfig(backbone_config=backbone, id2label=SyntheticShapes.id2label, **options)
    return DensePredictorForSemanticSegmentation(config)


def stock_model():
    """A model whose tensors transformers saves under other names than the live ones."""
    torch.manual_seed(0)
    small = {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 8, 8, 8], "num_attention_heads": [1, 1, 1, 1]}
    return SegformerForSemanticSegmentation(SegformerConfig(**small, decoder_hidden_size=8, num_labels=3))


def data(length=5, augmented=True, seed=0, processor=PROCESSOR):
    augmentation = SegmentationAugmentation(crop_size=32, color_jitter=0.2) if augmented else None
    return SegmentationDataset(SyntheticShapes(length, seed=seed), processor, augmentation)


def run(folder, model=None, train=None, **options):
    model = tiny_model() if model is None else model
    evaluation = data(3, augmented=False, seed=1)
    return train_segmentation(model, train or data(), evaluation, PROCESSOR, folder, **FEW_STEPS | options)


class StopAt(TrainerCallback):
    """Breaks the run off the hard way, right after a step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise InterruptedError


class Watch(TrainerCallback):
    def __init__(self, dataset):
        self.dataset, self.epochs = dataset, {}

    def on_step_end(self, args, state, control, **kwargs):
        self.epochs[state.global_step] = int(self.dataset._epoch)


def test_the_best_checkpoint_is_returned_and_a_fresh_load_equals_it(tmp_path):
    model = tiny_model()
    metrics = run(tmp_path, model, num_train_epochs=2)
    names = {"train_loss", "loss", "mean_iou", "pixel_accuracy", "mean_accuracy", "iou_background", "iou_disc"}
    assert names <= set(metrics) and 0 <= metrics["mean_iou"] <= 1
    fresh = AutoModelForSemanticSegmentation.from_pretrained(tmp_path)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in fresh.state_dict().items())
    again = Trainer(
        fresh, run_arguments(tmp_path, "mean_iou", **FEW_STEPS), eval_dataset=data(3, augmented=False, seed=1)
    ).predict(data(3, augmented=False, seed=1))
    assert again.predictions.shape == (3, 3, 32, 32)
    assert SegmentationImageProcessorPil.from_pretrained(tmp_path).size["height"] == 32
    assert (tmp_path / "checkpoint-6" / "preprocessor_config.json").is_file()


@pytest.mark.parametrize(
    ("build", "save_steps", "stop", "resumed_from"),
    [(tiny_model, 2, 2, 0), (tiny_model, 2, 5, 4), (tiny_model, 3, 4, 3), (stock_model, 2, 5, 4)],
    ids=["before any checkpoint", "inside an epoch", "between epochs", "stock model"],
)
def test_a_resumed_run_sees_the_same_epochs_and_ends_alike(tmp_path, build, save_steps, stop, resumed_from):
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": save_steps}
    whole, broken, resumed, train = build(), build(), build(), data()
    metrics = run(tmp_path / "whole", whole, **options)
    with pytest.raises(InterruptedError):
        run(tmp_path / "broken", broken, callbacks=[StopAt(stop)], **options)
    watch = Watch(train)
    found = run(tmp_path / "broken", resumed, train, resume=True, callbacks=[watch], **options)
    assert watch.epochs == {step: (step - 1) // 3 for step in range(resumed_from + 1, 7)}
    assert found["mean_iou"] == metrics["mean_iou"]
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


@pytest.mark.parametrize("build", [tiny_model, stock_model])
@pytest.mark.parametrize("steps", [{"max_steps": 4}, {"num_train_epochs": 1}])
def test_a_finished_run_can_be_asked_again(tmp_path, build, steps):
    model, again = build(), build()
    first = run(tmp_path, model, **steps)
    left = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert run(tmp_path, again, resume=True, **steps)["mean_iou"] == first["mean_iou"]
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == left  # not one step more
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


def test_earlier_checkpoints_are_never_overwritten(tmp_path):
    run(tmp_path, max_steps=3)
    before = sorted(path.stat().st_mtime_ns for path in tmp_path.rglob("*"))
    with pytest.raises(FileExistsError, match=r"checkpoint-3 of an earlier run; resume=True"):
        run(tmp_path, max_steps=3)
    assert before == sorted(path.stat().st_mtime_ns for path in tmp_path.rglob("*"))


def test_frozen_encoder_and_adapters_train_only_their_part(tmp_path):
    peft = pytest.importorskip("peft")
    frozen, start = tiny_model(freeze_backbone=True), tiny_model()
    run(tmp_path / "frozen", frozen, max_steps=2)
    changed = {n for n, p in frozen.named_parameters() if not torch.equal(p, start.get_parameter(n))}
    assert changed and all(name.startswith("head") for name in changed)
    adapter = peft.LoraConfig(r=2, target_modules=["q_proj_cls"], modules_to_save=["head"])
    model = peft.get_peft_model(tiny_model(), adapter)
    metrics = run(tmp_path / "lora", model, max_steps=3, save_strategy="steps", save_steps=2)
    assert "mean_iou" in metrics and (tmp_path / "lora" / "adapter_model.safetensors").is_file()
    again = peft.get_peft_model(tiny_model(), adapter)
    assert run(tmp_path / "lora", again, max_steps=3, save_strategy="steps", save_steps=2, resume=True) is not None
    for (name, value), other in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(value, other), name


def test_without_an_evaluation_set_there_is_only_the_loss(tmp_path):
    metrics = train_segmentation(tiny_model(), data(), output_dir=tmp_path, max_steps=2, **FEW_STEPS)
    assert set(metrics) == {"train_loss"} and (tmp_path / "model.safetensors").is_file()


def test_bad_input_is_refused(tmp_path):
    with pytest.raises(TypeError, match="learning_rat"):
        run(tmp_path, learning_rat=1e-3)
    train = data()
    with pytest.raises(ValueError, match="one object"):
        train_segmentation(tiny_model(), train, train, PROCESSOR, tmp_path, **FEW_STEPS)
    with pytest.raises(ValueError, match="ignores class id 7, the processor writes 255"):
        run(tmp_path, tiny_model(ignore_index=7))
    with pytest.raises(ValueError, match="no parameter"):
        run(tmp_path, tiny_model().requires_grad_(False))
    narrow = tiny_model()
    narrow.config.num_labels = 2
    with pytest.raises(ValueError, match=r"sample [0-4]: expected class ids 0 to 1"):
        run(tmp_path, narrow, max_steps=1)
    assert not list(Path(tmp_path).rglob("*.safetensors"))


@pytest.mark.slow
def test_killed_runs_end_with_the_same_bits():
    script = Path(__file__).parents[2] / "benchmarks" / "kill_resume.py"
    done = subprocess.run([sys.executable, str(script), "--kills", "2"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 of 2 resumed runs are bit-identical" in done.stdout
