"""What the recipes share: arguments of the stock Trainer, the Trainer itself, and runs that go on where they broke."""

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments

from vitweave.training.checkpoints import RestoreWeights, last_complete_checkpoint, list_checkpoints, restore_weights
from vitweave.training.feature_cache import FeatureCollator, with_cached_features
from vitweave.training.parameter_groups import parameter_groups
from vitweave.training.sharding import leave_numbers_whole


class TellEpoch(TrainerCallback):
    """Calls `dataset.set_epoch` at the start of every epoch.

    accelerate does so too, but not in the epoch in which a run is resumed: there its `DataLoaderShard.set_epoch` finds
    the sampler below `SkipBatchSampler` and leaves the dataset at epoch 0.
    """

    def __init__(self, dataset):
        self.dataset = dataset

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.dataset.set_epoch(int(state.epoch or 0))


def run_arguments(
    output_dir: str | Path, best_metric: str | None, greater_is_better: bool = True, **overrides
) -> TrainingArguments:
    """`TrainingArguments` of a recipe; `overrides` are its fields, and a misspelt one is refused.

    Evaluation and saving happen at the same steps, so that a resumed run draws the same random numbers as an
    uninterrupted one.

    Args:
        best_metric: the evaluated metric whose best checkpoint is kept; None for a run without evaluation.
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
        "use_cpu": not torch.accelerator.is_available(),  # otherwise bf16 is refused on a CPU
    }
    if best_metric is not None:
        defaults |= {
            "eval_strategy": overrides.get("save_strategy", "epoch"),
            "batch_eval_metrics": True,
            "load_best_model_at_end": True,
            "metric_for_best_model": best_metric,
            "greater_is_better": greater_is_better,
        }
    if best_metric is not None and "save_steps" in overrides:
        defaults["eval_steps"] = overrides["save_steps"]
    return TrainingArguments(output_dir=str(output_dir), **{**defaults, **overrides})


def check_datasets(train_dataset, eval_dataset) -> None:
    """Refuse one dataset in both roles."""
    if eval_dataset is train_dataset:
        raise ValueError(
            "train_dataset and eval_dataset are one object, and evaluating would change its epoch; make two"
        )


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


def build_trainer(
    model,
    args: TrainingArguments,
    checkpoint: str | None,
    train_dataset,
    eval_dataset,
    collator: Callable,
    processor=None,
    metrics: Callable | None = None,
    reduce_predictions: Callable | None = None,
    encoder_lr_scale: float = 1.0,
    callbacks=(),
    cache_features: str | Path | None = None,
    trainer_class: type[Trainer] = Trainer,
    fusion_lr_scale: float = 1.0,
) -> Trainer:
    """The stock `Trainer` with a recipe's collator and metrics, our parameter groups, and the epoch told to the data.

    Args:
        checkpoint: what the run goes on from, if it does.
        metrics: `compute_metrics`, asked batch by batch.
        reduce_predictions: `preprocess_logits_for_metrics`, so that no whole volume of logits is kept.
        encoder_lr_scale: the encoder's learning rate as a multiple of `learning_rate`.
        cache_features: folder in which a frozen encoder's features are kept, so that it runs once per image.
        trainer_class: a `Trainer` that evaluates otherwise.
        fusion_lr_scale: the learning rate of layer fusions as a multiple of `learning_rate`.
    """
    optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(args, model)
    groups = parameter_groups(model, args.learning_rate, args.weight_decay, encoder_lr_scale, fusion_lr_scale)
    if not groups:
        raise ValueError("no parameter of the model requires a gradient; train the head, an adapter, or everything")
    train_dataset, eval_dataset = with_cached_features(model, train_dataset, eval_dataset, cache_features, args)
    epochs = [TellEpoch(train_dataset)] if hasattr(train_dataset, "set_epoch") else []
    trainer = trainer_class(
        model=model,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=FeatureCollator(collator),
        processing_class=processor,
        compute_metrics=metrics if eval_dataset is not None else None,
        preprocess_logits_for_metrics=reduce_predictions,
        optimizer_cls_and_kwargs=(optimizer_class, {**options, "params": groups}),
        callbacks=[*epochs, RestoreWeights(checkpoint), *callbacks],
    )
    leave_numbers_whole(model, getattr(trainer.accelerator.state, "fsdp_plugin", None), args.device)
    return trainer


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


def leave_autocast(model) -> None:
    """Give a model trained in mixed precision its own forward back, which accelerate has put autocast around.

    accelerate's `unwrap_model(keep_fp32_wrapper=False)` takes the forward's own decorators off as well.
    """
    forward = model.__dict__.pop("_original_forward", None)
    if forward is not None:
        del model.forward
        if model.forward != forward:  # it was the model's own before, not its class's
            model.forward = forward


def run(trainer: Trainer, checkpoint: str | None) -> dict[str, float]:
    """Train from `checkpoint` or from the start, keep the best weights, save them to the run's folder, and evaluate.

    Afterwards the model computes in its own precision, also where it was trained in a mixed one.

    Returns:
        train_loss of the steps taken by this call and, with an eval_dataset, its metrics without the prefix "eval_".
    """
    args = trainer.args
    if checkpoint is not None and is_finished(checkpoint, args):
        found = restore_finished(trainer, checkpoint)
    else:
        found = {"train_loss": trainer.train(resume_from_checkpoint=checkpoint).training_loss}
        if args.load_best_model_at_end and trainer.state.best_model_checkpoint is not None:
            restore_weights(trainer.model, trainer.state.best_model_checkpoint)
    if trainer.eval_dataset is not None:
        found |= {name.removeprefix("eval_"): value for name, value in trainer.evaluate().items()}
    leave_autocast(trainer.model)
    trainer.save_model()
    trainer.save_state()
    return found
