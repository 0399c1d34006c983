"""Train an image classifier with the stock Trainer: data order, augmentation, metrics and exact resume."""

from contextlib import contextmanager
from pathlib import Path

from vitweave.training.classification_data import collate_classification
from vitweave.training.classification_metrics import ClassificationMetrics, RankedClasses
from vitweave.training.parameter_groups import find_encoder
from vitweave.training.runs import build_trainer, check_datasets, resume_point, run, run_arguments


def check_labels(config, datasets) -> None:
    """Refuse one class only and class names that differ between model and data; tell the data which ids exist."""
    if config.num_labels < 2:
        raise ValueError(f"expected a model of at least two classes, got num_labels={config.num_labels}")
    default = {index: f"LABEL_{index}" for index in range(config.num_labels)}
    for dataset in datasets:
        names = getattr(dataset, "id2label", None)
        if names and len(names) != config.num_labels:
            raise ValueError(f"the model tells {config.num_labels} classes apart, the data has {len(names)}: {names}")
        if names and config.id2label != default and names != config.id2label:
            raise ValueError(
                f"expected one id2label, the model has {config.id2label}, the data {names}; give the model "
                "id2label=dataset.id2label, and the later parts of the data that of the first"
            )
        if names and config.id2label == default:
            config.id2label = dict(names)
            config.label2id = {name: index for index, name in names.items()}
        if dataset is not None and getattr(dataset, "num_labels", config.num_labels) is None:
            dataset.num_labels = config.num_labels  # wrong class ids then end in an error that names the file


@contextmanager
def frozen_in_eval_mode(model):
    """Run an encoder of which nothing is trained as at prediction: no dropout, batch norms that stay as they are."""
    encoder = find_encoder(model)
    if any(parameter.requires_grad for parameter in encoder.parameters()):
        yield
        return
    hook = encoder.register_forward_pre_hook(lambda module, inputs: module.eval() and None)
    try:
        yield
    finally:
        hook.remove()


def train_classification(
    model,
    train_dataset,
    eval_dataset=None,
    processor=None,
    output_dir: str | Path = "runs/classification",
    resume: bool = False,
    encoder_lr_scale: float = 1.0,
    callbacks=(),
    cache_features: str | Path | None = None,
    **arguments,
) -> dict[str, float]:
    """Train, keep the checkpoint with the best accuracy, save it to `output_dir`, and return its metrics.

    What is trained is what requires a gradient: everything, the classifier above an encoder that was frozen, or the
    adapter of a PEFT model. On one CPU a killed run that is resumed ends with the same bits as an uninterrupted one.

    Args:
        model: any `...ForImageClassification` of vitweave or transformers. Class names it has not got (LABEL_0, ...)
            are taken from the data.
        train_dataset, eval_dataset: `ImageClassificationDataset`, or any dataset with its items; two different objects.
        processor: saved beside every checkpoint, so that each can be used by itself.
        resume: go on from the last whole checkpoint in `output_dir`, or from the start if there is none.
        encoder_lr_scale: the encoder's learning rate as a multiple of `learning_rate`.
        cache_features: folder in which a frozen encoder's features are kept (`feature_cache`), so that every image runs
            through it once; a dataset with augmentation is left as it is. Needs a model of vitweave.
        arguments: fields of `TrainingArguments` (max_steps, num_train_epochs, learning_rate, seed, ...), which replace
            the defaults of `run_arguments`.

    Returns:
        train_loss of the steps taken by this call and, with an eval_dataset, accuracy, mean_class_accuracy,
        top5_accuracy (of more than 5 classes), accuracy_<class name> and loss.
    """
    args = run_arguments(output_dir, None if eval_dataset is None else "accuracy", **arguments)
    checkpoint = resume_point(args, resume)
    check_datasets(train_dataset, eval_dataset)
    check_labels(model.config, (train_dataset, eval_dataset))
    trainer = build_trainer(
        model,
        args,
        checkpoint,
        train_dataset,
        eval_dataset,
        collate_classification,
        processor,
        ClassificationMetrics(model.config.num_labels, model.config.id2label),
        RankedClasses(),
        encoder_lr_scale,
        callbacks,
        cache_features,
    )
    with frozen_in_eval_mode(model):
        return run(trainer, checkpoint)
