#!/usr/bin/env bash
# Installs what tests/slurm/start-slurm.sh brings up: Debian's Slurm. Needs root; does nothing if it is there.
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin
missing=''
for command in slurmctld slurmd sbatch munged ip pkill; do command -v $command >/dev/null || missing=yes; done
[ -n "$missing" ] || exit 0
# The packages would start daemons of their own.
policy=/usr/sbin/policy-rc.d made=''
[ -e $policy ] || { printf '#!/bin/sh\nexit 101\n' >$policy && chmod 755 $policy && made=yes; }
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends slurmctld slurmd slurm-client munge iproute2 procps >/dev/null
[ -z "$made" ] || rm -f $policy
