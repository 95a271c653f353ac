# shellcheck shell=bash
# pretrain.sbatch and finetune.sbatch source this file. It starts the ranks once. Then it requeues
# the job if the run can continue.
#
# Expects $program and the job's arguments: a run file, then the launcher's options. The decision
# follows from RUN/status.json, because launchers change the ranks' exit codes:
#
#   done                 ends
#   stopped              requeued; the ranks saved because of a time limit or a preemption
#   failed, or killed    requeued, unless two starts in a row have saved nothing new
#   superseded           ends, because a newer start owns the run
#   scancel              stays cancelled
set -uo pipefail
say() { echo "== $(date -Is) $*"; }
[ $# -ge 1 ] || { say "usage: sbatch slurm/NAME.sbatch CONFIG [--set KEY=VALUE]..."; exit 2; }
site=${MEGALITE_SITE:-$SLURM_SUBMIT_DIR/slurm/site.env}
# shellcheck source=/dev/null
if [ -e "$site" ]; then . "$site"; fi
python=${MEGALITE_PYTHON:-.venv/bin/python}
attempt=${SLURM_RESTART_COUNT:-0}
config=$1; shift

# if the run file has a fault, the job ends here, before any rank starts
run=$("$python" -m megalite.config --run-folder "$config" "$@") || exit $?
field() { sed -n "s/^ *\"$1\": \"\{0,1\}\([^\",]*\).*/\1/p" "$run/status.json" 2>/dev/null; }
newest() { find "$run/checkpoints" -maxdepth 1 -name 'step_*' 2>/dev/null | sort -V | tail -n 1; }
saved=$(newest) began=$(field attempt)

# This script runs outside any container, so it has scontrol. There is no fallback such as
# localhost, with which the ranks of other hosts would wait in vain.
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST") && [ -n "$hosts" ] || {
    say "no host list: scontrol returned none; start the job outside the container"
    exit 1
}
MASTER_ADDR=${hosts%%$'\n'*}
MASTER_PORT=$((20000 + (SLURM_JOB_ID * 7 + attempt) % 10000))
ranks=${MEGALITE_RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
cpus=${SLURM_CPUS_PER_TASK:-1}
export MASTER_ADDR MASTER_PORT PYTHONFAULTHANDLER=1
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-120}
say "job $SLURM_JOB_ID attempt $attempt on $SLURM_JOB_NODELIST, $ranks ranks per node," \
    "rank 0 on $MASTER_ADDR:$MASTER_PORT, run folder $run"

term=0 preempted=0 step=
# Slurm sends USR1 before the time limit (#SBATCH --signal)
trap 'say "time limit near: asking the ranks to stop"; [ -z "$step" ] || kill -USR1 "$step"' USR1
# Slurm sends TERM for scancel and for a preemption; the state of the job distinguishes them
trap 'term=1
    case $(scontrol show job -o "$SLURM_JOB_ID") in
    *JobState=CANCELLED*) say "cancelled" ;;
    *PreemptTime=[0-9]*) say "preempted"; preempted=1; [ -z "$step" ] || kill -USR1 "$step" ;;
    *) say "got SIGTERM" ;;
    esac' TERM

# One srun starts the ranks. Launchers ignore USR1, which would end them; the ranks handle it.
export MEGALITE_PYTHON_=$python MEGALITE_RANKS_=$ranks MEGALITE_HOSTS_=$hosts
case ${MEGALITE_LAUNCH:-torchrun} in
torchrun)
    export SRUN_CPUS_PER_TASK=$cpus # not inherited by steps since Slurm 22.05
    srun --kill-on-bad-exit=1 --wait=60 --ntasks-per-node=1 bash -c '
        trap "" USR1
        exec "$MEGALITE_PYTHON_" -m torch.distributed.run --nnodes="$SLURM_NNODES" \
            --nproc-per-node="$MEGALITE_RANKS_" --max-restarts=0 --rdzv-backend=c10d \
            --rdzv-id="$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}" \
            --rdzv-endpoint="$MASTER_ADDR:$MASTER_PORT" --local-addr="$SLURMD_NODENAME" "$@"' \
        _ "$program" --config "$config" "$@" &
    ;;
srun)
    export SRUN_CPUS_PER_TASK=$((cpus / ranks > 0 ? cpus / ranks : 1))
    srun --kill-on-bad-exit=1 --wait=60 --ntasks-per-node="$ranks" \
        --ntasks=$((SLURM_NNODES * ranks)) "$python" "$program" --config "$config" "$@" &
    ;;
deepspeed)
    export SRUN_CPUS_PER_TASK=$cpus
    srun --kill-on-bad-exit=1 --wait=60 --ntasks-per-node=1 bash -c '
        trap "" USR1
        list=$(mktemp); while read -r host; do echo "$host slots=$MEGALITE_RANKS_"; done \
            <<<"$MEGALITE_HOSTS_" >"$list"
        exec "$MEGALITE_PYTHON_" -m deepspeed.launcher.runner --no_ssh --hostfile="$list" \
            --node_rank="$SLURM_NODEID" --num_nodes="$SLURM_NNODES" \
            --master_addr="$MASTER_ADDR" --master_port="$MASTER_PORT" "$@"' \
        _ "$program" --config "$config" "$@" &
    ;;
*)
    say "MEGALITE_LAUNCH is $MEGALITE_LAUNCH; set it to torchrun, srun or deepspeed"
    exit 2
    ;;
esac
step=$!
while :; do wait "$step"; rc=$?; kill -0 "$step" 2>/dev/null || break; done # a trap interrupts wait

state=$(field state)
[ "$(field attempt)" != "$began" ] || state=unstarted
say "the ranks ended with exit code $rc: $state at step $(field step)," \
    "newest checkpoint ${now:=$(newest)}"
[ "$state" != done ] || exit 0
[ "$state" != superseded ] || exit 3
if [ "$rc" -eq 0 ]; then rc=1; fi # a launcher that was killed may return 0
if [ "$term" -eq 1 ] && [ "$preempted" -eq 0 ]; then exit "$rc"; fi
if [ "$state" = unstarted ] && [ "$attempt" -eq 0 ]; then
    say "the run never began: not requeued"
    exit "$rc"
fi
if [ "$attempt" -ge "${MEGALITE_REQUEUES:-50}" ]; then
    say "requeued $attempt times already: submit it again to go on"
    exit "$rc"
fi
idle=0
if [ "$now" = "$saved" ]; then idle=$(($(cat "$run/.idle" 2>/dev/null || echo 0) + 1)); fi
if [ -d "$run" ]; then echo "$idle" >"$run/.idle"; fi
if [ "$idle" -ge 2 ] && [ "$preempted" -eq 0 ]; then
    say "$idle starts in a row have saved nothing new: not requeued; see $run/log.txt"
    exit "$rc"
fi
say "requeueing"
scontrol requeue "$SLURM_JOB_ID" && sleep 60 # the requeue ends this script
exit "$rc"
