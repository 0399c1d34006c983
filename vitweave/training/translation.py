"""Train an image-to-image model of several sensors with the stock Trainer, alone or against a discriminator."""

from pathlib import Path

from vitweave.modeling.modeling_modality_translation import ModalityAdversarialTranslator
from vitweave.training.image_distances import ImageDistances
from vitweave.training.paired_data import collate_pairs
from vitweave.training.runs import build_trainer, check_datasets, resume_point, run, run_arguments
from vitweave.training.translation_metrics import TranslationMetrics, drawn_images


def train_translation(
    model,
    train_dataset,
    eval_dataset=None,
    processor=None,
    output_dir: str | Path = "runs/translation",
    resume: bool = False,
    adversarial: bool = False,
    distances: ImageDistances | None = None,
    callbacks=(),
    encoder_lr_scale: float = 1.0,
    **arguments,
) -> dict[str, float]:
    """Train, keep the checkpoint with the lowest MAE, save it to `output_dir`, and return its metrics.

    Args:
        model: a `ModalityFusionForImageToImage`.
        train_dataset, eval_dataset: `TranslationDataset`, or any dataset with its items; two different objects.
        processor: saved beside every checkpoint, so that each can be used by itself.
        resume: go on from the last whole checkpoint in `output_dir`, or from the start if there is none.
        adversarial: train a discriminator with it (`ModalityAdversarialTranslator`), whose weights the checkpoints hold
            too. Adam's betas are 0.5 and 0.999 then, and gradients are not clipped. The model saved to `output_dir` at
            the end is the generator alone.
        distances: adds fid and kid to the figures, e.g. `ImageDistances(EncoderFeatures("facebook/dinov2-base"))`.
        encoder_lr_scale: the encoder's learning rate as a multiple of `learning_rate`; 0.1 suits a pretrained one.
        arguments: fields of `TrainingArguments` (max_steps, num_train_epochs, learning_rate, seed, ...), which replace
            the defaults of `run_arguments`; the learning rate is 2e-4.

    Returns:
        train_loss of the steps taken by this call and, with an eval_dataset, loss (the generator's own), mae, mse, psnr
        and ssim, see `translation_metrics`, and what `distances` gives.
    """
    defaults = {"learning_rate": 2e-4}
    if adversarial:
        defaults |= {"adam_beta1": 0.5, "max_grad_norm": 0.0}
    best_metric = None if eval_dataset is None else "mae"
    args = run_arguments(output_dir, best_metric, greater_is_better=False, **{**defaults, **arguments})
    checkpoint = resume_point(args, resume)
    check_datasets(train_dataset, eval_dataset)
    trainer = build_trainer(
        ModalityAdversarialTranslator.around(model) if adversarial else model,
        args,
        checkpoint,
        train_dataset,
        eval_dataset,
        collate_pairs,
        processor,
        TranslationMetrics(distances),
        drawn_images,
        encoder_lr_scale,
        callbacks,
    )
    metrics = run(trainer, checkpoint)
    if adversarial and trainer.args.should_save:
        model.save_pretrained(output_dir)  # in place of the pair
    return metrics
