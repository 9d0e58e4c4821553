#!/usr/bin/env bash
# A real SLURM cluster on this machine, without systemd: munge, MariaDB, slurmdbd, slurmctld and four slurmd "nodes" with
# two declared GPUs each. All of it lives in one folder; outside of it, only missing packages are installed. Needs root for
# that and for nothing else. Run it again to start what has died, or to change the option.
#
#   up.sh [--user-signal | --no-user-signal]     whether preemption also sends a job's own --signal (a site's choice)
#   HPC_DDPM_DEVCLUSTER=DIR up.sh                in another folder, another cluster
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$HERE/common.sh"

# ------------------------------------------------------------------------------------------------------- packages

cannot() { echo "devcluster: $*" >&2; exit 77; }

install_packages() {  # exit code 77 where that is impossible
  local command missing=() as_root=()
  declare -A package=([munged]=munge [mariadbd]=mariadb-server [slurmdbd]=slurmdbd [slurmctld]=slurmctld
                      [slurmd]=slurmd [sbatch]=slurm-client [pgrep]=procps)
  for command in "${!package[@]}"; do
    command -v "$command" >/dev/null || missing+=("${package[$command]}")
  done
  ((${#missing[@]})) || return 0
  command -v apt-get >/dev/null || cannot "not installed: ${missing[*]}; there is no apt-get here, so install them by hand"
  ((UID == 0)) || as_root=(sudo -n)
  "${as_root[@]}" true 2>/dev/null || cannot "not installed: ${missing[*]}; run: sudo apt-get install ${missing[*]}"
  echo "devcluster: installing ${missing[*]} (after up to five minutes where another program holds apt's lock)"
  "${as_root[@]}" sh -s -- "$HERE/apt.sh" "${missing[@]}" >"$CLUSTER/log/install.log" 2>&1 <<'AS_ROOT' ||
    set -e
    policy=/usr/sbin/policy-rc.d  # while it says 101, no installed service is started
    [ -e $policy ] || { trap "rm -f $policy" EXIT; printf '#!/bin/sh\nexit 101\n' >$policy; chmod +x $policy; }
    apt=$1
    shift
    "$apt" update -qq || true
    "$apt" install -y -qq --no-install-recommends --no-remove "$@"
AS_ROOT
    cannot "cannot install ${missing[*]}: $(grep -m1 '^E:' "$CLUSTER/log/install.log" || tail -1 "$CLUSTER/log/install.log")"
}

# -------------------------------------------------------------------------------------------------- configuration

free_ports() {  # COUNT: the first of so many free ports in a row
  local first offset
  while true; do
    first=$((17000 + RANDOM % 1400 * 10))
    for ((offset = 0; offset < $1; offset++)); do
      (exec 3<>"/dev/tcp/127.0.0.1/$((first + offset))") 2>/dev/null && continue 2
    done
    echo "$first"
    return
  done
}

slurm_conf() {  # FIRST_PORT PREEMPTION_SETTING
  local host user
  host=$(hostname -s) user=$(id -un)
  cat <<CONF
ClusterName=devcluster
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$1
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
AuthInfo=socket=$CLUSTER/run/munge.socket,cred_expire=5   # a requeued job waits this long; by default 120 s

AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort=$(($1 + 1))
AccountingStoragePass=$CLUSTER/run/munge.socket
JobAcctGatherType=jobacct_gather/linux

StateSaveLocation=$CLUSTER/state
SlurmdSpoolDir=$CLUSTER/spool/%n
SlurmctldPidFile=$CLUSTER/run/slurmctld.pid
SlurmdPidFile=$CLUSTER/run/%n.pid
SlurmctldLogFile=$CLUSTER/log/slurmctld.log
SlurmdLogFile=$CLUSTER/log/%n.log
TaskProlog=$CLUSTER/etc/task_prolog.sh
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
SlurmdParameters=config_overrides   # believe the CPUs below
ReturnToService=2
SlurmdTimeout=30

SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0
MaxArraySize=11   # task ids 0 to 10
KillWait=5
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
$2

GresTypes=gpu
NodeName=n[1-4] NodeHostname=$host NodeAddr=127.0.0.1 Port=[$(($1 + 2))-$(($1 + 5))] CPUs=4 RealMemory=16000 Gres=gpu:2
PartitionName=gpu Nodes=n[1-4] Default=YES PriorityTier=10 PreemptMode=OFF MaxTime=1-0 DefaultTime=1:00:00
PartitionName=scavenge Nodes=n[1-4] PriorityTier=1 PreemptMode=REQUEUE GraceTime=30 MaxTime=1-0 DefaultTime=1:00:00
CONF
}

slurmdbd_conf() {  # PORT
  cat <<CONF
AuthType=auth/munge
AuthInfo=socket=$CLUSTER/run/munge.socket
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort=$1
SlurmUser=$(id -un)
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=$(id -un)
PidFile=$CLUSTER/run/slurmdbd.pid
LogFile=$CLUSTER/log/slurmdbd.log
CONF
}

CHANGED=""
write_configuration() {  # OPTION
  local etc=$CLUSTER/etc port preemption=""
  if [[ $1 == --user-signal || -z $1 ]] && { [[ -n $1 ]] || grep -qs send_user_signal "$SLURM_CONF"; }; then
    preemption="PreemptParameters=send_user_signal"
    [[ $(slurmctld -V) =~ \ 2[0-2]\. ]] && preemption="SlurmctldParameters=preempt_send_user_signal"
  fi
  port=$(sed -n 's/^SlurmctldPort=//p' "$SLURM_CONF" 2>/dev/null) && [[ -n $(own_daemons) ]] || port=$(free_ports 6)
  slurm_conf "$port" "$preemption" >"$etc/slurm.conf.new"
  cmp -s "$etc/slurm.conf.new" "$SLURM_CONF" || CHANGED=yes
  mv "$etc/slurm.conf.new" "$SLURM_CONF"
  (umask 077 && slurmdbd_conf $((port + 1)) >"$etc/slurmdbd.conf")
  [[ -s $etc/munge.key ]] || (umask 077 && head -c 1024 /dev/urandom >"$etc/munge.key")
  ln -sfn /dev/null "$CLUSTER/dev/nvidia0"  # SLURM asks for devices; their numbers become CUDA_VISIBLE_DEVICES
  ln -sfn /dev/null "$CLUSTER/dev/nvidia1"
  echo "NodeName=n[1-4] Name=gpu File=$CLUSTER/dev/nvidia[0-1]" >"$etc/gres.conf"
  # Here "n1" is not the name of a host, as it is on a cluster, so the ranks are told where to meet.
  printf '#!/bin/sh\necho export MASTER_ADDR=127.0.0.1\n' >"$etc/task_prolog.sh"
  chmod +x "$etc/task_prolog.sh"
}

# -------------------------------------------------------------------------------------------------------- daemons

start() {  # NAME COMMAND...: unless it runs
  local name=$1 out=$CLUSTER/log/$1.out
  shift
  if is_running "$name"; then return; fi
  rm -f "$CLUSTER/run/$name.pid"
  "$@" >"$out" 2>&1 </dev/null 9<&- || fail "$name does not start: $(tail -1 "$out")"
  wait_until 30 "$name does not start" is_running "$name"
}

start_daemons() {
  local run=$CLUSTER/run node
  start munged munged --force --key-file="$CLUSTER/etc/munge.key" --socket="$run/munge.socket" \
    --pid-file="$run/munged.pid" --log-file="$CLUSTER/log/munged.log" --seed-file="$CLUSTER/state/munge.seed"
  [[ -d $CLUSTER/database/mysql ]] ||
    mariadb-install-db --no-defaults --datadir="$CLUSTER/database" --skip-test-db >"$CLUSTER/log/mariadbd.out" 2>&1 ||
    fail "cannot make a database: $(tail -1 "$CLUSTER/log/mariadbd.out")"
  export MYSQL_UNIX_PORT=$CLUSTER/database/socket
  start mariadbd setsid -f mariadbd --no-defaults --datadir="$CLUSTER/database" --user="$(id -un)" \
    --skip-networking --skip-grant-tables --socket="$MYSQL_UNIX_PORT" --pid-file="$run/mariadbd.pid"
  start slurmdbd slurmdbd
  wait_until 60 "slurmdbd does not answer" sacctmgr -n show cluster
  start slurmctld slurmctld
  for node in "${NODES[@]}"; do
    start "$node" slurmd -N "$node"
  done
  wait_until 60 "the nodes do not come up" are_nodes_up
  # Not earlier: for a moment after it the daemons' logs and pid files are closed, and they would seem not to run.
  if [[ $CHANGED ]]; then scontrol reconfigure && sleep 1; fi
}

are_nodes_up() {
  [[ $(sinfo -hN -p gpu -t idle,alloc,mix,comp -o %N | wc -l) == "${#NODES[@]}" ]]
}

case ${1-} in "" | --user-signal | --no-user-signal) ;; *) fail "unknown option $1; see the top of this file" ;; esac
[[ $CLUSTER =~ ^/[^[:space:]]{1,80}$ ]] || fail "HPC_DDPM_DEVCLUSTER=$CLUSTER: give a short absolute path without spaces"
mkdir -p "$CLUSTER"
check_folder
echo "export SLURM_CONF=$SLURM_CONF HPC_DDPM_DEVCLUSTER=$CLUSTER" >"$CLUSTER/env.sh"
mkdir -p "$CLUSTER"/{dev,etc,log,run,state} "${NODES[@]/#/$CLUSTER/spool/}"
(umask 077 && mkdir -p "$CLUSTER/database")
exec 9<"$CLUSTER"
flock 9
install_packages
write_configuration "${1-}"
start_daemons
echo "devcluster: ${#NODES[@]} nodes are up; source $CLUSTER/env.sh"
