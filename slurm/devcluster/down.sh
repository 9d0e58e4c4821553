#!/usr/bin/env bash
# Stop the development cluster and its jobs, and remove its folder. Installed packages stay.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

own_jobs() {  # processes that this cluster's slurmd has started
  local pid
  for pid in $(pgrep --euid "$UID"); do
    if grep -qzxF "SLURM_CONF=$SLURM_CONF" "/proc/$pid/environ" 2>/dev/null &&
       grep -qzaE '^SLURM_TASK_PID=' "/proc/$pid/environ" 2>/dev/null; then echo "$pid"; fi
  done
}

kill_all() {  # 0 once nothing is left
  local pids
  mapfile -t pids < <(own_daemons; own_jobs)
  ((${#pids[@]})) || return 0
  kill -KILL "${pids[@]}" 2>/dev/null
  return 1
}

[[ -e $CLUSTER ]] || { echo "devcluster: nothing to stop"; exit 0; }
check_folder
if is_running slurmctld; then timeout 5 scancel --user="$(id -un)" 2>/dev/null || true; fi
wait_until 30 "some processes do not stop" kill_all
rm -rf "$CLUSTER"
echo "devcluster: stopped, $CLUSTER removed"
