"""A start's claim on its run folder: a refusal before anything changes, or the lease."""

from __future__ import annotations

from megalite.checkpoint import Lease
from megalite.data import Samples
from megalite.errors import CheckpointError, MegaLiteError, UserError
from megalite.observe import overwrite_status, previous_attempts
from megalite.parallel import Grid
from megalite.train.options import RunOptions, Settings
from megalite.train.outcome import end_state
from megalite.train.resume import ResumePoint, check_resume, find_resume_point
from megalite.train.run_folder import check_folders, listing, take_over

_ATTEMPTS = 5

_Listing = list[tuple[str, int, int]]


def claim(
    options: RunOptions, grid: Grid, train: Samples, settings: Settings
) -> tuple[Lease | None, ResumePoint | None]:
    """Take over the run folder, and find the checkpoint to resume from; a collective.

    All checks that can refuse a start come first and only read, because a refused start must not
    end a running one. Once this start has the lease, no older start changes the folder. If
    checkpoints changed before that, they are searched again.

    Raises:
        UserError: on every rank; nothing has changed.
        MegaLiteError: on every rank; this start owns the folder, and status.json says failed.
    """
    root = options.root
    check_folders(options.folder, train, grid)
    resume_point, seen = _find_before_lease(options, grid, train, settings)
    lease = take_over(options.folder, grid)
    if seen is not None and listing(root, grid) == seen:
        return lease, resume_point
    try:
        check_resume(root, options.resume)
        return lease, find_for(options, grid, train, settings, lease=lease)
    except (UserError, CheckpointError) as error:  # status.json is outdated
        if grid.rank == 0:
            attempt = previous_attempts(options.folder)
            overwrite_status(options.folder, "failed", reason=end_state(error)[1], attempt=attempt)
        if isinstance(error, UserError):  # the folder has changed, so the exit code is not 2
            raise MegaLiteError(str(error)) from error
        raise


def _find_before_lease(
    options: RunOptions, grid: Grid, train: Samples, settings: Settings
) -> tuple[ResumePoint | None, _Listing | None]:
    """Find the checkpoint to resume from while another start may publish and delete.

    Returns:
        the checkpoint, and the listing of all checkpoints. None instead of the listing means that
        the search failed, and must be repeated with the lease.
    Raises:
        UserError: on every rank, if any rank refuses this start.
    """
    for _ in range(_ATTEMPTS):
        seen = listing(options.root, grid)
        resume_point = None
        fault = None
        try:
            resume_point = find_for(options, grid, train, settings, read_only=True)
        except (UserError, CheckpointError) as error:
            fault = error
        faults = [each for each in grid.all_gather_objects(fault) if each is not None]
        if listing(options.root, grid) == seen:  # no checkpoint changed during the search
            break
    refusals = [each for each in faults if isinstance(each, UserError)]
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
    """Call `find_resume_point` with the options of a run."""
    return find_resume_point(
        options.config,
        grid=grid,
        root=options.root,
        resume=options.resume,
        init_from=options.init_from,
        allow=options.allow_change,
        data_fingerprint=train.content_fingerprint,
        tokenizer_sha256=train.tokenizer_sha256,
        deepspeed=settings.effective_defaults,
        total_samples=options.total_samples,
        read_only=read_only,
        lease=lease,
    )
