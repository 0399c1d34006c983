"""Train a detector of transformers, over one of our backbones or any other, with the stock Trainer."""

from pathlib import Path

from vitweave.training.detection_data import collate_detection
from vitweave.training.detection_metrics import DetectionMetrics, predicted_boxes
from vitweave.training.runs import build_trainer, check_datasets, resume_point, run, run_arguments


def train_detection(
    model,
    train_dataset,
    eval_dataset=None,
    processor=None,
    output_dir: str | Path = "runs/detection",
    resume: bool = False,
    encoder_lr_scale: float = 1.0,
    callbacks=(),
    max_detections: int = 100,
    **arguments,
) -> dict[str, float]:
    """Train, keep the checkpoint with the best mAP, save it to `output_dir`, and return its metrics.

    The optimiser's defaults are those that the papers of DETR's family share: AdamW at 1e-4, weight decay 1e-4,
    gradients clipped at 0.1.

    Args:
        model: any detector of transformers whose outputs start with logits and boxes (DETR, Deformable DETR, RT-DETR,
            D-FINE, ...).
        train_dataset, eval_dataset: `DetectionDataset`, or any dataset with its items; two different objects.
        processor: the detector's image processor, saved beside every checkpoint; evaluating needs it.
        resume: go on from the last whole checkpoint in `output_dir`, or from the start if there is none.
        encoder_lr_scale: the backbone's learning rate as a multiple of `learning_rate`; 0.1 in DETR's papers.
        max_detections: per image and class, see `AveragePrecision`.
        arguments: fields of `TrainingArguments`, which replace the defaults of `run_arguments`.

    Returns:
        train_loss of the steps taken by this call and, with an eval_dataset, map, map_50, map_75, map_small,
        map_medium, map_large, mar, the map of each class where there are several, and loss.
    """
    defaults = {"learning_rate": 1e-4, "weight_decay": 1e-4, "max_grad_norm": 0.1}
    args = run_arguments(output_dir, None if eval_dataset is None else "map", **defaults | arguments)
    checkpoint = resume_point(args, resume)
    check_datasets(train_dataset, eval_dataset)
    metrics = None
    if eval_dataset is not None:
        check_evaluation(processor, args.world_size)
        metrics = DetectionMetrics(processor, model.config.id2label, max_detections)
    trainer = build_trainer(
        model,
        args,
        checkpoint,
        train_dataset,
        eval_dataset,
        collate_detection,
        processor,
        metrics,
        predicted_boxes,
        encoder_lr_scale,
        callbacks,
    )
    return run(trainer, checkpoint)


def check_evaluation(processor, processes: int) -> None:
    """Refuse to evaluate without the processor that reads boxes off logits, and in several processes."""
    if not hasattr(processor, "post_process_object_detection"):
        raise ValueError(
            f"evaluating needs the detector's image processor, got {type(processor).__name__}: expected one with"
            " post_process_object_detection"
        )
    if processes > 1:  # accelerate joins the first picture of one process with the first of the next
        raise ValueError(
            f"boxes cannot be gathered from {processes} processes; train without eval_dataset there, and"
            " evaluate in one"
        )
