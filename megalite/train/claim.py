"""A start's claim on its run folder: refused by reading alone, or made before anything changes."""

from __future__ import annotations

from megalite.checkpoint import Lease
from megalite.data import Samples
from megalite.errors import CheckpointError, MegaLiteError, UserError
from megalite.observe import previous_attempts, restate
from megalite.parallel import Grid
from megalite.train.options import RunOptions, Settings
from megalite.train.outcome import verdict
from megalite.train.resume import ResumePoint, check_resume, find_resume_point
from megalite.train.run_folder import check_folders, listing, take_over

_LOOKS = 5

_Listing = list[tuple[str, int, int]]


def claim(
    options: RunOptions, grid: Grid, train: Samples, settings: Settings
) -> tuple[Lease | None, ResumePoint | None]:
    """Take the run folder over, and find the checkpoint to go on from; a collective.

    Everything that refuses a start is asked first, by reading alone: a start that is refused must
    not end one that runs. From the lease on no older start changes the folder. So checkpoints are
    looked for again if they changed meanwhile.

    Raises:
        UserError: on every rank; the folder and the start that has it are as they were.
        MegaLiteError: on every rank, of another kind; the folder is this start's, and status.json
            says failed.
    """
    root = options.root
    check_folders(options.folder, train, grid)
    resume_point, seen = _look(options, grid, train, settings)
    lease = take_over(options.folder, grid)
    if seen is not None and listing(root, grid) == seen:
        return lease, resume_point
    try:
        check_resume(root, options.resume)
        return lease, find_for(options, grid, train, settings, lease=lease)
    except (UserError, CheckpointError) as error:  # status.json is outdated
        if grid.rank == 0:
            attempt = previous_attempts(options.folder)
            restate(options.folder, "failed", reason=verdict(error)[1], attempt=attempt)
        if isinstance(error, UserError):  # found too late to be exit code 2
            raise MegaLiteError(str(error)) from error
        raise


def _look(
    options: RunOptions, grid: Grid, train: Samples, settings: Settings
) -> tuple[ResumePoint | None, _Listing | None]:
    """Find the checkpoint to go on from while another start may publish and delete.

    Returns:
        the checkpoint, and the listing it was found in. None instead of the listing means that
        only the owner of the folder can find out.
    Raises:
        UserError: on every rank, if any refuses this start.
    """
    for _ in range(_LOOKS):
        seen = listing(options.root, grid)
        resume_point = None
        fault = None
        try:
            resume_point = find_for(options, grid, train, settings, read_only=True)
        except (UserError, CheckpointError) as error:
            fault = error
        faults = [found for found in grid.all_gather_objects(fault) if found is not None]
        if listing(options.root, grid) == seen:  # nothing vanished while it was read
            break
    refusals = [found for found in faults if isinstance(found, UserError)]
    if refusals:
        raise refusals[0]
    return resume_point, None if faults else seen


def find_for(
    options: RunOptions,
    grid: Grid,
    train: Samples,
    settings: Settings,
    *,
    read_only: bool = False,
    lease: Lease | None = None,
) -> ResumePoint | None:
    """Find the checkpoint that a run goes on from, as `find_resume_point` does."""
    return find_resume_point(
        options.config,
        grid=grid,
        root=options.root,
        resume=options.resume,
        init_from=options.init_from,
        allow=options.allow_change,
        data_fingerprint=train.content_fingerprint,
        tokenizer_sha256=train.tokenizer_sha256,
        deepspeed=settings.left_to_it,
        total_samples=options.total_samples,
        read_only=read_only,
        lease=lease,
    )
