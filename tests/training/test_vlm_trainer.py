"""A vision-language model on the real Trainer."""

import pytest
import torch
from model_checks import check_equal_state
from tiny_vlm import EightSamples, tiny_vlm_config
from transformers import Trainer, TrainerCallback, TrainingArguments

from vitweave.modeling.modeling_multi_encoder_vlm import MultiEncoderVlmForConditionalGeneration
from vitweave.training.vlm_stages import apply_stage


class StopAt(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 5:
            raise InterruptedError


def build():
    torch.manual_seed(0)
    model = MultiEncoderVlmForConditionalGeneration(tiny_vlm_config())
    apply_stage(model, "mgm-2")
    return model


def trainer_of(model, folder, callbacks=(), **options):
    given = {"max_steps": 6, "save_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 1e-3} | options
    arguments = TrainingArguments(
        str(folder), use_cpu=True, report_to="none", disable_tqdm=True, remove_unused_columns=False, **given
    )
    data = EightSamples()
    return Trainer(model, arguments, train_dataset=data, data_collator=data.collate, callbacks=list(callbacks))


@pytest.mark.slow
def test_a_broken_run_goes_on_to_the_same_bits(tmp_path):
    whole, broken, resumed = build(), build(), build()
    trainer_of(whole, tmp_path / "whole").train()
    with pytest.raises(InterruptedError):
        trainer_of(broken, tmp_path / "broken", [StopAt()]).train()
    trainer_of(resumed, tmp_path / "broken").train(resume_from_checkpoint=True)
    check_equal_state(resumed, whole)
    start = build().state_dict()
    moved = {name for name, tensor in whole.state_dict().items() if not torch.equal(tensor, start[name])}
    assert moved and all("encoder_" not in name for name in moved)


def test_accumulated_steps_equal_one_large_batch(tmp_path):
    """The loss is divided by the labels of the whole step, whose texts are of different lengths."""
    large, small = build(), build()
    options = {"max_steps": 1, "save_strategy": "no", "max_grad_norm": 0.0, "optim": "sgd", "learning_rate": 0.1}
    trainer_of(large, tmp_path, per_device_train_batch_size=4, **options).train()
    trainer_of(small, tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=4, **options).train()
    expected = large.state_dict()
    for name, tensor in small.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=1e-4, msg=name)
