"""``greenprune sweep``: expand, show, submit, do, watch and report many runs."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from rich.table import Table
from rich.text import Text

from greenprune.config import UserError
from greenprune.formatting import (
    NamedFigures,
    format_joules,
    format_number,
    format_percent,
    format_seconds,
    leave_closed_pipe,
    open_console,
)
from greenprune.interrupt import InterruptRequest
from greenprune.redaction import print_error, without_secrets
from greenprune.sweep.collect import collect_report
from greenprune.sweep.folder import (
    PlannedRun,
    SweepFolder,
    check_same_sweep,
    planned_runs,
    read_submissions,
    record_submission,
    write_sweep,
)
from greenprune.sweep.jobs import Shape, render_job
from greenprune.sweep.local import run_here, shares_of_gpus
from greenprune.sweep.plan import Sweep, read_sweep
from greenprune.sweep.reading import read_settings
from greenprune.sweep.site import Site
from greenprune.sweep.slurm import (
    QueuedTask,
    array_command,
    cancel,
    collect_command,
    missing_commands,
    queued_tasks,
    release,
    submit,
)
from greenprune.sweep.states import RunState, read_states, states_table, totals

_SITE = Path("slurm/site.yaml")
_PATIENCE_S = 60.0

_DESCRIPTION = """\
Expand a sweep into numbered, complete configs, and do its runs here or on a Slurm cluster.

  greenprune sweep FILE                 write the sweep's folder and say what is in it
  greenprune sweep FILE --dry-run       show the runs and the Slurm jobs; write nothing
  greenprune sweep FILE --submit        submit the runs that are missing or failed, and a job that writes the report
  greenprune sweep FILE --local [N]     do them here, N at a time, and write the report
  greenprune sweep status DIR           how far each run is
  greenprune sweep collect DIR          write the report of what there is
  greenprune sweep jobs DIR             write job files for single runs at your site into DIR

Doing the same again goes on: what is finished or in the queue is left alone. docs/slurm.md tells more."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        told = without_secrets(message, os.environ)
        self.exit(2, f"greenprune: error: {told}; see {self.prog} --help\n")


def main(args: Sequence[str], prog: str = "greenprune sweep") -> int:
    """Carry out one command line.

    Args:
        args: Arguments after ``greenprune sweep``.
        prog: The program's name for messages.

    Returns:
        0 done; 1 a run has failed; 2 it cannot be done as asked; 128 + n stopped by signal n.

    Raises:
        SystemExit: Help was asked for (0), or the arguments are wrong (2).
    """
    commands = {"status": _status, "collect": _collect, "jobs": _jobs}
    try:
        code = commands[args[0]](args[1:], prog) if args and args[0] in commands else _sweep(args, prog)
        sys.stdout.flush()  # here, where a reader that has left can still be told from a failure
        return code
    except BrokenPipeError:
        return leave_closed_pipe()
    except (UserError, OSError) as error:
        print_error(error, os.environ)
        return 2 if isinstance(error, UserError) else 1


# The commands.


def _sweep(args: Sequence[str], prog: str) -> int:
    parser = _Parser(
        prog=prog, description=_DESCRIPTION, usage=argparse.SUPPRESS, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="the sweep's YAML file")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--dry-run", action="store_true", help="show the runs and the Slurm jobs; write nothing")
    how.add_argument("--submit", action="store_true", help="submit to Slurm what is missing or failed")
    how.add_argument(
        "--local", type=int, nargs="?", const=1, metavar="N", help="do it here, N runs at a time (1), on a GPU each"
    )
    parser.add_argument("--at-once", type=int, metavar="K", help="with --submit: runs that may go on at the same time")
    _add_site(parser)
    options = parser.parse_args(args)
    for flag, value in (("--local", options.local), ("--at-once", options.at_once)):
        if value is not None and value < 1:
            raise UserError(f"{flag}: {value} is not valid; expected a whole number of at least 1")
    if options.at_once is not None and not (options.submit or options.dry_run):
        raise UserError(
            f"--at-once: {options.at_once} is not valid without --submit or --dry-run; expected one of them, or "
            "--local N for runs done here"
        )
    sweep, site = read_sweep(options.file), _read_site(options.site)
    folder = SweepFolder(sweep.folder)
    check_same_sweep(folder, planned_runs(sweep))
    at_once = options.at_once or sweep.config.at_once
    if options.dry_run:
        _show(sweep, folder, site, at_once)
        return 0
    if options.submit:
        _check_slurm()
    with folder.held():
        runs = write_sweep(folder, sweep)
        if options.submit:
            return _submit(sweep, folder, runs, site, at_once)
        if options.local is not None:
            return _run_here(sweep, folder, runs, options.local)
    open_console().print(NamedFigures(_plan_table(sweep)))
    print(f"{folder.path} holds {format_number(len(runs), 'run')}, to be done with --local or --submit.")
    return 0


def _status(args: Sequence[str], prog: str) -> int:
    parser = _Parser(prog=f"{prog} status", description="Say how far each run of a sweep is.")
    parser.add_argument("folder", type=Path, metavar="DIR", help="the sweep's folder")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(args)
    folder = SweepFolder(options.folder)
    runs = folder.planned()
    try:
        queue, problem = _queue(folder), ""
    except UserError as error:
        queue, problem = {}, without_secrets(str(error), os.environ)
    states = read_states(folder, runs, queue)
    if options.json:
        print(json.dumps([state.to_dict() for state in states], indent=2))
    else:
        open_console().print(states_table(states))
    if problem:
        print(f"greenprune: note: what is in Slurm's queue is not known: {problem}", file=sys.stderr)
    return 0


def _collect(args: Sequence[str], prog: str) -> int:
    parser = _Parser(prog=f"{prog} collect", description="Write the report of a sweep's runs, as far as they are.")
    parser.add_argument("folder", type=Path, metavar="DIR", help="the sweep's folder")
    parser.add_argument(
        "--patience",
        type=float,
        default=_PATIENCE_S,
        metavar="S",
        help="most seconds to wait for files that other machines wrote (%(default)g)",
    )
    options = parser.parse_args(args)
    folder = SweepFolder(options.folder)
    return _report(folder, folder.planned(), options.patience)


def _jobs(args: Sequence[str], prog: str) -> int:
    parser = _Parser(prog=f"{prog} jobs", description="Write job files for your site, as those in slurm/ are.")
    parser.add_argument("folder", type=Path, metavar="DIR", help="where to write them")
    parser.add_argument("--nodes", type=int, default=2, metavar="N", help="nodes of a run on many nodes (2)")
    parser.add_argument("--processes", type=int, default=4, metavar="N", help="processes of a run on each node (4)")
    _add_site(parser)
    options = parser.parse_args(args)
    for flag, value, least in (("--nodes", options.nodes, 2), ("--processes", options.processes, 1)):
        if value < least:
            raise UserError(f"{flag}: {value} is not valid; expected a whole number of at least {least}")
    site = _read_site(options.site)
    options.folder.mkdir(parents=True, exist_ok=True)
    for name, text in job_files(site, options.nodes, options.processes).items():
        (options.folder / name).write_text(text, encoding="utf-8")
        print(options.folder / name)
    return 0


def job_files(site: Site, nodes: int = 2, processes: int = 4) -> dict[str, str]:
    """All job files of a site by their names.

    Args:
        site: The site.
        nodes: Nodes of a run on many nodes.
        processes: Processes on each node of a run that is not part of an array.
    """
    return {
        "array.sbatch": render_job("array", site),
        "single_node.sbatch": render_job("single_node", site, Shape(1, processes)),
        "many_nodes.sbatch": render_job("many_nodes", site, Shape(nodes, processes)),
        "collect.sbatch": render_job("collect", site),
    }


# What they consist of.


def _add_site(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--site", type=Path, metavar="FILE", help=f"the cluster's profile ({_SITE}, if it is there)")


def _read_site(path: Path | None) -> Site:
    if path is None and not _SITE.exists():
        return Site()
    return read_settings(path or _SITE, Site, "site")


def _check_slurm() -> None:
    missing = missing_commands()
    if missing:
        raise UserError(
            f"--submit: Slurm is not here ({', '.join(missing)} not on the PATH); expected a machine that submits to "
            "a cluster, or --local, or --dry-run"
        )


def _queue(folder: SweepFolder) -> Mapping[int, QueuedTask]:
    """The sweep's runs in Slurm's queue; nothing is asked where nothing was submitted."""
    submissions = read_submissions(folder)
    return queued_tasks(
        [submission["array"] for submission in submissions],
        [submission["user"] for submission in submissions if "user" in submission],
    )


def _jobs_of(sweep: Sweep, site: Site) -> dict[str, str]:
    shape = Shape(sweep.config.nodes, sweep.config.processes)
    return {"array.sbatch": render_job("array", site, shape), "collect.sbatch": render_job("collect", site)}


def _show(sweep: Sweep, folder: SweepFolder, site: Site, at_once: int) -> None:
    """Print what would be submitted; as text, so that it can be read and copied."""
    open_console().print(NamedFigures(_plan_table(sweep)))
    for name, text in _jobs_of(sweep, site).items():
        print(f"\n# {folder.path / name}\n{text}", end="")
    numbers = [task.number for task in sweep.tasks]
    array = array_command(folder.path, folder.path / "array.sbatch", numbers, at_once)
    collect = collect_command(folder.path, folder.path / "collect.sbatch", ["ARRAY"])
    print(f"\n{shlex.join(array)}\n{shlex.join(collect)}\nNothing was written or submitted.")


def _plan_table(sweep: Sweep) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("run", overflow="fold")
    keys = list(dict.fromkeys(key for task in sweep.tasks for key in task.changes if key not in sweep.config.settings))
    for key in keys:
        table.add_column(key, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for task in sweep.tasks:
        cells = [json.dumps(task.changes[key]) if key in task.changes else "" for key in keys]
        table.add_row(Text(task.name), *map(Text, cells), Text("dense twin" if task.is_twin else "", style="dim"))
    return table


def _submit(sweep: Sweep, folder: SweepFolder, runs: list[PlannedRun], site: Site, at_once: int) -> int:
    """Submit what is missing or failed, and the report after it; both, or nothing."""
    queue = _queue(folder)
    states = read_states(folder, runs, queue)
    numbers = [state.run.number for state in states if state.is_to_do]
    if not numbers:
        print(f"There is nothing to submit: {totals(states)}")
        return 0
    for name, text in _jobs_of(sweep, site).items():
        (folder.path / name).write_text(text, encoding="utf-8")
    request = InterruptRequest()
    with request:  # a Ctrl-C in between would leave jobs held that nobody knows of
        # Runs of earlier arrays that still go on belong into the report as well.
        array, collect = _submit_both(folder, numbers, at_once, sorted({task.array for task in queue.values()}))
    left_alone = len(runs) - len(numbers)
    if min(at_once, len(numbers)) > 1 and not site.exclusive:
        print(
            "greenprune: note: of runs whose jobs share a node each counts the joules of its CPU and memory as a "
            "whole; to compare or add up joules, give jobs nodes of their own (exclusive: true in the site profile)",
            file=sys.stderr,
        )
    print(
        f"job {array}: {format_number(len(numbers), 'run')}, {at_once} at once"
        + (f"; {left_alone} are finished or in the queue already" if left_alone else "")
        + f"\njob {collect}: the report, once they have ended: {folder.path / 'report.html'}"
        + f"\nHow far they are: greenprune sweep status {shlex.quote(str(folder.path))}"
    )
    if request.signal:
        told = f"greenprune: stopped, once both jobs were submitted; to take them back: scancel {array} {collect}"
        print(told, file=sys.stderr)
        return 128 + request.signal
    return 0


def _submit_both(folder: SweepFolder, numbers: list[int], at_once: int, earlier: list[str]) -> tuple[str, str]:
    """Submit an array, and the job that reports on it and on earlier arrays, and let them start.

    Returns:
        Their ids.

    Raises:
        UserError: Slurm refuses one; what had been submitted is taken back.
        OSError: The submission cannot be recorded; likewise.
    """
    jobs: list[str] = []
    try:
        jobs.append(submit(array_command(folder.path, folder.path / "array.sbatch", numbers, at_once)))
        jobs.append(submit(collect_command(folder.path, folder.path / "collect.sbatch", [*jobs, *earlier])))
        array, collect = jobs
        made = {"time": time.time(), "user": os.getuid(), "array": array, "collect": collect, "runs": numbers}
        record_submission(folder, made)
        release(array)
    except (UserError, OSError):
        _take_back(jobs)
        raise
    return array, collect


def _take_back(jobs: list[str]) -> None:
    """Take jobs out of the queue, and say which of them stay there; why they have to go is told by the caller."""
    left, why = [], ""
    for job in jobs:
        try:
            cancel(job)
        except UserError as error:
            left.append(job)
            why = without_secrets(str(error), os.environ)
    if left:
        told = f"jobs {', '.join(left)} are still in the queue ({why}); to take them back: scancel {' '.join(left)}"
        print(f"greenprune: note: {told}", file=sys.stderr)


def _run_here(sweep: Sweep, folder: SweepFolder, runs: list[PlannedRun], at_once: int) -> int:
    """Do what is missing or failed on this machine, and write the report."""
    queue = _queue(folder) if not missing_commands() else {}
    states = read_states(folder, runs, queue)
    todo = [state.run for state in states if state.is_to_do]
    done = len(runs) - len(todo)
    if done:
        print(f"{done} of {len(runs)} runs are finished or on their way already", flush=True)
    processes = sweep.config.nodes * sweep.config.processes
    side_by_side = min(at_once, len(todo))
    on_gpus = any(task.config.device != "cpu" for task in sweep.tasks)
    shares = shares_of_gpus(os.environ, processes) if side_by_side > 1 and on_gpus else []
    if side_by_side > 1:
        print(f"greenprune: note: {_about_side_by_side(side_by_side, len(shares))}", file=sys.stderr)
    ended = 0

    def tell(run: PlannedRun, code: int | None, time_s: float) -> None:
        nonlocal ended
        if code is None:
            print(f"started   {run.name}", flush=True)
            return
        ended += 1
        (state,) = read_states(folder, [run])
        print(f"{ended + done:>4}/{len(runs)} {run.name}: {_outcome(state, code, time_s)}", flush=True)

    number = run_here(folder, todo, at_once, processes, tell, shares)
    if number:
        print(f"greenprune: stopped; go on with the same command. {totals(read_states(folder, runs))}", file=sys.stderr)
        return 128 + number
    _report(folder, runs, 0.0)
    return (
        0 if all(state.state == "finished" or not state.is_to_do for state in read_states(folder, runs, queue)) else 1
    )


def _about_side_by_side(runs: int, shares: int) -> str:
    """What runs side by side have in common, of a machine with GPUs for so many of them."""
    if shares == 0:
        told = "of runs side by side each counts the joules of the whole machine"
    elif shares < runs:
        told = f"{runs} runs side by side share GPUs for {shares}; each counts the joules of its own and all else here"
    else:
        told = "of runs side by side each has its own GPUs, and counts their joules and those of all else here"
    return f"{told}; to compare joules and seconds, or to add them up, do one at a time (--local 1)"


def _outcome(state: RunState, code: int, time_s: float) -> str:
    """A run's accuracy, and the joules and seconds of all its attempts; else why it ended, after how many seconds."""
    if state.state != "finished":
        return f"{state.state}, {state.why or f'exit code {code}'}, {format_seconds(time_s)}"
    figures = state.figures
    spent = f"{format_joules(figures.get('energy_j'))}, {format_seconds(figures.get('time_s'))}"
    return f"{format_percent(figures.get('accuracy'), 2)}, {spent}"


def _report(folder: SweepFolder, runs: list[PlannedRun], patience_s: float) -> int:
    def queue() -> Mapping[int, QueuedTask]:
        return _queue(folder) if not missing_commands() else {}

    states, written = collect_report(folder, runs, queue, patience_s)
    open_console().print(states_table(states))
    for path in written:
        print(f"{path} is written")
    return 0
