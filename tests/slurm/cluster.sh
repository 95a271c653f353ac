#!/usr/bin/env bash
# cluster.sh: a real Slurm cluster of several nodes on one machine, from Debian 12's packages
# slurm-wlm 22.05.8 and munge. No systemd, no cgroups, no MPI, no database.
#
#   cluster.sh up             start munged + slurmctld + slurmd n1..nN (idempotent)
#   . "$(cluster.sh env)"     export SLURM_CONF, which srun, sbatch and squeue read
#   cluster.sh status         print daemons, nodes and jobs
#   cluster.sh kill-node n2   crash a node: kill its slurmd and all its processes
#   cluster.sh stop-slurmd n2 kill only the node's slurmd; its job continues
#   cluster.sh start-node n2  start the node again
#   cluster.sh down           cancel jobs, stop the daemons, keep logs
#   cluster.sh clean          down, then remove the directory
#
# Environment variables:
#   SLURM_CLUSTER_DIR      folder; default: slurm-cluster in the temporary folder
#   SLURM_CLUSTER_NODES    number of nodes; default: 2
#   SLURM_CLUSTER_CPUS     CPUs per node, which may be more than the machine has; default: 4
#   SLURM_CLUSTER_GPUS     fake GPUs per node; default: 4
#   SLURM_CLUSTER_PORT     port of slurmctld; node i has this port + i; default: 26817
#   SLURM_CLUSTER_INSTALL  1: install missing packages with apt-get
#   SLURM_CLUSTER_ISOLATE  1: each node has its own PID, UTS and mount namespaces, host name and
#       /etc/hosts, which needs root. 0: nodes are plain processes with this machine's host name.
#       Default: 1 if `unshare` is allowed.
#
# All daemons listen only on 127.0.0.1. Nothing outside SLURM_CLUSTER_DIR is changed.
set -euo pipefail

D=${SLURM_CLUSTER_DIR:-$(dirname "$(mktemp -u)")/slurm-cluster}
N=${SLURM_CLUSTER_NODES:-2}
CPUS=${SLURM_CLUSTER_CPUS:-4}
GPUS=${SLURM_CLUSTER_GPUS:-4}
PORT=${SLURM_CLUSTER_PORT:-26817}
ISOLATE=${SLURM_CLUSTER_ISOLATE:-auto}
CONF=$D/slurm.conf
export SLURM_CONF=$CONF
export PATH=$PATH:/usr/sbin:/sbin

log() { printf 'slurm-cluster: %s\n' "$*" >&2; }
die() { log "$*"; exit 1; }

# a cluster that was started and not cleaned has its number of nodes in a file
[[ ${1:-} == up || ! -s $D/run/nodes ]] || N=$(<"$D/run/nodes")
nodes() { local i; for ((i = 1; i <= N; i++)); do echo "n$i"; done; }

# succeed if PID is a process, but not a zombie, whose name starts with NAME
is_proc() { # NAME PID
    local state
    [[ $2 =~ ^[0-9]+$ && -r /proc/$2/comm ]] || return 1
    state=$(sed 's/.*) //; s/ .*//' "/proc/$2/stat" 2>/dev/null) || return 1
    [[ $state != Z && $(cat "/proc/$2/comm" 2>/dev/null) == "$1"* ]]
}

alive() { [[ -s $2 ]] && is_proc "$1" "$(<"$2")"; } # NAME PIDFILE

no_proc() { ! is_proc "$@"; }

wait_for() { # SECONDS COMMAND...
    local end=$((SECONDS + $1)); shift
    until "$@" >/dev/null 2>&1; do
        ((SECONDS < end)) || return 1
        sleep 0.1
    done
}

stop() { # NAME PIDFILE [SIGNAL]: stop a process by its pid, if its name is still NAME
    if alive "$1" "$2"; then
        local pid; pid=$(<"$2") # daemons remove their pid files before they end
        kill "-${3:-TERM}" "$pid"
        wait_for 8 no_proc "$1" "$pid" || { kill -KILL "$pid"; wait_for 3 no_proc "$1" "$pid"; } || true
    fi
    rm -f "$2"
}

install_packages() {
    local missing=()
    command -v slurmctld >/dev/null && command -v slurmd >/dev/null || missing+=(slurm-wlm)
    command -v munged >/dev/null || missing+=(munge)
    ((${#missing[@]})) || return 0
    [[ ${SLURM_CLUSTER_INSTALL:-0} == 1 ]] ||
        die "packages are missing: apt-get install -y --no-install-recommends ${missing[*]}"
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
}

can_isolate() {
    unshare --fork --kill-child --pid --mount --mount-proc --uts \
        sh -c "hostname n1 && mount --bind '$D/run/hosts' /etc/hosts" >/dev/null 2>&1
}

write_conf() {
    local host i range=n1
    host=$(hostname -s)
    ((${#D} <= 80)) || die "SLURM_CLUSTER_DIR has ${#D} characters; give at most 80, for socket paths"
    [[ ! -e $D || -O $D ]] || die "$D belongs to another user; set SLURM_CLUSTER_DIR"
    ((N == 1)) || range="n[1-$N]"
    install -d -m 755 "$D" "$D"/{state,log,run}
    for i in $(nodes); do install -d -m 755 "$D/spool.$i"; done
    [[ -s $D/munge.key ]] || (umask 077; head -c 128 /dev/urandom >"$D/munge.key")

    { # replaces /etc/hosts in the nodes' namespaces
        echo "127.0.0.1 localhost $host"
        for ((i = 1; i <= N; i++)); do echo "127.0.0.1 n$i"; done
    } >"$D/run/hosts"
    if [[ $ISOLATE == auto ]]; then can_isolate && ISOLATE=1 || ISOLATE=0; fi
    echo "$ISOLATE" >"$D/run/isolate"
    echo "$N" >"$D/run/nodes"

    cat >"$CONF.new" <<END
ClusterName=onebox
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$PORT
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
CredType=cred/munge
# A requeued job cannot start before cred_expire seconds have passed (default 120).
AuthInfo=socket=$D/run/munge.sock,cred_expire=5
# listen on the addresses below instead of on all interfaces
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny

# no cgroups, no systemd, no MPI, no accounting daemon
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SwitchType=switch/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc=$D/log/jobcomp.txt

# use the resources of the node lines below instead of the detected hardware
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=100000,batch_sched_delay=0

# short timers: a dead node is detected within about SlurmdTimeout
SlurmdTimeout=5
SlurmctldTimeout=5
TCPTimeout=2
MessageTimeout=5
KillWait=5
InactiveLimit=0
WaitTime=0
MinJobAge=600
CompleteWait=0
ReturnToService=2
JobRequeue=1
MailProg=/bin/true

StateSaveLocation=$D/state
SlurmdSpoolDir=$D/spool.%n
SlurmctldPidFile=$D/run/slurmctld.pid
SlurmdPidFile=$D/run/slurmd.%n.pid
SlurmctldLogFile=$D/log/slurmctld.log
SlurmdLogFile=$D/log/slurmd.%n.log
SlurmctldDebug=info
SlurmdDebug=info
END
    ((GPUS == 0)) || echo "GresTypes=gpu" >>"$CONF.new"
    for ((i = 1; i <= N; i++)); do
        printf 'NodeName=n%d NodeHostname=%s NodeAddr=%s Port=%d CPUs=%d RealMemory=1024%s State=UNKNOWN\n' \
            "$i" "$([[ $ISOLATE == 1 ]] && echo "n$i" || echo "$host")" \
            127.0.0.1 "$((PORT + i))" "$CPUS" \
            "$( ((GPUS == 0)) || echo " Gres=gpu:$GPUS")" >>"$CONF.new"
    done
    local common="Nodes=$range MaxTime=INFINITE State=UP OverSubscribe=NO"
    echo "PartitionName=debug $common Default=YES PriorityTier=1 GraceTime=30" >>"$CONF.new"
    echo "PartitionName=urgent $common PriorityTier=2" >>"$CONF.new"

    : >"$D/gres.conf"
    if ((GPUS > 0)); then # null devices stand in for /dev/nvidia*
        for ((i = 0; i < GPUS; i++)); do
            [[ -e $D/run/fakegpu$i ]] || mknod "$D/run/fakegpu$i" c 1 3 2>/dev/null || : >"$D/run/fakegpu$i"
        done
        printf 'NodeName=%s Name=gpu File=%s/run/fakegpu[0-%d]\n' "$range" "$D" "$((GPUS - 1))" >"$D/gres.conf"
        ((GPUS > 1)) || sed -i 's/\[0-0\]/0/' "$D/gres.conf"
    fi
    mv "$CONF.new" "$CONF"
    printf 'export SLURM_CONF=%q\n' "$CONF" >"$D/env.sh"
}

start_munged() {
    alive munged "$D/run/munged.pid" && return 0
    rm -f "$D"/run/munge.sock*
    munged --force --key-file="$D/munge.key" --socket="$D/run/munge.sock" \
        --pid-file="$D/run/munged.pid" --log-file="$D/log/munged.log" \
        --seed-file="$D/run/munged.seed" 2>>"$D/log/munged.err"
    wait_for 5 munge -n -S "$D/run/munge.sock" || die "munged does not answer; see $D/log/munged.log"
}

start_ctld() {
    alive slurmctld "$D/run/slurmctld.pid" && return 0
    slurmctld -f "$CONF"
    wait_for 10 sh -c 'scontrol ping | grep -q "is UP"' ||
        die "slurmctld does not answer; see $D/log/slurmctld.log"
}

node_alive() {
    if [[ $(<"$D/run/isolate") == 1 ]]; then alive unshare "$D/run/node.$1.pid"
    else alive slurmd "$D/run/slurmd.$1.pid"; fi
}

start_node() {
    node_alive "$1" && return 0
    if [[ $(<"$D/run/isolate") == 1 ]]; then
        # PID 1 of the node is a bash that reaps orphans and restarts slurmd. If the unshare outside
        # is killed, all processes of the node end with it.
        setsid unshare --fork --kill-child --pid --mount --mount-proc --uts bash -c "
            hostname '$1'; mount --bind '$D/run/hosts' /etc/hosts
            while :; do
                slurmd -D -f '$CONF' -N '$1' & wait \$!
                # after stop-slurmd, do not restart slurmd while this file exists
                while [[ -e '$D/run/noslurmd.$1' ]]; do sleep 0.2 & wait \$!; done
                sleep 0.2
            done" </dev/null >>"$D/log/node.$1.log" 2>&1 &
        echo $! >"$D/run/node.$1.pid"
    else
        slurmd -f "$CONF" -N "$1"
    fi
}

# Print the pids of a node without namespaces. slurmd and slurmstepd have the node's log file open.
# Tasks have SLURMD_NODENAME in their environment.
plain_node_pids() {
    local p
    for p in /proc/[0-9]*; do
        if { tr '\0' '\n' <"$p/environ" | grep -qx "SLURMD_NODENAME=$1" &&
            tr '\0' '\n' <"$p/environ" | grep -qx "SLURM_CONF=$CONF"; } 2>/dev/null ||
            { [[ $(<"$p/comm") == slurmstepd || $(<"$p/comm") == slurmd ]] &&
                find "$p/fd" -lname "$D/log/slurmd.$1.log" | grep -q .; } 2>/dev/null; then
            echo "${p#/proc/}"
        fi
    done
}

kill_node() {
    if [[ $(<"$D/run/isolate") == 1 ]]; then
        stop unshare "$D/run/node.$1.pid" KILL
    else
        local pids; pids=$(plain_node_pids "$1")
        # shellcheck disable=SC2086
        [[ -z $pids ]] || kill -KILL $pids 2>/dev/null || true
    fi
    rm -f "$D/run/slurmd.$1.pid" "$D/run/noslurmd.$1"
}

stop_slurmd() {
    if [[ $(<"$D/run/isolate") == 1 ]]; then
        : >"$D/run/noslurmd.$1"
        local init p; init=$(pgrep -P "$(<"$D/run/node.$1.pid")")
        for p in $(pgrep -P "$init" -x slurmd); do kill -KILL "$p"; done
    else
        stop slurmd "$D/run/slurmd.$1.pid" KILL
    fi
}

node_ready() { sinfo -h -n "$1" -o %T | grep -Eq '^(idle|mixed|allocated|completing)$'; }

check_node() { nodes | grep -qx "${1:-}" || die "no node ${1:-}; give one of: $(nodes | paste -sd' ')"; }

case ${1:-} in
up)
    install_packages
    # `up` does not change the configuration of a running cluster
    if alive slurmctld "$D/run/slurmctld.pid"; then
        [[ $(<"$D/run/nodes") == "$N" ]] || die "already up with $(<"$D/run/nodes") nodes; run down first"
    else
        write_conf
    fi
    start_munged
    start_ctld
    for n in $(nodes); do start_node "$n"; done
    for n in $(nodes); do
        wait_for 15 node_ready "$n" || die "node $n is not ready: $(sinfo -h -n "$n" -o '%T %E'); see $D/log"
    done
    log "up: $(sinfo -h -o '%D nodes %T (%N)' | paste -sd' '), isolate=$(<"$D/run/isolate"); . $D/env.sh"
    ;;
env) echo "$D/env.sh" ;;
status)
    if ! alive slurmctld "$D/run/slurmctld.pid"; then echo "slurmctld down"; exit 3; fi
    for n in $(nodes); do
        if node_alive "$n"; then echo "$n: running"; else echo "$n: gone"; fi
    done
    sinfo -N -o '%N %T %E'
    squeue
    ;;
kill-node) check_node "${2:-}"; kill_node "$2" ;;
stop-slurmd) check_node "${2:-}"; stop_slurmd "$2" ;;
start-node)
    check_node "${2:-}"
    rm -f "$D/run/noslurmd.$2"
    start_node "$2"
    wait_for 15 node_ready "$2" || die "node $2 is not ready: $(sinfo -h -n "$2" -o '%T %E')"
    ;;
down | clean)
    if [[ -d $D/run ]]; then
        if alive slurmctld "$D/run/slurmctld.pid"; then
            timeout 5 squeue -h -o %A 2>/dev/null | xargs -r timeout 5 scancel 2>/dev/null || true
        fi
        [[ -e $D/run/isolate ]] || echo 0 >"$D/run/isolate"
        for n in $(nodes); do kill_node "$n"; done
        stop slurmctld "$D/run/slurmctld.pid"
        stop munged "$D/run/munged.pid"
        log "down"
    fi
    [[ $1 != clean ]] || rm -rf "$D"
    ;;
*) sed -n '2,25s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac
