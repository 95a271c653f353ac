"""Weights & Biases sink. Its failures never end a run."""

from __future__ import annotations

import importlib
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from megalite.config import WandbConfig
from megalite.files import read_json, write_json
from megalite.log import logger
from megalite.observe.tensorboard import train_scalars, valid_scalars

_START = 60.0  # seconds for the server to answer, or for a person to enter a key on a terminal
_FINISH = 60.0  # seconds to send the rest at the end


class Wandb:
    """Sink that sends the rows of `TensorBoard` to one W&B run for all attempts.

    `wandb.json` contains the id of the W&B run. Steps are a metric, not W&B's step counter, which
    cannot go back when an attempt resumes.
    """

    def __init__(self, folder: Path, config: WandbConfig) -> None:
        self._folder, self._config = folder, config
        self._run: Any = None
        self._exit_code = 0
        self._guarded(self._start)

    def train(self, row: Mapping[str, Any]) -> None:
        """Write a train row."""
        self._log(int(row["step"]), {**train_scalars(row), "train/tokens": row.get("tokens")})

    def valid(self, row: Mapping[str, Any], *, tokens: int | None = None) -> None:
        """Write a valid row, measured after training on `tokens` tokens."""
        self._log(int(row["step"]), {**valid_scalars(row), "train/tokens": tokens})

    def samples(self, step: int, texts: Sequence[tuple[str, str]]) -> None:
        """Write a table of prompts with the model's continuations."""
        rows = [[step, prompt, text] for prompt, text in texts]
        columns = ["step", "prompt", "text"]
        self._log(step, lambda: {"samples": self._wandb.Table(columns=columns, data=rows)})

    def picture(self, name: str, image: Any, step: int) -> None:
        """Write an image, uint8 [H, W, 3]."""
        self._log(step, lambda: {name: self._wandb.Image(image)})

    def event(self, step: int, name: str) -> None:
        """Remember whether the attempt failed, for the W&B run's exit code."""
        del step
        self._exit_code = int(name in ("failed", "superseded"))

    def close(self) -> None:
        """Send the rest of the data. If that takes too long, the rest stays in the run folder."""
        if self._run is None:
            return
        end = threading.Thread(target=self._guarded, args=(self._finish,), daemon=True)
        end.start()
        end.join(_FINISH)
        if end.is_alive():
            rest = self._folder / "wandb"
            logger.warning(
                "W&B: not all data was sent in %.0f s; send the rest with `wandb sync` from %s",
                _FINISH,
                rest,
            )
        self._run = None

    def _start(self) -> None:
        self._wandb: Any = importlib.import_module("wandb")
        id_file = self._folder / "wandb.json"
        id = uuid.uuid4().hex
        with suppress(OSError, ValueError, LookupError, TypeError):
            id = str(read_json(id_file)["id"])
        config = self._config
        self._wandb.setup(self._wandb.Settings(silent=True))  # else it prompts for a key and waits
        run = self._wandb.init(
            project=config.project,
            entity=config.entity,
            name=self._folder.name,
            tags=list(config.tags) or None,
            id=id,
            resume="allow" if config.mode == "online" else None,
            dir=str(self._folder),
            mode=config.mode,
            config=read_json(self._folder / "config.json"),
            allow_val_change=True,
            settings=self._wandb.Settings(
                console="off", silent=True, init_timeout=_START, login_timeout=_START
            ),
        )
        if run.disabled:  # nobody entered a key
            raise ConnectionError("no API key; set one with `wandb login`")
        run.define_metric("step", hidden=True)
        run.define_metric("*", step_metric="step")
        write_json(id_file, {"id": id})
        self._run = run
        sync = f"offline; send the run with `wandb sync {Path(run.dir).parent}`"
        logger.info("W&B: %s", run.url if config.mode == "online" else sync)

    def _log(self, step: int, values: Mapping[str, Any] | Callable[[], Mapping[str, Any]]) -> None:
        def log() -> None:
            row = values() if callable(values) else values
            known = {key: value for key, value in row.items() if value is not None}
            self._run.log({"step": step, **known})

        if self._run is not None:
            self._guarded(log)

    def _finish(self) -> None:
        self._run.finish(exit_code=self._exit_code)

    def _guarded(self, call: Callable[[], None]) -> None:
        """Call; on any error, warn and send nothing more."""
        try:
            call()
        except Exception as error:  # wandb raises many kinds
            message = str(error).strip() or type(error).__name__
            logger.warning(
                "W&B: %s; no more data is sent to W&B, and the run goes on",
                message.splitlines()[0],
            )
            self._run = None
