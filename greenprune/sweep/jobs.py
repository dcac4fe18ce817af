"""The text of batch jobs, as a pure function of the site and the job's shape.

A job file holds nothing of a run: what to run comes as its arguments. So no value of a config ever passes a shell as
text, and the files in ``slurm/`` are the ones that sweeps submit.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Literal

from greenprune.sweep.site import Site

JobKind = Literal["array", "single_node", "many_nodes", "collect"]


@dataclass(frozen=True)
class Shape:
    """How many processes a job has.

    Attributes:
        nodes: Nodes.
        processes: Processes on each node.
    """

    nodes: int = 1
    processes: int = 1


def render_job(kind: JobKind, site: Site, shape: Shape = Shape()) -> str:
    """The text of a job file, which sbatch takes.

    Args:
        kind: ``array``: the task of a sweep whose number is the array's, with the sweep's folder as argument;
            ``single_node`` and ``many_nodes``: one run, with the arguments of ``greenprune train``;
            ``collect``: a sweep's report, with its folder as argument.
        site: What the cluster wants to be told.
        shape: The processes of a run.
    """
    if kind == "collect":
        parts = [_head(kind, site, None), _environment(site), _COLLECT]
    elif kind == "array":
        has_launcher = shape != Shape()
        task, record = (_TASK + _BEFORE, _RECORD_OF_LAUNCHER) if has_launcher else (_TASK, _RECORD)
        parts = [_head(kind, site, shape), _environment(site), task, _STOP, _start(shape), _wait(site, kind, record)]
    else:
        parts = [_head(kind, site, shape), _environment(site), _NO_ARRAY, _STOP, _start(shape), _wait(site, kind)]
    return "\n".join(part for part in parts if part)


_ABOUT = {
    "array": "One run of a sweep for each number of the array: sbatch --array=0-5%2 array.sbatch SWEEP_FOLDER",
    "single_node": "One run on one node: sbatch single_node.sbatch --config CONFIG --run_name NAME --resume auto",
    "many_nodes": "One run on several nodes: sbatch many_nodes.sbatch --config CONFIG --run_name NAME --resume auto",
    "collect": "The report of a sweep: sbatch --dependency=afterany:ARRAY collect.sbatch SWEEP_FOLDER",
}


def _head(kind: JobKind, site: Site, shape: Shape | None) -> str:
    options = {"job-name": "greenprune", "nodes": 1, "ntasks-per-node": 1, "time": "00:15:00", "open-mode": "append"}
    options |= {"output": "%x-%j.log", "account": site.account, "partition": site.partition, "qos": site.qos}
    if shape is not None:
        processes = shape.processes
        options |= {"nodes": shape.nodes, "time": site.time, "signal": f"B:USR1@{site.warning_s}", "requeue": True}
        options |= {"constraint": site.constraint, "exclusive": site.exclusive}
        options["gres"] = None if site.gres is None else site.gres.replace("{processes}", str(processes))
        options["cpus-per-task"] = None if site.cpus_per_process is None else site.cpus_per_process * processes
        options["mem"] = None if site.mem_per_process is None else _times(site.mem_per_process, processes)
    lines = [f"#SBATCH --{key}" + ("" if value is True else f"={value}") for key, value in options.items() if value]
    return "\n".join(["#!/bin/bash", f"# {_ABOUT[kind]}", *lines, ""])


def _times(memory: str, processes: int) -> str:
    number, unit = (memory[:-1], memory[-1]) if memory[-1].isalpha() else (memory, "")
    return f"{int(number) * processes}{unit}"


# set -e would end the shell at a signal, which makes wait fail: nothing recorded, and the job not queued again.
_ASIDE = 'arguments=("$@") && set -- # a script that is sourced would have them for its own'
_BACK = 'set +eu +o pipefail -- "${arguments[@]}"'


def _environment(site: Site) -> str:
    lines = [f"module load {shlex.quote(module)}" for module in site.modules]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in site.environment.items()]
    if site.setup:
        lines += [_ASIDE, *site.setup, _BACK]
    return "\n".join([*lines, ""]) if lines else ""


_TASK = """\
sweep=$1 task=$(printf %04d "$SLURM_ARRAY_TASK_ID")
config=$sweep/configs/$task.yaml
# A file written on another machine may take a minute to be seen here; listing its folder asks the server again.
for _ in {1..90}; do
  [ -e "$config" ] && break
  ls "$sweep/configs" >/dev/null
  sleep 1
done
rm -f "$sweep/exits/$task"
set -- --config "$config"
"""

_BEFORE = """\
events() { cat "$sweep/runs/$task-"*/events.jsonl 2>/dev/null; }
before=$(events | wc -c)
"""

_STOP = """\
# USR1 comes before the time limit, TERM when the job is preempted. The training processes are told by a TERM: they
# finish their step, write a checkpoint and end; then the job queues itself again.
program='' stopped=''
stop() {
  stopped=yes
  [ -z "$program" ] || tell
}
trap stop USR1 TERM
"""

_ONE_PROCESS = """\
tell() { kill -TERM "$program"; }
greenprune train "$@" &
"""

_SEVERAL_PROCESSES = """\
# Not the launcher itself, which would kill them after 30 s, unless it has not started them yet.
tell() { pkill -TERM -P "$program" || kill -TERM "$program"; }
accelerate launch --quiet --multi_gpu --num_machines=1 --num_processes={processes} --main_process_port=0 \\
  --mixed_precision=no --dynamo_backend=no --max_restarts=0 -m greenprune.train "$@" &
"""

_SEVERAL_NODES = """\
# One task a node, which starts the node's processes; they find each other on the first host of the allocation.
export FIRST_HOST PORT PET_RDZV_ID=$SLURM_JOB_ID
FIRST_HOST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
PORT=$((20000 + SLURM_JOB_ID % 10000))
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # srun does not inherit it
read -r -d '' on_node <<'NODE'
program=''
# Not the launcher itself, which would kill them after 30 s, unless it has not started them yet.
tell() { [ -z "$program" ] || pkill -TERM -P "$program" || kill -TERM "$program"; }
trap tell USR1 TERM
# Slurm hands a signal to every process of the step: the launcher must not die of it.
(
  trap '' USR1
  exec accelerate launch --quiet --multi_gpu --num_machines="$SLURM_NNODES" --machine_rank="$SLURM_NODEID" \\
    --num_processes=$((SLURM_NNODES * {processes})) --rdzv_backend=c10d --main_process_ip="$FIRST_HOST" \\
    --main_process_port="$PORT" --mixed_precision=no --dynamo_backend=no --max_restarts=0 -m greenprune.train "$@"
) &
program=$!
while kill -0 "$program" 2>/dev/null; do wait "$program"; done
wait "$program"
exit
NODE
tell() { kill -USR1 "$program"; } # srun hands it on
srun --wait=300 bash -c "$on_node" on_node "$@" &
"""


def _start(shape: Shape) -> str:
    if shape == Shape():
        return _ONE_PROCESS
    text = _SEVERAL_NODES if shape.nodes > 1 else _SEVERAL_PROCESSES
    return text.replace("{processes}", str(shape.processes))  # str.format would trip over the braces of the shell


_RECORD = 'echo "$code" >"$sweep/exits/$task"\n'

_RECORD_OF_LAUNCHER = """\
# A launcher has exit codes of its own: that its processes ended as they were asked to, their last event tells.
case $(events | tail -c "+$((before + 1))" | tail -n 1) in
  *'"kind": "interrupt"'*) echo 143 ;;
  *) echo "$code" ;;
esac >"$sweep/exits/$task"
"""

_WAIT = """\
program=$!
[ -z "$stopped" ] || tell
while kill -0 "$program" 2>/dev/null; do wait "$program"; done # a signal ends wait, not the program
wait "$program"
code=$?
{record}\
# A job that Slurm is ending (COMPLETING: cancelled, or preempted and queued again by Slurm itself) is left alone.
# A controller that does not answer is asked again: a run that is not queued now stays where it stopped.
{job}if [ "$code" != 0 ] && [ -n "$stopped" ] && [ "${SLURM_RESTART_COUNT:-0}" -lt {requeues} ]; then
  unset "${!SQUEUE_@}" # a user's defaults, which may hide this job
  for _ in {1..30}; do
    state=$(squeue --noheader --jobs="$job" --format=%T) &&
      { [ "$state" = COMPLETING ] || scontrol requeue "$job"; } && break
    sleep 1
  done
fi
exit "$code"
"""


_TASK_ID = """\
# One task of an array has the array's own number for its own, by which Slurm would mean all of them.
job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
"""

_JOB_ID = """\
job=$SLURM_JOB_ID
"""

_NO_ARRAY = """\
# Of an array's task that has submitted this job, for whose it would be taken: a job has the environment of that shell.
unset "${!SLURM_ARRAY_@}"
"""


def _wait(site: Site, kind: JobKind, record: str = "") -> str:
    text = _WAIT.replace("{record}", record).replace("{requeues}", str(site.requeues))
    return text.replace("{job}", _TASK_ID if kind == "array" else _JOB_ID)


_COLLECT = """\
exec greenprune sweep collect "$1"
"""
