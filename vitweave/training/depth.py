"""Train a depth model with the stock Trainer: data order, metrics under a named protocol, exact resume."""

from pathlib import Path

from vitweave.training.depth_data import collate_depth
from vitweave.training.depth_metrics import DepthMetrics, predicted_depth_at_labels
from vitweave.training.depth_protocols import DepthProtocol, find_protocol
from vitweave.training.runs import build_trainer, check_datasets, resume_point, run, run_arguments


def train_depth(
    model,
    train_dataset,
    eval_dataset=None,
    processor=None,
    output_dir: str | Path = "runs/depth",
    protocol: str | DepthProtocol = "nyu",
    resume: bool = False,
    encoder_lr_scale: float = 1.0,
    callbacks=(),
    cache_features: str | Path | None = None,
    **arguments,
) -> dict[str, float]:
    """Train, keep the checkpoint with the lowest AbsRel, save it to `output_dir`, and return its metrics.

    What is trained is what requires a gradient: everything, the head of a model with `freeze_backbone`, or the adapter
    of a PEFT model. On one CPU a killed run that is resumed ends with the same bits as an uninterrupted one.

    Args:
        train_dataset, eval_dataset: `DepthDataset`, or any dataset with its items; two different objects.
        processor: saved beside every checkpoint, so that each can be used by itself.
        protocol: which pixels count and how predictions are aligned during evaluation, see `DEPTH_PROTOCOLS`. The
            Trainer predicts no mirrored images: for a protocol with `flip` call `evaluate_depth` afterwards.
        resume: go on from the last whole checkpoint in `output_dir`, or from the start if there is none.
        encoder_lr_scale: the encoder's learning rate as a multiple of `learning_rate`.
        cache_features: folder in which a frozen encoder's features are kept (`feature_cache`), so that every image runs
            through it once; a dataset with augmentation is left as it is.
        arguments: fields of `TrainingArguments` (max_steps, num_train_epochs, learning_rate, seed, ...), which replace
            the defaults of `run_arguments`.

    Returns:
        train_loss of the steps taken by this call, train_images_without_depth (how often an image had no measurement)
        and, with an eval_dataset, loss and the metrics of `DepthMetrics`, each under the protocol's name:
        `nyu_abs_rel`.
    """
    protocol = find_protocol(protocol)
    best_metric = None if eval_dataset is None else f"{protocol.name}_abs_rel"
    args = run_arguments(output_dir, best_metric, greater_is_better=False, **arguments)
    checkpoint = resume_point(args, resume)
    check_datasets(train_dataset, eval_dataset)
    trainer = build_trainer(
        model,
        args,
        checkpoint,
        train_dataset,
        eval_dataset,
        collate_depth,
        processor,
        DepthMetrics(protocol),
        predicted_depth_at_labels,
        encoder_lr_scale,
        callbacks,
        cache_features,
    )
    metrics = run(trainer, checkpoint)
    criterion = getattr(model, "criterion", None)
    if hasattr(criterion, "images_without_depth"):
        metrics["train_images_without_depth"] = int(criterion.images_without_depth)
    return metrics
