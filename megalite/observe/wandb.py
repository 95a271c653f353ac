"""The run in Weights & Biases, if requested. No failure there ends a run."""

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

_START = 60.0  # seconds to be answered, by the server or to its question for a key on a terminal
_FINISH = 60.0  # seconds for what is not yet sent, at the end


class Wandb:
    """The rows that `TensorBoard` shows, in one W&B run for all attempts; `wandb.json` has its id.

    Steps are a metric, not W&B's own counter, which an attempt that goes back could not repeat.
    """

    def __init__(self, folder: Path, config: WandbConfig) -> None:
        self._folder, self._config = folder, config
        self._run: Any = None
        self._exit_code = 0
        self._carefully(self._start)

    def train(self, row: Mapping[str, Any]) -> None:
        """Write a train row."""
        self._log(int(row["step"]), {**train_scalars(row), "train/tokens": row.get("tokens")})

    def valid(self, row: Mapping[str, Any], *, tokens: int | None = None) -> None:
        """Write a valid row, with the tokens trained on before it."""
        self._log(int(row["step"]), {**valid_scalars(row), "train/tokens": tokens})

    def samples(self, step: int, texts: Sequence[tuple[str, str]]) -> None:
        """Prompts with what was written after them, as a table."""
        rows = [[step, prompt, text] for prompt, text in texts]
        columns = ["step", "prompt", "text"]
        self._log(step, lambda: {"samples": self._wandb.Table(columns=columns, data=rows)})

    def picture(self, name: str, image: Any, step: int) -> None:
        """Write an image, uint8 [H, W, 3]."""
        self._log(step, lambda: {name: self._wandb.Image(image)})

    def event(self, step: int, name: str) -> None:
        """Report a start that has failed."""
        del step
        self._exit_code = int(name in ("failed", "superseded"))

    def close(self) -> None:
        """Send what is not yet sent; what takes too long stays in the run folder."""
        if self._run is None:
            return
        end = threading.Thread(target=self._carefully, args=(self._finish,), daemon=True)
        end.start()
        end.join(_FINISH)
        if end.is_alive():
            kept = self._folder / "wandb"
            logger.warning("W&B: not all was sent in %.0f s; it is in %s", _FINISH, kept)
        self._run = None

    def _start(self) -> None:
        self._wandb: Any = importlib.import_module("wandb")
        place = self._folder / "wandb.json"
        id = uuid.uuid4().hex
        with suppress(OSError, ValueError, LookupError, TypeError):
            id = str(read_json(place)["id"])
        config = self._config
        self._wandb.setup(self._wandb.Settings(silent=True))  # it would request a key, and wait
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
        if run.disabled:  # nobody answered its question for a key
            raise ConnectionError("no key for it; give one with `wandb login`")
        run.define_metric("step", hidden=True)
        run.define_metric("*", step_metric="step")
        write_json(place, {"id": id})
        self._run = run
        kept = f"`wandb sync {Path(run.dir).parent}` sends it"
        logger.info("W&B: %s", run.url if config.mode == "online" else kept)

    def _log(self, step: int, values: Mapping[str, Any] | Callable[[], Mapping[str, Any]]) -> None:
        def log() -> None:
            found = values() if callable(values) else values
            known = {key: value for key, value in found.items() if value is not None}
            self._run.log({"step": step, **known})

        if self._run is not None:
            self._carefully(log)

    def _finish(self) -> None:
        self._run.finish(exit_code=self._exit_code)

    def _carefully(self, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:  # it raises many kinds
            said = str(error).strip() or type(error).__name__
            logger.warning(
                "W&B: %s; nothing more is sent there, and the run goes on", said.splitlines()[0]
            )
            self._run = None
