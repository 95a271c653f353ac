"""`tokenize`: shards from documents, with a manifest.

The shards depend only on the input, the tokenizer and the options that the manifest records, not on
the number of workers or hosts. Each worker claims parts of the input in a common folder, and rank 0
assembles the shards. If the command is killed at any moment, the same command continues.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from data_prep.assemble import (
    ShardPlan,
    plan_shards,
    read_shard_plans,
    read_shards,
    retained_counts,
    write_shard_plans,
    write_shards,
)
from data_prep.encoder import Encoder
from data_prep.inputs import find_streams
from data_prep.options import TokenizeOptions
from data_prep.output import check_output, check_outputs, refuse_taken
from data_prep.part_files import Counts, part_name, read_part_header
from data_prep.progress import log_progress
from data_prep.streams import Stream
from data_prep.work import Worker, wait
from data_prep.work_folder import PrepRun, WorkFolder, read, write
from data_prep.workers import WorkerPool
from megalite import env
from megalite.errors import DataError, MegaLiteError
from megalite.files import sync_file
from megalite.formats.manifest import (
    ShardManifest,
    SourceInfo,
    TokenizerInfo,
    load_manifest,
    write_manifest,
)
from megalite.log import logger
from megalite.tokenizers.tokenizer import Tokenizer, check_round_trip, load_tokenizer

_FIRST_WAIT = 300.0  # seconds for rank 0 to start a run
_NEXT_WAIT = 15.0  # seconds for rank 0 to publish, or to start another run
_POLL = 0.1  # seconds
_SPLIT_BY = "BLAKE2b hash of each document's text: the lowest valid_fraction is the valid split"


@dataclass
class _Task:
    """The encoder, the work folder and the number of a rank."""

    encoder: Encoder
    folder: WorkFolder
    rank: int
    ranks: int

    @property
    def places(self) -> int:
        """The number of workers of all ranks."""
        return self.ranks * self.encoder.options.workers

    def work(self, run: PrepRun, streams: Sequence[Stream], number: int) -> None:
        """Do the work of one worker: encode parts, wait for the plan, write shards."""
        place = self.rank * self.encoder.options.workers + number
        worker = Worker(run, streams, self.encoder, place=place, places=self.places)
        worker.encode_all()
        worker.wait(run.shard_plans.exists)
        self.write_shards(run, place)

    def write_shards(self, run: PrepRun, place: int) -> None:
        """Write the shards that no other worker has claimed, each worker from another one on."""
        share = min(place / self.places, 0.999)  # the leader has the number `places`
        write_shards(run, read_shard_plans(run), self.encoder, wanted=run.claim, share=share)

    def pool(self, run: PrepRun, streams: Sequence[Stream]) -> WorkerPool:
        """Return the workers of this rank. If the pool is idle, the caller must do the work."""
        count = self.encoder.options.workers
        if all(stream.parts is not None for stream in streams):
            count = min(count, sum(stream.parts or 0 for stream in streams))
        return WorkerPool(self.work, run, streams, count if count > 1 else 0)


def tokenize(options: TokenizeOptions) -> ShardManifest:
    """Encode all documents of the input into a new shard folder, with all ranks.

    With `valid_fraction`, a fraction of the documents goes to a second folder.

    Raises:
        CommandError: an input does not exist; an output exists or is being written.
        DataError: the tokenizer or a file cannot be used, there are too many bad records, or no
            document.
        MegaLiteError: an output cannot be written, or another rank failed.
    """
    for name, value in (("TOKENIZERS_PARALLELISM", "false"), ("RAYON_NUM_THREADS", "1")):
        env.set_default(name, value)  # a worker is a process
    check_output(options.output)
    check_outputs(options.output, options.valid_fraction, options.valid_output)
    tokenizer = load_tokenizer(options.tokenizer)
    check_round_trip(tokenizer, lossy=options.lossy)
    encoder = Encoder(tokenizer, options)
    request = encoder.options.request(tokenizer)
    launch = env.launch_id()
    folder = WorkFolder(options.output, request, launch, options.valid_output)
    rank, ranks = env.find_rank_and_size()
    if rank == 0 and options.bos is None and encoder.bos is not None:
        begins = " ".join(tokenizer.pieces()[id] for id in tokenizer.prefix_ids)
        logger.info("documents begin with %s, as the tokenizer's texts do (not: --no-bos)", begins)
    task = _Task(encoder, folder, rank, ranks)
    try:
        return _lead(task) if rank == 0 else _follow(task)
    except OSError as error:
        raise MegaLiteError(f"{options.output} was not written: {error}") from error


def _lead(task: _Task) -> ShardManifest:
    options = task.encoder.options
    folder = task.folder
    folder.finish_publishing()
    if folder.was_published():
        folder.clear()
        return load_manifest(options.output)
    refuse_taken(options.output)
    if options.valid_output is not None:
        refuse_taken(options.valid_output, "--valid-output")
    streams = find_streams(options.inputs, streaming=options.streaming)
    with folder.lead() as run:
        write(run.plan, [asdict(stream) for stream in streams])
        folder.start(run)
        with run.beating(), _failing(run), task.pool(run, streams) as pool:
            place = 0 if pool.idle else task.places
            worker = Worker(run, streams, task.encoder, place=place, places=task.places)
            with log_progress(run, streams, options.max_bad_records):
                if pool.idle:
                    worker.encode_all()
                worker.wait(lambda: pool.check() and worker.all_done())
            parts = _parts(run, worker, streams)
            plans = plan_shards(
                run,
                [name for _, name in parts],
                shard_tokens=options.shard_tokens,
                deduplicate=options.deduplicate,
                valid_fraction=options.valid_fraction,
            )
            sources = [source for source, _ in parts]
            _refuse_bad_records(options, run, plans[0])
            tallies = [_tally(options, run, plan, sources) for plan in plans]
            _refuse_empty(options, plans, tallies)
            write_shard_plans(run, plans)
            if pool.idle:
                task.write_shards(run, 0)
            _wait_for_shards(task, run, plans, pool)
            manifests = [
                _manifest(task.encoder, streams, tally, run, plan)
                for plan, tally in zip(plans, tallies, strict=True)
            ]
        folder.publish(run)
    folder.clear()
    return manifests[0]


def _wait_for_shards(
    task: _Task, run: PrepRun, plans: Sequence[ShardPlan], pool: WorkerPool
) -> None:
    """Wait for all shards, and write those whose writers seem to have died."""
    started = time.monotonic()
    names = {name for plan in plans for name in plan.pieces()}

    def write_missing() -> None:
        seconds = time.monotonic() - started
        done = run.done()
        logger.info("shards are missing after %.0f s: writing them here", seconds)
        write_shards(run, plans, task.encoder, wanted=lambda name: name not in done)

    wait(run, lambda: names <= run.done() or not pool.check(), write_missing)


def _follow(task: _Task) -> ShardManifest:
    """Work for the run that rank 0 leads, until its output exists."""
    output = task.encoder.options.output
    patience = _FIRST_WAIT
    while True:
        deadline = time.monotonic() + patience
        while (run := task.folder.follow()) is None or (plan := read(run.plan)) is None:
            if (output / "manifest.json").exists():
                return load_manifest(output)
            if time.monotonic() > deadline:
                raise MegaLiteError(
                    f"rank 0 leads no run for {output}, or has ended it; read in its log why"
                )
            time.sleep(_POLL)
        streams = [Stream(**stream) for stream in plan]
        try:
            with _failing(run), task.pool(run, streams) as pool:
                if pool.idle:
                    task.work(run, streams, 0)
                while pool.check() and run.folder.exists():
                    run.check()
                    time.sleep(_POLL)
        except FileNotFoundError:  # rank 0 has ended the run, or started another
            pass
        patience = _NEXT_WAIT


@contextmanager
def _failing(run: PrepRun) -> Iterator[None]:
    """Stop all ranks if the block raises an error."""
    try:
        yield
    except FileNotFoundError:
        raise
    except (MegaLiteError, OSError) as error:
        run.fail(error)
        raise


def _parts(run: PrepRun, worker: Worker, streams: Sequence[Stream]) -> list[tuple[int, str]]:
    """Return the --input number and the name of every part, in input order."""
    parts = []
    for stream, key in zip(streams, worker.keys, strict=True):
        last = run.last(key) if stream.parts is None else stream.parts - 1
        assert last is not None
        parts += [(stream.source, part_name(key, part)) for part in range(last + 1)]
    return parts


def _refuse_bad_records(options: TokenizeOptions, run: PrepRun, plan: ShardPlan) -> None:
    """Raise DataError if there are too many bad records, including those of earlier runs."""
    parts = [read_part_header(run.part(name)) for name, _ in plan.parts]
    if (bad := sum(part.tally.bad_records for part in parts)) > options.max_bad_records:
        faults = [fault for part in parts for fault in part.faults]
        raise DataError(
            f"{faults[min(options.max_bad_records, len(faults) - 1)]}; bad record "
            f"{options.max_bad_records + 1} of {bad}, more than --max-bad-records "
            f"{options.max_bad_records} allows: fix the input, or allow more"
        )


def _tally(
    options: TokenizeOptions, run: PrepRun, plan: ShardPlan, sources: Sequence[int]
) -> list[Counts]:
    """Return the counts of each --input in one output."""
    tallies = [Counts() for _ in options.inputs]
    for place, source in enumerate(sources):
        tallies[source].add(retained_counts(run, plan, place))
    return tallies


def _refuse_empty(
    options: TokenizeOptions, plans: Sequence[ShardPlan], tallies: Sequence[Sequence[Counts]]
) -> None:
    """Raise DataError if an output has no document."""
    counts = [sum(tally.documents for tally in of_plan) for of_plan in tallies]
    total = sum(counts)
    fraction = options.valid_fraction
    if not total:
        raise DataError(f"no document in {', '.join(options.inputs)}; nothing was written")
    for plan, count in zip(plans, counts, strict=True):
        if not count:
            output = options.valid_output if plan.valid else options.output
            option, change = ("--valid-output", "larger") if plan.valid else ("--output", "smaller")
            raise DataError(
                f"{option} {output}: --valid-fraction {fraction} of {total:,} documents gives it "
                f"none; give a {change} fraction, or an input of more documents. Nothing was "
                "written"
            )


def _manifest(
    encoder: Encoder,
    streams: Sequence[Stream],
    tallies: Sequence[Counts],
    run: PrepRun,
    plan: ShardPlan,
) -> ShardManifest:
    """Add the tokenizer and, last, the manifest to a shard folder."""
    folder = plan.folder(run)
    arguments = encoder.options.recorded()
    if plan.valid_fraction is not None:
        arguments |= {"split": "valid" if plan.valid else "train", "split_by": _SPLIT_BY}
    files = Counter[int]()
    for stream in streams:
        files[stream.source] += len(stream.paths)
    sources = [
        SourceInfo(input=name, files=files[number], **asdict(tally))  # ignores `consumed`
        for number, (name, tally) in enumerate(zip(encoder.options.inputs, tallies, strict=True))
    ]
    manifest = ShardManifest(
        dtype=encoder.dtype.name,
        vocab_size=encoder.tokenizer.vocab_size,
        tokenizer=_save(encoder.tokenizer, folder),
        bos=encoder.bos,
        eos=encoder.eos,
        documents=sum(tally.documents for tally in tallies),
        tokens=sum(tally.tokens for tally in tallies),
        shards=read_shards(run, plan),
        sources=sources,
        arguments=arguments,
    )
    write_manifest(folder, manifest)
    return manifest


def _save(tokenizer: Tokenizer, staging: Path) -> TokenizerInfo:
    folder = staging / "tokenizer"
    folder.mkdir()
    name = tokenizer.save(folder)
    for file in folder.iterdir():
        sync_file(file)
    return TokenizerInfo(path=f"{folder.name}/{name}", sha256=tokenizer.sha256)
