"""Fine-tuning: the examples of a start, and the evaluation of its epochs."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megalite import arch, checkpoint, files
from megalite.checkpoint import Progress
from megalite.config import RunConfig, parse_config
from megalite.config.tasks import find_task
from megalite.data import ExampleSet
from megalite.engine import Engine
from megalite.errors import ConfigError, UserError
from megalite.evaluate import mean_loss, perplexity
from megalite.evaluate.tasks import classification
from megalite.formats import checkpoint as disk
from megalite.formats.examples import ExamplesManifest, read_examples_manifest
from megalite.log import logger, replace_nonfinite
from megalite.observe import Recorder
from megalite.parallel import Grid
from megalite.train.evaluator import Evaluation
from megalite.train.interventions import InterventionLog
from megalite.train.options import RunOptions

# metrics of the training split that are recorded
_TRAIN_METRICS = ("loss", "perplexity", "accuracy", "precision", "recall", "f1")
PREDICTIONS = "predictions.jsonl"
EVALUATION = "evaluation.json"


def resolve_examples(options: RunOptions, grid: Grid) -> RunOptions:
    """Return the options with the examples' folder, labels and length; a collective.

    Rank 0 makes the examples if they do not exist yet.

    Raises:
        UserError: on every rank, if the examples are invalid or do not fit the run file.
    """
    assert options.prepare is not None
    result: tuple[Path | None, UserError | None] = (None, None)
    if grid.rank == 0:
        try:
            result = options.prepare(options.config), None
        except UserError as error:
            result = None, error
    folder, fault = grid.all_gather_objects(result)[0]
    if fault is not None:
        raise fault
    manifest = read_examples_manifest(folder)
    grows = options.init_from is not None
    config, total = _resolve_config(options.config, folder, manifest, grows=grows)
    return replace(options, config=config, examples=folder, total_samples=total)


def _resolve_config(
    config: RunConfig, folder: Path, manifest: ExamplesManifest, *, grows: bool = False
) -> tuple[RunConfig, int | None]:
    """Return the run file with labels, class weights and steps, and the samples of all epochs.

    The samples are None if the run file sets training.steps.

    Args:
        grows: whether to raise the vocabulary to the tokenizer's, which requires an existing model.
    """
    section = config.finetune
    labels = len(manifest.labels)
    assert section is not None
    if config.model.num_labels not in (0, labels):
        raise ConfigError(
            f"model.num_labels: {config.model.num_labels}, but the examples have {labels} labels "
            f"({', '.join(manifest.labels[:8])}); remove it"
        )
    if section.class_weights and len(section.class_weights) != labels:
        raise ConfigError(
            f"finetune.class_weights: got {len(section.class_weights)} weights for {labels} "
            f"labels; give one for each of {', '.join(manifest.labels)}, in this order"
        )
    raw = config.model_dump(mode="json")
    if manifest.vocab_size > config.model.vocab_size:
        if not grows:
            raise ConfigError(
                f"model.vocab_size: {config.model.vocab_size}, but the tokenizer has "
                f"{manifest.vocab_size} ids; set model.vocab_size to {manifest.vocab_size}"
            )
        raw["model"]["vocab_size"] = manifest.vocab_size
    raw["model"]["num_labels"] = labels
    _check_freeze(config)
    raw["finetune"]["data"]["labels"] = list(manifest.labels) or None
    if section.balance_classes:
        counts = manifest.splits["train"].counts
        rows = sum(counts.values())
        weights = [rows / (labels * max(counts.get(name, 0), 1)) for name in manifest.labels]
        raw["finetune"] |= {"class_weights": weights, "balance_classes": False}
    total = None
    if config.training.steps == 0:
        total = section.epochs * ExampleSet(folder, manifest, "train", config).num_samples
        # the length of a fresh run; a resume subtracts the samples trained so far
        raw["training"]["steps"] = math.ceil(total / config.training.global_batch_size)
    raw["checkpoint"]["keep_best"] = "valid" in manifest.splits or "test" in manifest.splits
    return parse_config(raw), total


def _check_freeze(config: RunConfig) -> None:
    """Raise ConfigError if a pattern matches no parameter, or all parameters are frozen."""
    assert config.finetune is not None
    rows = arch.parameters(config.model)
    for pattern in config.finetune.freeze:
        if not any(fnmatch.fnmatchcase(row.name, pattern) for row in rows):
            raise ConfigError(
                f"finetune.freeze: {pattern!r} matches no parameter; write a pattern for names "
                f"such as {rows[0].name} or {rows[-1].name}"
            )
    if not any(arch.is_trainable(config, row) for row in rows):
        raise ConfigError("finetune.freeze: all parameters are frozen; remove a pattern")


def open_examples(config: RunConfig, folder: Path) -> dict[str, ExampleSet]:
    """Return the splits that exist by name, not shuffled."""
    manifest = read_examples_manifest(folder)
    return {
        name: ExampleSet(folder, manifest, name, config, shuffle=False) for name in manifest.splits
    }


@dataclass(kw_only=True)
class FinetuneEvaluator:
    """Evaluator of fine-tuning: a task's metrics after each epoch.

    Scores are entries of the intervention log, so that a resumed run has them, too.

    Attributes:
        splits: splits by name: train, and valid and test if they exist.
        root: the run's `checkpoints` folder.
    """

    evaluates_first = False

    config: RunConfig
    engine: Engine
    grid: Grid
    splits: Mapping[str, ExampleSet]
    interventions: InterventionLog
    recorder: Recorder
    root: Path

    def __post_init__(self) -> None:
        assert self.config.finetune is not None
        self._section = self.config.finetune
        task = find_task(self._section.task)
        self._classifies = task.has_labels
        self.metric = self._section.metric or task.metrics[0]
        self._windows = self.splits["train"].num_samples
        self._held_out = next((name for name in ("valid", "test") if name in self.splits), None)
        self._reported = False
        self._compare = classification.Comparison(self.splits, self.config.training.steps)

    def is_due(self, before: Progress, now: Progress) -> bool:
        """Return whether an epoch or the run ends with the step between `before` and `now`.

        Epochs are counted in samples, because a resume may change the batch size.
        """
        ended = now.samples // self._windows > before.samples // self._windows
        return ended or now.step == self.config.training.steps

    def is_overdue(self, now: Progress) -> bool:
        """Return whether the last complete epoch has not been evaluated yet."""
        end = now.samples // self._windows * self._windows
        if self._held_out is None or end == 0:
            return False
        return not any(end <= entry["samples"] <= now.samples for entry in self._entries(now.step))

    def is_finished(self, now: Progress) -> bool:
        """Return whether the score has not improved for `finetune.early_stopping` epochs."""
        patience = self._section.early_stopping
        scores = self._scores(now.step)
        if patience is None or not scores:
            return False
        best = min(scores, key=lambda at: scores[at])
        if sum(at > best for at in scores) < patience:
            return False
        if not self._reported:
            text = "%s has not improved for %d epochs since step %d"
            logger.info(text, self.metric, patience, best)
        self._reported = True
        return True

    def __call__(self, now: Progress, should_stop: Callable[[], bool]) -> Evaluation:
        """Evaluate and record; a collective."""
        row: dict[str, Any] = {"step": now.step, "epoch": self._epoch(now.samples)}
        if self._section.eval_train:
            metrics = self._measure("train", should_stop)
            if metrics is None:
                return Evaluation(complete=False)
            row |= {f"train_{key}": metrics[key] for key in _TRAIN_METRICS if key in metrics}
        if self._held_out is None:
            if self._section.eval_train:
                self.recorder.valid(row)
            return Evaluation(complete=True)
        metrics = self._measure(self._held_out, should_stop, now.step)
        if metrics is None:
            return Evaluation(complete=False)
        self.recorder.valid(row | {"split": self._held_out} | metrics)
        score = float(metrics[self.metric] * (1 if self.metric == "loss" else -1))
        if not math.isfinite(score):
            return Evaluation(complete=True)
        entry = {"kind": "measured", "step": now.step, "samples": now.samples, "score": score}
        self.interventions.add(entry)
        return Evaluation(complete=True, score=score)

    def _epoch(self, samples: int) -> float:
        """Return the epochs so far, a whole number at the step that ends an epoch."""
        whole, rest = divmod(samples, self._windows)
        ended = whole > 0 and rest < self.config.training.global_batch_size
        return whole if ended else round(samples / self._windows, 4)

    def evaluate_test_split(self, now: Progress) -> None:
        """Evaluate the test split with the weights of the best checkpoint; a collective.

        `megalite.formats.checkpoint.best` chooses the checkpoint, as in every other command.
        """
        if "test" not in self.splits:
            return
        # rank 0 chooses for all ranks, whose views of a network file system may differ
        name = self.grid.all_gather_objects(_name(disk.best(disk.published(self.root))))[0]
        if name is None:
            return
        best = disk.step_of(self.root / name)
        scores = self._scores(now.step)
        top = min(scores, key=lambda at: (scores[at], at), default=best)
        if best != now.step:
            folder, manifest = checkpoint.open_checkpoint(self.root / name, self.grid)
            checkpoint.load_weights(
                self.engine, self.config.model, grid=self.grid, folder=folder, manifest=manifest
            )
        row = self._measure("test", lambda: False, best)
        logger.info("best checkpoint by %s: step %d", self.metric, best)
        if scores.get(top, 0.0) < scores.get(best, 0.0):
            logger.warning(
                "step %d had a better %s, but its checkpoint no longer exists", top, self.metric
            )
        self.recorder.valid({"step": now.step, "best_step": best, "split": "test", **(row or {})})

    def _scores(self, step: int) -> dict[int, float]:
        return {entry["step"]: entry["score"] for entry in self._entries(step, every_order=True)}

    def _entries(self, step: int, *, every_order: bool = False) -> list[dict[str, Any]]:
        """Return the log's scores until `step`, by default only those of the current data order."""
        return [
            entry
            for entry in self.interventions.entries
            if entry["kind"] == "measured"
            and entry["step"] <= step
            and (every_order or self.interventions.is_current(entry))
        ]

    def _measure(
        self, split: str, should_stop: Callable[[], bool], step: int | None = None
    ) -> dict[str, float] | None:
        """Return the metrics of a split. None means that a stop was requested meanwhile.

        Args:
            step: step of the weights. If given, also write predictions and evaluation.json.
        """
        dataset = self.splits[split]
        size = self.config.training.micro_batch_size
        if not self._classifies:
            loss = mean_loss(
                self.engine,
                dataset,
                grid=self.grid,
                samples=dataset.num_samples,
                micro_batch_size=size,
                stopping=should_stop,
            )
            return None if loss is None else {"loss": loss, "perplexity": perplexity(loss)}
        scores = classification.collect_scores(
            self.engine.eval_scores,
            dataset,
            self.grid,
            micro_batch_size=size,
            stopping=should_stop,
        )
        if scores is None:
            return None
        metrics = classification.measures(scores, dataset)
        if step is not None and self.grid.rank == 0:
            metrics["baselines"] = self._compare(split, metrics, step)
        if step is not None and self.grid.rank == 0:
            folder = self.recorder.folder
            with self.recorder.tolerating_disk_errors():
                report = replace_nonfinite({"step": step, "split": split, **metrics})
                files.write_json(folder / EVALUATION, report)
                classification.write_predictions(folder / PREDICTIONS, scores, dataset)
            self.recorder.picture("valid/confusion", classification.picture(metrics, dataset), step)
        return {key: value for key, value in metrics.items() if isinstance(value, float)}


def _name(folder: Path | None) -> str | None:
    return None if folder is None else folder.name
