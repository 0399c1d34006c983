"""Train a vision-language model stage by stage with the stock Trainer: loss per token, exact resume, cached tiles."""

from pathlib import Path

import torch
from torch.utils.data import Dataset, Sampler
from transformers import Trainer

from vitweave.modeling.modeling_multi_encoder_vlm import MultiEncoderVlmForConditionalGeneration
from vitweave.training.runs import build_trainer, check_datasets, resume_point, run, run_arguments
from vitweave.training.vlm_captions import CaptionSamples
from vitweave.training.vlm_data import VlmCollator, VlmDataset
from vitweave.training.vlm_features import with_vlm_features
from vitweave.training.vlm_loss import TokenLoss, token_losses
from vitweave.training.vlm_stages import apply_stage

BY_LENGTH = ("group_by_length", "batch_rebalance")  # strategies of the Trainer that ask for every sample's length


class LengthsOf(Dataset):
    """What a sampler that goes by lengths reads of a dataset: `input_ids` of the right length, no image decoded."""

    def __init__(self, dataset: VlmDataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, range]:
        if index >= len(self):
            raise IndexError(index)
        return {"input_ids": range(self.dataset.length(index))}


class EpochSampler(Sampler):
    """A sampler whose order is a function of seed and epoch alone, so that a resumed run sees the same batches."""

    def __init__(self, sampler: Sampler, dataset: VlmDataset, seed: int):
        self.sampler, self.dataset, self.seed = sampler, dataset, seed

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self):
        self.sampler.generator = torch.Generator().manual_seed(self.seed + 100_003 * self.dataset.epoch)
        return iter(self.sampler)


class VlmTrainer(Trainer):
    """The stock Trainer, but for the evaluated loss, which is the mean of all tokens instead of the mean of batches,
    and for lengths, which are told without decoding any image."""

    def _get_train_sampler(self, train_dataset=None):
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy not in BY_LENGTH or not hasattr(dataset, "length"):
            return super()._get_train_sampler(dataset)
        sampler = super()._get_train_sampler(LengthsOf(dataset))
        return EpochSampler(sampler, dataset, self.args.seed) if hasattr(sampler, "generator") else sampler

    def _get_eval_sampler(self, eval_dataset):
        return super()._get_eval_sampler(LengthsOf(eval_dataset) if hasattr(eval_dataset, "length") else eval_dataset)

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        found = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        per_token = found.metrics.pop(f"{metric_key_prefix}_token_loss", None)
        if per_token is not None:
            found.metrics[f"{metric_key_prefix}_loss"] = per_token
        return found


def bare(model) -> MultiEncoderVlmForConditionalGeneration:
    """The vision-language model below adapters."""
    kind = MultiEncoderVlmForConditionalGeneration
    return next((part for part in model.modules() if isinstance(part, kind)), model)


def check_vlm_datasets(*datasets) -> None:
    """Refuse one dataset in both roles, and other kinds."""
    check_datasets(*datasets)
    strange = [type(one).__name__ for one in datasets if not isinstance(one, (VlmDataset, type(None)))]
    if strange:
        raise ValueError(f"expected VlmDatasets, got {strange}; VlmDataset.from_source makes one")


def train_vlm(
    model,
    train_dataset,
    eval_dataset=None,
    processor=None,
    output_dir: str | Path = "runs/vlm",
    stage: str | None = None,
    resume: bool = False,
    encoder_lr_scale: float = 1.0,
    sample_captions: int = 0,
    callbacks=(),
    cache_features: str | Path | None = None,
    **arguments,
) -> dict[str, float]:
    """Train one stage, keep the checkpoint with the lowest loss, save it to `output_dir`, and return its metrics.

    Two stages are two calls with two folders. Every learnt token counts as much as any other, whatever the batches and
    `gradient_accumulation_steps`. On one CPU a killed run that is resumed ends with the same bits as an uninterrupted
    one.

    Args:
        model: a `MultiEncoderVlmForConditionalGeneration`, or a PEFT model of one.
        train_dataset, eval_dataset: `VlmDataset`; two different objects.
        processor: saved beside every checkpoint; None takes that of train_dataset.
        stage: which parts are trained, one of `vlm_stages.STAGES`; None trains what requires a gradient.
        resume: go on from the last whole checkpoint in `output_dir`, or from the start if there is none.
        encoder_lr_scale: the encoders' learning rate as a multiple of `learning_rate`.
        sample_captions: at every evaluation so many captions are written beside their images (`captions-<step>.png`).
        cache_features: folder in which the features of frozen encoders are kept, so that every tile runs through them
            once. Encoders that adapters of the fusion reach into (mixture_of_resolution) are refused.
        arguments: fields of `TrainingArguments`, which replace the defaults of `run_arguments`;
            `train_sampling_strategy="group_by_length"` puts samples of similar length into a batch.

    Returns:
        train_loss of the steps taken by this call and, with an eval_dataset, loss: the mean of its learnt tokens.
    """
    check_vlm_datasets(train_dataset, eval_dataset)
    if stage is not None:
        apply_stage(model, stage)
    defaults = {"weight_decay": 0.0, "warmup_steps": 0.03, "per_device_train_batch_size": 8}
    best = None if eval_dataset is None else "loss"
    args = run_arguments(output_dir, best, greater_is_better=False, **defaults | arguments)
    checkpoint = resume_point(args, resume)
    processor = train_dataset.processor if processor is None else processor
    if sample_captions and eval_dataset is not None:
        callbacks = [*callbacks, CaptionSamples(eval_dataset, sample_captions)]
    train_dataset, eval_dataset = with_vlm_features(bare(model), train_dataset, eval_dataset, cache_features, args)
    trainer = build_trainer(
        model,
        args,
        checkpoint,
        train_dataset,
        eval_dataset,
        VlmCollator(processor.tokenizer),
        processor,
        *(TokenLoss(), token_losses, encoder_lr_scale, callbacks),
        trainer_class=VlmTrainer,
    )
    return run(trainer, checkpoint)
