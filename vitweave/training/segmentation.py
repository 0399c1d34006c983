"""Train a segmentation model with the stock Trainer: data order, augmentation, metrics and exact resume."""

from pathlib import Path

from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments

from vitweave.training.checkpoints import RestoreWeights, last_complete_checkpoint, list_checkpoints, restore_weights
from vitweave.training.metrics import SegmentationMetrics, predicted_classes
from vitweave.training.parameter_groups import parameter_groups
from vitweave.training.segmentation_data import collate_segmentation


class TellEpoch(TrainerCallback):
    """Calls `dataset.set_epoch` at the start of every epoch.

    accelerate does so too, but not in the epoch in which a run is resumed: there its `DataLoaderShard.set_epoch` finds
    the sampler below `SkipBatchSampler` and leaves the dataset at epoch 0.
    """

    def __init__(self, dataset):
        self.dataset = dataset

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.dataset.set_epoch(int(state.epoch or 0))


def segmentation_arguments(output_dir: str | Path, evaluates: bool = True, **overrides) -> TrainingArguments:
    """`TrainingArguments` of the recipe; `overrides` are its fields, and a misspelt one is refused.

    The learning rate and the weight decay are those of DINOv2's linear segmentation. Evaluation and saving happen at
    the same steps, so that a resumed run draws the same random numbers as an uninterrupted one.
    """
    defaults = {
        "learning_rate": 1e-3,
        "weight_decay": 1e-4,
        "warmup_steps": 0.05,  # below 1 it is a share of all steps
        "lr_scheduler_type": "cosine",
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 16,
        "save_strategy": "epoch",
        "save_total_limit": 2,
        "report_to": "none",
        "remove_unused_columns": False,
        "label_names": ["labels"],
    }
    if evaluates:
        defaults |= {
            "eval_strategy": overrides.get("save_strategy", "epoch"),
            "batch_eval_metrics": True,
            "load_best_model_at_end": True,
            "metric_for_best_model": "mean_iou",
            "greater_is_better": True,
        }
    if evaluates and "save_steps" in overrides:
        defaults["eval_steps"] = overrides["save_steps"]
    return TrainingArguments(output_dir=str(output_dir), **{**defaults, **overrides})


def checked_ignore_index(config, processor) -> int:
    """The ignored class id, which the loss of the model and the labels of the processor must agree on."""
    in_model = getattr(config, "ignore_index", getattr(config, "semantic_loss_ignore_index", 255))
    in_labels = getattr(processor, "ignore_index", in_model)
    if in_model != in_labels:
        raise ValueError(f"the model ignores class id {in_model}, the processor writes {in_labels}; set both alike")
    return in_model


def check_datasets(train_dataset, eval_dataset, num_labels: int) -> None:
    """Refuse one dataset in both roles, and tell both which class ids exist."""
    if eval_dataset is train_dataset:
        raise ValueError(
            "train_dataset and eval_dataset are one object, and evaluating would change its epoch; make two"
        )
    for dataset in (train_dataset, eval_dataset):
        if dataset is not None and getattr(dataset, "num_labels", num_labels) is None:
            dataset.num_labels = num_labels  # wrong class ids then end in an error that names the file


def resume_point(args: TrainingArguments, resume: bool) -> str | None:
    """The checkpoint to go on from; refuses to start afresh over the checkpoints of an earlier run."""
    if resume:
        with args.main_process_first():
            return last_complete_checkpoint(args.output_dir, args.world_size)
    found = list_checkpoints(args.output_dir)
    if found:
        raise FileExistsError(
            f"{args.output_dir} holds {found[-1].name} of an earlier run; resume=True goes on from it, another "
            "output_dir starts afresh"
        )
    return None


def segmentation_trainer(
    model, train_dataset, eval_dataset, processor, args: TrainingArguments, encoder_lr_scale: float = 1.0, callbacks=()
) -> Trainer:
    """The stock `Trainer` with the recipe's collator, metrics, parameter groups and epoch callback."""
    config = model.config
    ignore_index = checked_ignore_index(config, processor)
    check_datasets(train_dataset, eval_dataset, config.num_labels)
    optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(args, model)
    groups = parameter_groups(model, args.learning_rate, args.weight_decay, encoder_lr_scale)
    if not groups:
        raise ValueError("no parameter of the model requires a gradient; train the head, an adapter, or everything")
    epochs = [TellEpoch(train_dataset)] if hasattr(train_dataset, "set_epoch") else []
    return Trainer(
        model=model,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=collate_segmentation,
        processing_class=processor,
        compute_metrics=SegmentationMetrics(config.num_labels, ignore_index, config.id2label) if eval_dataset else None,
        preprocess_logits_for_metrics=predicted_classes,
        optimizer_cls_and_kwargs=(optimizer_class, {**options, "params": groups}),
        callbacks=[*epochs, *callbacks],
    )


def is_finished(checkpoint: str, args: TrainingArguments) -> bool:
    """Whether all `max_steps` are done; the Trainer looks only after a step, and would take one step too many."""
    state = TrainerState.load_from_json(str(Path(checkpoint, "trainer_state.json")))
    return 0 < args.max_steps <= state.global_step


def restore_finished(trainer: Trainer, checkpoint: str) -> dict[str, float]:
    """Put a run whose last checkpoint is its last step into the state in which it would have ended."""
    trainer.state = TrainerState.load_from_json(str(Path(checkpoint, "trainer_state.json")))
    best = trainer.state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
    best = best if best is not None and Path(best).is_dir() else checkpoint
    trainer._load_from_checkpoint(best)
    restore_weights(trainer.model, best)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"train_loss": losses[-1]} if losses else {}


def train_segmentation(
    model,
    train_dataset,
    eval_dataset=None,
    processor=None,
    output_dir: str | Path = "runs/segmentation",
    resume: bool = False,
    encoder_lr_scale: float = 1.0,
    callbacks=(),
    **arguments,
) -> dict[str, float]:
    """Train, keep the checkpoint with the best mean IoU, save it to `output_dir`, and return its metrics.

    What is trained is what requires a gradient: everything, the head of a model with `freeze_backbone`, or the adapter
    of a PEFT model. On one CPU a killed run that is resumed ends with the same bits as an uninterrupted one.

    Args:
        train_dataset, eval_dataset: `SegmentationDataset`, or any dataset with its items; two different objects.
        processor: saved beside every checkpoint, so that each can be used by itself.
        resume: go on from the last whole checkpoint in `output_dir`, or from the start if there is none.
        encoder_lr_scale: the encoder's learning rate as a multiple of `learning_rate`.
        arguments: fields of `TrainingArguments` (max_steps, num_train_epochs, learning_rate, seed, ...), which replace
            the defaults of `segmentation_arguments`.

    Returns:
        train_loss of the steps taken by this call and, with an eval_dataset, mean_iou, pixel_accuracy, mean_accuracy,
        iou_<class name> and loss.
    """
    args = segmentation_arguments(output_dir, evaluates=eval_dataset is not None, **arguments)
    checkpoint = resume_point(args, resume)
    callbacks = [RestoreWeights(checkpoint), *callbacks]
    trainer = segmentation_trainer(model, train_dataset, eval_dataset, processor, args, encoder_lr_scale, callbacks)
    if checkpoint is not None and is_finished(checkpoint, args):
        metrics = restore_finished(trainer, checkpoint)
    else:
        metrics = {"train_loss": trainer.train(resume_from_checkpoint=checkpoint).training_loss}
        if args.load_best_model_at_end and trainer.state.best_model_checkpoint is not None:
            restore_weights(trainer.model, trainer.state.best_model_checkpoint)
    if eval_dataset is not None:
        evaluated = trainer.evaluate()
        metrics |= {name.removeprefix("eval_"): value for name, value in evaluated.items()}
    trainer.save_model()
    trainer.save_state()
    return metrics
