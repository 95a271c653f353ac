"""The folder of a model or a tokenizer, by its path or by its name on the Hugging Face hub.

A name is ORGANIZATION/MODEL or ORGANIZATION/MODEL@REVISION. Only safetensors, JSON and tokenizer
files are downloaded, never pickles, into the cache that `hf` and transformers share.
"""

from __future__ import annotations

import logging
import re
import socket
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path

from megalite import env, files
from megalite.errors import CommandError, nearest
from megalite.hub import foreign
from megalite.hub.first_rank import share_folder
from megalite.log import logger

_NAME = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w./-]+))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_FOLDER = re.compile(r"\w[\w.-]*")
_PATIENCE = 0.7  # seconds without an answer after which the hub counts as unreachable
_PARALLEL_DOWNLOADS = 4
_SIDE_FILES = (".json", ".model", ".jinja")
_VOCABULARIES = ("vocab.txt", "merges.txt")


def find_model(name: str | Path, option: str, *, weights: bool = True) -> Path:
    """Return the folder of a model, downloaded from the hub if there is no local one.

    One rank of each host downloads, and the others wait for it.

    Args:
        name: a folder, or a name on the hub. A folder has priority.
        option: name of the option in messages, such as "--checkpoint".
        weights: If false, download only the configuration and the tokenizer.
    Raises:
        CommandError: there is no such folder or model, `name` is a file, or the hub cannot be
            reached.
    """
    path = Path(name)
    if name and _exists(path):
        if path.is_dir():
            return path
        raise CommandError(f"{option} {path} {foreign.describe(path)}")
    model = parse_name(str(name))
    if model is None:
        raise CommandError(f"{option} {str(name)!r}: no such folder{_hint(str(name))}")
    return _for_all_ranks(model, option, weights=weights)


def find_tokenizer(name: str | Path, option: str = "tokenizer") -> Path | None:
    """Return the folder of a tokenizer on the hub, or None if `name` is not a name on the hub.

    Raises:
        CommandError: the hub has no such model, or cannot be reached.
    """
    model = None if _exists(Path(name)) else parse_name(str(name))
    return None if model is None else _fetch(model, option, weights=False)


@dataclass(frozen=True)
class HubModel:
    """A model's name on the hub, and a branch, tag or commit of its repository."""

    name: str
    revision: str = "main"

    def __str__(self) -> str:
        return self.name if self.revision == "main" else f"{self.name}@{self.revision}"

    @property
    def command(self) -> str:
        """The command that downloads the model, for a machine with a network."""
        more = "" if self.revision == "main" else f" --revision {self.revision}"
        return f"hf download {self.name}{more} --local-dir {self.name.partition('/')[2]}"

    @cached_property
    def cache(self) -> Path:
        from huggingface_hub import constants

        return Path(constants.HF_HUB_CACHE) / f"models--{self.name.replace('/', '--')}"

    def cached(self, *, weights: bool) -> Path | None:
        """Return the complete snapshot in the cache, if there is one."""
        commit = self.revision
        if not _COMMIT.fullmatch(commit):
            try:
                commit = (self.cache / "refs" / commit).read_text(encoding="utf-8").strip()
            except (OSError, ValueError):
                return None
        folder = self.cache / "snapshots" / commit
        if not _FOLDER.fullmatch(commit) or not folder.is_dir():
            return None
        complete = not any(foreign.missing_shards(folder)) and any(folder.rglob("*.safetensors"))
        return folder if complete or not weights else None


def parse_name(text: str) -> HubModel | None:
    """Return the model that a text names, or None if the text cannot be a name on the hub."""
    match = _NAME.fullmatch(text)
    if match is None or any(bad in text for bad in ("--", "..")):
        return None
    if match["name"].endswith((".json", ".jsonl", ".csv", ".gguf", ".safetensors", ".model")):
        return None
    return HubModel(match["name"], match["revision"] or "main")


def unreachable() -> str | None:
    """Return within a second why the hub cannot be reached, or None if it can."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    address = urllib.parse.urlsplit(constants.ENDPOINT)
    proxy = urllib.request.getproxies().get(address.scheme)
    if proxy and not urllib.request.proxy_bypass(address.hostname or ""):
        address = urllib.parse.urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    port = address.port or (443 if address.scheme == "https" else 80)
    answer: list[str | None] = [f"{address.hostname} does not answer within {_PATIENCE} s"]

    def connect() -> None:
        try:
            socket.create_connection((address.hostname or "", port), timeout=_PATIENCE).close()
            answer[0] = None
        except OSError as error:
            answer[0] = f"{address.hostname}: {error.strerror or error}"

    # An unreachable name server would block the caller for many seconds.
    connection = threading.Thread(target=connect, daemon=True)
    connection.start()
    connection.join(_PATIENCE)
    return answer[0]


def _exists(path: Path) -> bool:
    with suppress(OSError, ValueError):  # names that no file can have
        return path.exists()
    return False


def _hint(name: str) -> str:
    """Return advice on a name that is not a folder: a similar folder, or what to give."""
    path = Path(name)
    similar = ""
    with suppress(OSError, ValueError):
        siblings = [each.name for each in path.parent.iterdir() if each.is_dir()]
        similar = nearest(path.name, siblings)
    if similar:
        return similar
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
        return (
            "; give a step folder, a run folder, a model folder, or a model on the hub with its "
            "organization, such as openai-community/gpt2"
        )
    return "; give a step folder, a run folder, a model folder, or a model on the hub (ORG/NAME)"


# ---- ranks


def _for_all_ranks(model: HubModel, option: str, *, weights: bool) -> Path:
    """Download on the first rank of each host, and wait for its result on the others."""
    launch = env.find_launch()
    if launch.local_world_size == 1:
        return _fetch(model, option, weights=weights)
    return share_folder(
        _note(model, launch),
        launch.local_rank == 0,
        lambda: _fetch(model, option, weights=weights),
        f"{option} {model}",
    )


def _note(model: HubModel, launch: env.Launch) -> Path:
    """Return the file in which a host's first rank writes its result for the others."""
    launch_id = env.launch_id() or f"{launch.master_addr} {launch.master_port}"
    start = f"{socket.gethostname()} {launch_id} {model}"
    folder = model.cache.parent / ".locks" / "megalite"
    return folder / f"{sha256(start.encode()).hexdigest()[:24]}.json"


# ---- one download


def _fetch(model: HubModel, option: str, *, weights: bool) -> Path:
    cached = model.cached(weights=weights)
    if (reason := unreachable()) is not None:
        if cached is not None:
            logger.info("%s is taken from the hub's cache: %s", model, reason)
            return cached
        if (parent := Path(model.name).parent).is_dir():
            raise CommandError(
                f"{option} {model}: no such folder in {parent}{_hint(model.name)}; the hub's cache "
                f"has no such model either, and the hub cannot be reached ({reason})"
            )
        raise CommandError(
            f"{option} {model}: no such folder here, not in the hub's cache, and the hub cannot be "
            f"reached ({reason}); on a machine with a network, run\n{model.command}\nand give that "
            "folder"
        )
    if cached is not None and _COMMIT.fullmatch(model.revision):
        return cached
    with _quiet():
        try:
            commit, names = _listing(model)
            chosen = _choose(model, option, names, weights=weights)
            return _download(model, commit, chosen)
        except CommandError:
            raise
        except Exception as error:  # the library's errors have no common base class
            if cached is not None and not _is_refusal(error):
                logger.warning("%s is taken from the hub's cache: %s", model, _line(error))
                return cached
            raise CommandError(f"{option} {model}: {_reason(model, error)}") from None


def _listing(model: HubModel) -> tuple[str, list[str]]:
    """Return the commit of a revision, and the names of its files."""
    from huggingface_hub import HfApi

    info = HfApi().model_info(model.name, revision=model.revision)
    names = [file.rfilename for file in info.siblings or ()]
    if not names:
        names = HfApi().list_repo_files(model.name, revision=info.sha)
    return str(info.sha), names


def _choose(model: HubModel, option: str, names: Sequence[str], *, weights: bool) -> list[str]:
    """Return the files to download, in the root or in the Transformer's subfolder."""
    root = [name for name in names if "/" not in name]
    if "config.json" not in root and "modules.json" in root:  # sentence-transformers
        root += [name for name in names if re.fullmatch(r"0_[^/]*/[^/]+", name)]
    plain = [name for name in root if not name.startswith((".", "consolidated"))]
    side = [name for name in plain if name.endswith(_SIDE_FILES)]
    side += [name for name in plain if name.rpartition("/")[2] in _VOCABULARIES]
    if not weights:
        return side
    stored = [name for name in plain if name.endswith(".safetensors")]
    for usual in ("model.safetensors", "model-*-of-*.safetensors"):
        pattern = re.escape(usual).replace(r"\*", r"\d+")
        if matches := [name for name in stored if re.fullmatch(pattern, name)]:
            stored = matches
    if not stored:
        raise CommandError(f"{option} {model}: {_without_weights(model, names)}")
    return side + stored


def _without_weights(model: HubModel, names: Sequence[str]) -> str:
    fault = "the repository has no safetensors file"
    if any(name.endswith(".gguf") for name in names):
        return f"{fault}, but GGUF files, which are not read: use the model they were made from"
    if any(name.endswith((".bin", ".pt", ".pth", ".h5", ".msgpack")) for name in names):
        command = foreign.convert_command(model.name, "AutoModelForCausalLM")
        return (
            f"{fault}, but pickles or the like, which are not downloaded; if it is trusted, "
            f"convert it with\n{command}\n(or the class that its config.json names)"
        )
    return f"{fault}: name the repository of a model"


def _download(model: HubModel, commit: str, names: Sequence[str]) -> Path:
    """Download the files of a commit that are not in the cache yet."""
    from huggingface_hub import hf_hub_download

    folder = model.cache / "snapshots" / commit
    new = [name for name in names if not (folder / name).exists()]
    if new:
        logger.info("downloading %s from the hub: %d files into %s", model, len(new), model.cache)

    def download(name: str) -> Path:
        began = time.monotonic()
        path = Path(hf_hub_download(model.name, name, revision=commit))
        if name.endswith(".safetensors"):
            size = path.stat().st_size / 1e6
            seconds = time.monotonic() - began
            logger.info("%s: %s, %.0f MB in %.0f s", model, name, size, seconds)
        return path.parents[name.count("/")]

    with ThreadPoolExecutor(_PARALLEL_DOWNLOADS) as pool:
        folder = next(iter(list(pool.map(download, new))), folder)
    if not _COMMIT.fullmatch(model.revision):
        reference = model.cache / "refs" / model.revision
        reference.parent.mkdir(parents=True, exist_ok=True)
        files.write_atomic(reference, folder.name)
    return folder


@contextmanager
def _quiet() -> Iterator[None]:
    """Show progress bars only on a terminal. Elsewhere our log has a line for each file."""
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

    if not sys.stderr.isatty():
        disable_progress_bars()
    theirs = logging.getLogger("huggingface_hub")
    level = theirs.level
    theirs.setLevel(logging.ERROR)
    try:
        yield
    finally:
        theirs.setLevel(level)


def _is_refusal(error: Exception) -> bool:
    return type(error).__name__ in ("RepositoryNotFoundError", "RevisionNotFoundError")


def _line(error: Exception) -> str:
    text = next((line for line in str(error).splitlines() if line.strip()), "")
    return text.strip() or type(error).__name__


def _reason(model: HubModel, error: Exception) -> str:
    """Return why a download failed, and what to do."""
    kind = type(error).__name__
    if kind == "GatedRepoError":
        return (
            "its owners require consent: accept the terms on its page of the hub, log in with "
            "`hf auth login`, and run the same command again"
        )
    if kind == "RepositoryNotFoundError":
        return (
            "no such folder here, and the hub has no such model, or none that you may see; check "
            "the name, or log in with `hf auth login`"
        )
    if kind == "RevisionNotFoundError":
        return f"the hub's {model.name} has no revision {model.revision!r}; name one that it has"
    return (
        f"it cannot be downloaded: {_line(error)}; try again, or run\n{model.command}\nand give "
        "that folder"
    )
