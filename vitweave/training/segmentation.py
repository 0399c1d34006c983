"""Train a segmentation model with the stock Trainer: data order, augmentation, metrics and exact resume."""

from pathlib import Path

from vitweave.training.metrics import SegmentationMetrics, predicted_classes
from vitweave.training.runs import build_trainer, check_datasets, resume_point, run, run_arguments
from vitweave.training.segmentation_data import collate_segmentation


def checked_ignore_index(config, processor) -> int:
    """The ignored class id, which the loss of the model and the labels of the processor must agree on."""
    in_model = getattr(config, "ignore_index", getattr(config, "semantic_loss_ignore_index", 255))
    in_labels = getattr(processor, "ignore_index", in_model)
    if in_model != in_labels:
        raise ValueError(f"the model ignores class id {in_model}, the processor writes {in_labels}; set both alike")
    return in_model


def name_foreign_labels(datasets, num_labels: int) -> None:
    """Tell the datasets which class ids exist: wrong ones then end in an error that names the file."""
    for dataset in datasets:
        if dataset is not None and getattr(dataset, "num_labels", num_labels) is None:
            dataset.num_labels = num_labels


def train_segmentation(
    model,
    train_dataset,
    eval_dataset=None,
    processor=None,
    output_dir: str | Path = "runs/segmentation",
    resume: bool = False,
    encoder_lr_scale: float = 1.0,
    callbacks=(),
    cache_features: str | Path | None = None,
    **arguments,
) -> dict[str, float]:
    """Train, keep the checkpoint with the best mean IoU, save it to `output_dir`, and return its metrics.

    What is trained is what requires a gradient: everything, the head of a model with `freeze_backbone`, or the adapter
    of a PEFT model. On one CPU a killed run that is resumed ends with the same bits as an uninterrupted one. The
    learning rate and the weight decay are those of DINOv2's linear segmentation.

    Args:
        train_dataset, eval_dataset: `SegmentationDataset`, or any dataset with its items; two different objects.
        processor: saved beside every checkpoint, so that each can be used by itself.
        resume: go on from the last whole checkpoint in `output_dir`, or from the start if there is none.
        encoder_lr_scale: the encoder's learning rate as a multiple of `learning_rate`.
        cache_features: folder in which a frozen encoder's features are kept (`feature_cache`), so that every image runs
            through it once; a dataset with augmentation is left as it is.
        arguments: fields of `TrainingArguments` (max_steps, num_train_epochs, learning_rate, seed, ...), which replace
            the defaults of `run_arguments`.

    Returns:
        train_loss of the steps taken by this call and, with an eval_dataset, mean_iou, pixel_accuracy, mean_accuracy,
        iou_<class name> and loss.
    """
    args = run_arguments(output_dir, None if eval_dataset is None else "mean_iou", **arguments)
    checkpoint = resume_point(args, resume)
    config = model.config
    ignore_index = checked_ignore_index(config, processor)
    check_datasets(train_dataset, eval_dataset)
    name_foreign_labels((train_dataset, eval_dataset), config.num_labels)
    trainer = build_trainer(
        model,
        args,
        checkpoint,
        train_dataset,
        eval_dataset,
        collate_segmentation,
        processor,
        SegmentationMetrics(config.num_labels, ignore_index, config.id2label),
        predicted_classes,
        encoder_lr_scale,
        callbacks,
        cache_features,
    )
    return run(trainer, checkpoint)
