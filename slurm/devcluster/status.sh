#!/usr/bin/env bash
# What of the development cluster runs. Exit code 0 when all of it does, 1 otherwise.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

code=0
for name in "${DAEMONS[@]}"; do
  if is_running "$name"; then state="runs"; else state="does not run" code=1; fi
  printf '%-10s %s\n' "$name" "$state"
done
if ! is_running slurmctld; then exit 1; fi
if grep -q send_user_signal "$SLURM_CONF"; then said="and the job's own --signal"; else said="only"; fi
echo "preemption SIGTERM $said"
echo "use        source $CLUSTER/env.sh"
timeout 10 sinfo
exit $code
