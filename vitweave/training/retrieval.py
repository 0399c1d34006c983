"""Train an image-text retriever with the stock Trainer: whole-gallery evaluation, exact resume, large batches."""

from pathlib import Path

from transformers import Trainer, TrainingArguments

from vitweave.modeling.modeling_image_text_retriever import ImageTextRetrieverModel
from vitweave.training.cached_gradients import cache_gradients
from vitweave.training.retrieval_data import RetrievalCollator
from vitweave.training.retrieval_evaluation import evaluate_retrieval
from vitweave.training.retrieval_features import with_retrieval_features
from vitweave.training.runs import build_trainer, check_datasets, resume_point, run, run_arguments


class RetrievalTrainer(Trainer):
    """The stock Trainer, but for what an evaluation is: retrieval among all images and texts of the dataset.

    The stock one compares batch by batch, and a rank among the pairs of a batch says nothing. Every process evaluates
    the whole dataset.
    """

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        batch_size, workers = self.args.eval_batch_size, self.args.dataloader_num_workers
        with self.compute_loss_context_manager():  # mixed precision as in training
            found = evaluate_retrieval(bare(self.model), dataset, batch_size, workers)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def bare(model) -> ImageTextRetrieverModel:
    """The retriever below adapters."""
    return next((part for part in model.modules() if isinstance(part, ImageTextRetrieverModel)), model)


def check_batch(args: TrainingArguments, train_dataset) -> None:
    """Refuse a run whose only batch would be left out for not being whole."""
    batch = args.train_batch_size * args.world_size
    if args.dataloader_drop_last and len(train_dataset) < batch:
        raise ValueError(
            f"expected at least one whole batch, {batch} pairs, got {len(train_dataset)}; set"
            " per_device_train_batch_size"
        )


def train_retrieval(
    model,
    train_dataset,
    eval_dataset=None,
    processor=None,
    output_dir: str | Path = "runs/retrieval",
    resume: bool = False,
    encoder_lr_scale: float = 1.0,
    fusion_lr_scale: float = 1.0,
    embedding_chunk_size: int | None = None,
    callbacks=(),
    cache_features: str | Path | None = None,
    **arguments,
) -> dict[str, float]:
    """Train, keep the checkpoint with the highest RSUM, save it to `output_dir`, and return its metrics.

    What is trained is what requires a gradient. All pairs of a batch are compared with each other, so a larger batch is
    a harder question; `embedding_chunk_size` makes it fit. On one CPU a killed run that is resumed ends with the same
    bits as an uninterrupted one.

    Args:
        model: an `ImageTextRetrieverModel`, or a PEFT model of one.
        train_dataset, eval_dataset: `RetrievalDataset`; two different objects. Of eval_dataset every text counts.
        processor: a `FigureTextProcessor`, saved beside every checkpoint; None takes that of train_dataset.
        resume: go on from the last whole checkpoint in `output_dir`, or from the start if there is none.
        encoder_lr_scale, fusion_lr_scale: learning rates of the vision encoder and of the layer fusion as multiples of
            `learning_rate`.
        embedding_chunk_size: pairs whose activations are in memory at a time (`cached_gradients`); None is the batch.
        cache_features: folder in which a frozen encoder's features are kept, so that every image runs through it once.
        arguments: fields of `TrainingArguments`, which replace the defaults of `run_arguments`.

    Returns:
        train_loss of the steps taken by this call and, with an eval_dataset, the metrics of `evaluate_retrieval`.
    """
    check_datasets(train_dataset, eval_dataset)
    defaults = {"learning_rate": 5e-4, "per_device_train_batch_size": 64, "dataloader_drop_last": True}
    best_metric = None if eval_dataset is None else "rsum"
    args = run_arguments(output_dir, best_metric, label_names=[], **{**defaults, **arguments})
    check_batch(args, train_dataset)
    checkpoint = resume_point(args, resume)
    cache_gradients(model, embedding_chunk_size)
    processor = train_dataset.processor if processor is None else processor
    train_dataset, eval_dataset = with_retrieval_features(
        bare(model), train_dataset, eval_dataset, cache_features, args
    )
    trainer = build_trainer(
        model,
        args,
        checkpoint,
        train_dataset,
        eval_dataset,
        RetrievalCollator(processor.tokenizer),
        processor,
        encoder_lr_scale=encoder_lr_scale,
        callbacks=callbacks,
        trainer_class=RetrievalTrainer,
        fusion_lr_scale=fusion_lr_scale,
    )
    return run(trainer, checkpoint)
