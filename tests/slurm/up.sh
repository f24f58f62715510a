#!/usr/bin/env bash
# A real Slurm of two nodes on this machine, for tests: Debian's munge, slurmctld, and one slurmd a node. As root.
#   up.sh up [KEEP ...]   installs what is missing, starts the daemons, waits until both nodes are idle
#   up.sh node NAME [KEEP ...]   starts the slurmd of one node (again)
#   up.sh controller   starts slurmctld (again), with the jobs that it knew
#   up.sh kill NAME    kills the slurmd of a node and all that runs there, as a power cut would
#   up.sh down         ends what it started, by process id, and takes its files away
# Each node has a host name, a /tmp and a $HOME of its own (namespaces), so that what a job finds by luck of running
# where it was submitted is not found; of /tmp it sees the folders KEEP alone, as of a shared disk. Memory limits are
# enforced by cgroups where the kernel has them. Nothing is written to /etc. Two stand-in GPUs a node (/dev/null,
# /dev/zero), which nothing opens: Slurm counts them, and sets CUDA_VISIBLE_DEVICES.
set -euo pipefail
ROOT=${SLURM_TEST_ROOT:-/var/tmp/saeflow-slurm}
PORT=${SLURM_TEST_PORT:-26817} # slurmctld; slurmd of a node PORT+1 and PORT+2; srun PORT+10 to PORT+60
NODES=(n1 n2)
HOST=$(hostname -s)
export SLURM_CONF=$ROOT/slurm.conf
say() { printf 'slurm: %s\n' "$*" >&2; }

end() { # NAME of a daemon: by the file that says its process id
  local file="$ROOT/run/$1.pid" pid
  [ -s "$file" ] || return 0
  pid=$(cat "$file")
  kill "$pid" 2>/dev/null || true
  for _ in $(seq 100); do kill -0 "$pid" 2>/dev/null || break; sleep 0.1; done
  kill -9 "$pid" 2>/dev/null || true
  rm -f "$file"
}

down() {
  if [ -s "$ROOT/run/slurmctld.pid" ]; then # the clients would look for it for long
    for state in PENDING RUNNING SUSPENDED; do scancel --state=$state 2>/dev/null || true; done
    for _ in $(seq 50); do [ -z "$(squeue -h 2>/dev/null)" ] && break; sleep 0.2; done
  fi
  for name in "${NODES[@]}"; do end "slurmd-$name"; done
  end slurmctld
  end munged
  if [ "$(readlink /run/slurm/conf 2>/dev/null)" = "$ROOT" ]; then rm -f /run/slurm/conf; rmdir /run/slurm 2>/dev/null || true; fi
}

node() { # NAME KEEP ...
  local name=$1
  shift
  local own=$ROOT/nodes/$name
  rm -rf "$own/tmp"
  mkdir -p "$own/tmp" "$own/spool"
  printf '127.0.0.1 localhost %s %s\n' "$name" "$HOST" >"$own/hosts"
  # shellcheck disable=SC2016
  unshare --mount --uts bash -c '
    own=$1 name=$2
    shift 2
    mount --make-rprivate /
    for kept in "$@"; do
      case $kept in /tmp/*) mkdir -p "$own$kept" && mount --bind "$kept" "$own$kept" ;; esac
    done
    mount --rbind "$own/tmp" /tmp
    mount --bind "$own/hosts" /etc/hosts
    hostname "$name"
    cd / && exec slurmd -N "$name"
  ' node "$own" "$name" "$@"
}

case "${1:-}" in
  down) down; exit 0 ;;
  node) shift; node "$@"; exit 0 ;;
  controller) slurmctld; exit 0 ;;
  kill)
    pid=$(cat "$ROOT/run/slurmd-$2.pid")
    space=$(readlink "/proc/$pid/ns/uts")
    for other in /proc/[0-9]*; do # all of the node: slurmd, its steps, their processes
      if [ "$(readlink "$other/ns/uts" 2>/dev/null)" = "$space" ]; then kill -9 "${other#/proc/}" 2>/dev/null || true; fi
    done
    rm -f "$ROOT/run/slurmd-$2.pid"
    exit 0
    ;;
  up) shift ;;
  *) sed -n '2,/^set/s/^# *//p' "$0" >&2 && exit 2 ;;
esac

missing=()
for binary in slurmctld slurmd srun sbatch munged; do command -v $binary >/dev/null || missing+=("$binary"); done
if [ ${#missing[@]} -gt 0 ]; then
  say "installing slurm-wlm and munge (missing: ${missing[*]})"
  export DEBIAN_FRONTEND=noninteractive
  { apt-get update -qq && apt-get install -y -qq --no-install-recommends slurm-wlm munge; } >/dev/null
fi
if [ -e /run/slurm/conf ] && [ "$(readlink /run/slurm/conf)" != "$ROOT" ]; then
  say "/run/slurm/conf is another Slurm's: this test needs it" && exit 1
fi

down
rm -rf "$ROOT"
mkdir -p "$ROOT"/{run,log,state,munge,nodes}
chmod 755 "$ROOT" && chmod 700 "$ROOT/munge"

head -c 1024 /dev/urandom >"$ROOT/munge/munge.key" && chmod 400 "$ROOT/munge/munge.key"
munged --force --num-threads=2 --key-file="$ROOT/munge/munge.key" --socket="$ROOT/run/munge.socket" \
  --pid-file="$ROOT/run/munged.pid" --log-file="$ROOT/log/munged.log" --seed-file="$ROOT/munge/munge.seed"
for _ in $(seq 50); do [ -S "$ROOT/run/munge.socket" ] && break; sleep 0.1; done

if [ -d /sys/fs/cgroup/memory ] && [ -d /sys/fs/cgroup/freezer ]; then # cgroups of version 1, which this Slurm knows
  tracked=proctrack/cgroup task=task/cgroup
  printf 'CgroupPlugin=cgroup/v1\nConstrainRAMSpace=yes\nConstrainSwapSpace=yes\nAllowedSwapSpace=0\n' >"$ROOT/cgroup.conf"
else
  say "no cgroups of version 1: memory limits are not enforced"
  tracked=proctrack/linuxproc task=task/none
fi
cat >"$ROOT/task_prolog.sh" <<'P'
#!/bin/sh
# what a job would find in the home of who submitted it, it does not
echo "export HOME=/nonexistent"
echo "unset XDG_CACHE_HOME TMPDIR"
P
chmod 755 "$ROOT/task_prolog.sh"
for name in "${NODES[@]}"; do
  printf 'NodeName=%s Name=gpu Type=fake File=/dev/null\nNodeName=%s Name=gpu Type=fake File=/dev/zero\n' "$name" "$name"
done >"$ROOT/gres.conf"
cat >"$ROOT/slurm.conf" <<C
ClusterName=test
SlurmctldHost=$HOST(127.0.0.1)
SlurmctldPort=$PORT
SrunPortRange=$((PORT + 10))-$((PORT + 60))
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$ROOT/run/munge.socket
CredType=cred/munge
StateSaveLocation=$ROOT/state
SlurmdSpoolDir=$ROOT/nodes/%n/spool
SlurmctldPidFile=$ROOT/run/slurmctld.pid
SlurmdPidFile=$ROOT/run/slurmd-%n.pid
SlurmctldLogFile=$ROOT/log/slurmctld.log
SlurmdLogFile=$ROOT/log/slurmd-%n.log
ProctrackType=$tracked
TaskPlugin=$task
TaskProlog=$ROOT/task_prolog.sh
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
MinJobAge=600
ReturnToService=2
SlurmdParameters=config_overrides
SlurmdTimeout=10
InactiveLimit=0
KillWait=10
OverTimeLimit=0
GresTypes=gpu
MaxArraySize=1001
$(for number in 1 2; do
  echo "NodeName=n$number NodeHostname=$HOST NodeAddr=127.0.0.1 Port=$((PORT + number)) CPUs=2 RealMemory=9000 Gres=gpu:fake:2"
done)
PartitionName=cpu Nodes=n1,n2 Default=YES PriorityTier=1 GraceTime=20 MaxTime=2880 DefMemPerCPU=256
PartitionName=gpu Nodes=n1,n2 PriorityTier=1 GraceTime=20 MaxTime=2880 DefMemPerCPU=256
PartitionName=urgent Nodes=n1,n2 PriorityTier=9 PreemptMode=OFF MaxTime=2880 DefMemPerCPU=256
C
# The executor's step drops SLURM_CONF before its srun, so the file has to be found without it.
mkdir -p /run/slurm && ln -sfn "$ROOT" /run/slurm/conf

slurmctld
for name in "${NODES[@]}"; do node "$name" "$@"; done
for _ in $(seq 100); do
  states=$(sinfo -h -N -p cpu -o %T 2>/dev/null | sort -u || true)
  [ "$states" = idle ] && break
  sleep 0.2
done
[ "${states:-}" = idle ] || { say "nodes are '${states:-unreachable}'"; tail -n 20 "$ROOT"/log/*.log >&2; exit 1; }
say "two nodes are idle ($tracked, $task): export SLURM_CONF=$SLURM_CONF"
