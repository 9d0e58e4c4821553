# shellcheck shell=bash disable=SC2034
# Where the development cluster lives, and which processes are its own. Sourced by up.sh, down.sh and status.sh.

CLUSTER=${HPC_DDPM_DEVCLUSTER:-/tmp/hpc_ddpm-devcluster-$UID}
NODES=(n1 n2 n3 n4)
DAEMONS=(munged mariadbd slurmdbd slurmctld "${NODES[@]}")
export SLURM_CONF=$CLUSTER/etc/slurm.conf
PATH=$PATH:/usr/sbin:/usr/local/sbin

fail() { echo "devcluster: $*" >&2; exit 2; }

check_folder() {
  [[ -O $CLUSTER && (-e $CLUSTER/env.sh || -z $(ls -A "$CLUSTER")) ]] || fail "$CLUSTER holds something else; not touched"
}

is_own() {  # PID: whether it is a daemon with an open file in the cluster's folder
  [[ $(cat "/proc/$1/comm" 2>/dev/null) =~ ^(munged|mariadbd|slurm(dbd|ctld|scriptd|d|stepd))$ ]] || return 1
  readlink "/proc/$1/fd/"* 2>/dev/null | grep -qF "$CLUSTER/"
}

own_daemons() {
  local pid
  for pid in $(pgrep 'munged|mariadbd|slurm'); do
    if is_own "$pid"; then echo "$pid"; fi
  done
}

is_running() {  # NAME
  local pid
  pid=$(cat "$CLUSTER/run/$1.pid" 2>/dev/null) && is_own "$pid"
}

wait_until() {  # SECONDS COMPLAINT COMMAND...
  local end=$((SECONDS + $1)) complaint=$2
  shift 2
  until "$@" >/dev/null 2>&1; do
    ((SECONDS < end)) || fail "$complaint; see the logs in $CLUSTER/log"
    sleep 0.1
  done
}
