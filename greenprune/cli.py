"""The ``greenprune`` command: train, compare, take networks away, look over the machine, measure other commands."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from greenprune.interrupt import ended_by_ctrl_c, undone_by_ctrl_c
from greenprune.redaction import print_error, without_secrets
from greenprune.streams import ready_streams

_DESCRIPTION = """\
Train a network and remove the blocks it does not need while it trains, with every joule accounted for.

commands:
  train        do one run: all its settings from a YAML file and flags
  sweep        do many: here or as a Slurm array, each beside its dense twin
  compare      set runs side by side, each against its dense twin
  report       the same as one HTML file with figures, or as md, csv, json, png
  watch        follow a run from another terminal or machine
  verify       check a run's files, its books and its checkpoints
  sync         bring a run to W&B or TensorBoard after the fact, from its events
  dashboard    lay out a W&B workspace for comparing energy, or print its layout
  export       write a finished run's network so that it runs without greenprune
  eval         accuracy of an exported network on a test set
  infer-bench  latency, throughput, joules and memory of exported networks beside their dense twins
  doctor       say what this machine has and what is missing
  measure      run any command and say what joules it took

examples:
  greenprune train --config configs/digits.yaml --budget.target 0.3
  greenprune compare runs/
  greenprune report runs/ -o report.html
  greenprune export runs/NAME --format onnx -o my-network
  greenprune measure -- python train.py

Each command has its own --help. Several processes: accelerate launch greenprune/train.py (see launch/)."""


class _Parser(argparse.ArgumentParser):
    """A parser whose complaints are one line."""

    def error(self, message: str) -> NoReturn:
        told = without_secrets(message, os.environ)
        self.exit(2, f"greenprune: error: {told}; see {self.prog} --help\n")


class _Version(argparse.Action):
    """Looks the version up only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        import importlib.metadata

        print(f"greenprune {importlib.metadata.version('greenprune')}")
        parser.exit()


def _build_parser() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = _Parser(
        prog="greenprune", usage="greenprune COMMAND ...", description=_DESCRIPTION, formatter_class=formatter
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(
        prog="greenprune", dest="command", metavar="COMMAND", required=True, help=argparse.SUPPRESS
    )
    for own in ("train", "sweep", "measure"):
        commands.add_parser(own, add_help=False)  # has a parser of its own: here it is only a valid name
    compare = commands.add_parser("compare", description="Set runs side by side, each against its dense twin.")
    compare.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="a run's folder, its summary.json, or a folder that holds runs",
    )
    compare.add_argument(
        "--to-accuracy", type=float, metavar="SHARE", help="also tell the joules until this accuracy was reached (0.9)"
    )
    evaluate, benchmark = _add_export_parsers(commands)
    report = commands.add_parser("report", description="Write a report of runs: figures, tables, what went and when.")
    report.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="as for compare; runs may still go on")
    report.add_argument("-o", "--output", type=Path, metavar="FILE", help="where to write it (report.html; -: stdout)")
    report.add_argument(
        "--format", choices=("html", "md", "csv", "json", "png"), help="its form, if not told by the name of FILE"
    )
    from greenprune.energy.options import add_carbon_options

    for telling in (compare, report):
        add_carbon_options(telling.add_argument_group("CO2e of runs that do not know it, or all at one intensity"))
    watch = commands.add_parser("watch", description="Show a run as train does, from another terminal or machine.")
    watch.add_argument("run", type=Path, metavar="RUN", help="the run's folder")
    watch.add_argument("--once", action="store_true", help="show what there is and do not wait for more")
    verify = commands.add_parser("verify", description="Check a run's files, recompute its books, load its weights.")
    verify.add_argument("run", type=Path, metavar="RUN", help="the run's folder; the run may still go on")
    sync = commands.add_parser("sync", description="Bring all of a run's events to a tracker, in place of what it has.")
    sync.add_argument("run", type=Path, metavar="RUN", help="the folder of a run that has stopped")
    sync.add_argument("--to", choices=("wandb", "tensorboard"), default="wandb", help="the tracker (wandb)")
    sync.add_argument("--offline", action="store_true", help="only write the file that wandb sync uploads")
    dashboard = commands.add_parser("dashboard", description="Lay out a W&B workspace for comparing energy.")
    dashboard.add_argument("--entity", metavar="NAME", help="the W&B user or team; needed unless --print")
    dashboard.add_argument("--project", default="greenprune", metavar="NAME", help="the W&B project (greenprune)")
    dashboard.add_argument("--print", action="store_true", help="print the layout as JSON and send nothing")
    doctor = commands.add_parser("doctor", description="Say what this machine has and what is missing.")
    for command in (compare, evaluate, benchmark, verify, doctor):
        command.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _add_export_parsers(
    commands: argparse._SubParsersAction[_Parser],
) -> tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
    export = commands.add_parser(
        "export", description="Write a finished run's network so that it runs without greenprune, and check it."
    )
    export.add_argument("run", type=Path, metavar="RUN", help="a finished run's folder")
    export.add_argument(
        "--format",
        required=True,
        metavar="FORMAT",
        help="torch, torch.export, onnx, safetensors or hf (docs/export.md)",
    )
    export.add_argument(
        "-o", "--output", type=Path, metavar="DIR", help="new folder to write; default: export/FORMAT in the run's"
    )
    export.add_argument(
        "--fold-batch-norm", action="store_true", help="fold batch normalisation into the convolutions before it"
    )
    export.add_argument("--opset", type=int, metavar="N", help="ONNX operator set; default: the exporter's choice")
    evaluate = commands.add_parser("eval", description="Accuracy of an exported network on a test set.")
    evaluate.add_argument("file", type=Path, metavar="FILE", help="an exported folder, or a file in it")
    evaluate.add_argument("--data", required=True, metavar="NAME", help="name of the data set, such as digits")
    variable = "the environment's GREENPRUNE_DATA"
    for command, default in ((export, f"the one that the run's config names, or {variable}"), (evaluate, variable)):
        command.add_argument("--root", metavar="DIR", help=f"folder of the data set; default: {default}")
    benchmark = commands.add_parser(
        "infer-bench", description="What inference with exported networks takes beside their dense twins, in turn."
    )
    benchmark.add_argument("files", nargs="+", type=Path, metavar="FILE", help="an exported folder, or a file in it")
    benchmark.add_argument("--batch-size", type=int, default=256, metavar="N", help="images in a large batch (256)")
    benchmark.add_argument("--turns", type=int, default=15, metavar="N", help="turns of each network (15)")
    benchmark.add_argument("--compile", action="store_true", help="also measure them compiled by torch.compile (slow)")
    for command in (evaluate, benchmark):
        command.add_argument(
            "--trust", action="store_true", help="load .pt2 files too, whose loader runs code that is in them"
        )
    return evaluate, benchmark


def _compare(arguments: argparse.Namespace) -> int:
    from greenprune.energy.options import carbon_of
    from greenprune.formatting import open_console
    from greenprune.report import compare_runs

    comparison = compare_runs(arguments.runs, arguments.to_accuracy, carbon_of(arguments))
    if arguments.json:
        print(json.dumps(comparison.to_dict(), indent=2))
    else:
        open_console().print(comparison)
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from greenprune.export import export_run

    with undone_by_ctrl_c():
        exported = export_run(
            arguments.run,
            arguments.format,
            arguments.output,
            fold_batch_norm=arguments.fold_batch_norm,
            opset=arguments.opset,
            data_root=arguments.root,
            default_root=os.environ.get("GREENPRUNE_DATA"),
        )
    print(exported)
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    from greenprune.export import evaluate_file

    root = arguments.root or os.environ.get("GREENPRUNE_DATA")
    found = evaluate_file(arguments.file, arguments.data, root, trust=arguments.trust)
    print(json.dumps(vars(found), indent=2) if arguments.json else found)
    return 0


def _benchmark(arguments: argparse.Namespace) -> int:
    from greenprune.export import benchmark_inference
    from greenprune.formatting import open_console

    report = benchmark_inference(
        arguments.files,
        batch_size=arguments.batch_size,
        turns=arguments.turns,
        compiled=arguments.compile,
        trust=arguments.trust,
    )
    if arguments.json:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        open_console().print(report)
    return 0


def _carry_out(command: Callable[[argparse.Namespace], int], arguments: argparse.Namespace) -> int:
    """Carry a command out and say in one line why it could not be."""
    from greenprune.config import UserError
    from greenprune.formatting import leave_closed_pipe

    try:
        code = command(arguments)
        sys.stdout.flush()  # here, where a reader that has left can still be told from a failure
    except BrokenPipeError:
        return leave_closed_pipe()
    except (UserError, OSError) as error:
        print_error(error, os.environ)
        return 2 if isinstance(error, UserError) else 1
    except RuntimeError as error:
        from greenprune.checkpoint import CheckpointCorrupt  # loads torch, as commands that raise it have done

        if not isinstance(error, CheckpointCorrupt):
            raise
        print_error(error, os.environ)
        return 1
    return code


def _report(arguments: argparse.Namespace) -> int:
    from greenprune.energy.options import carbon_of
    from greenprune.formatting import format_si
    from greenprune.report.writing import write_report

    with undone_by_ctrl_c():
        path = write_report(arguments.runs, arguments.output, arguments.format, carbon=carbon_of(arguments))
    if path is not None:
        size = f": {format_si(path.stat().st_size, 'B')}" if path.is_file() else ""  # a pipe has none
        print(f"{path} is written{size}")
    return 0


def _watch(arguments: argparse.Namespace) -> int:
    from greenprune.progress import open_display
    from greenprune.watch import watch_run

    display = open_display()
    with undone_by_ctrl_c():
        try:
            ending = watch_run(arguments.run, display, follow=not arguments.once)
        except KeyboardInterrupt:
            ending = "The run goes on."
        finally:
            display.close()
    print(ending)
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from greenprune.verify import verify_run

    findings = verify_run(arguments.run)
    whole = all(finding.good is not False for finding in findings)
    if arguments.json:
        print(json.dumps({"whole": whole, "findings": [vars(finding) for finding in findings]}, indent=2))
    else:
        print(*findings, "The run is whole." if whole else "The run is NOT whole.", sep="\n")
    return 0 if whole else 1


def _sync(arguments: argparse.Namespace) -> int:
    from greenprune.sync import sync_run

    with undone_by_ctrl_c():
        told = sync_run(arguments.run, arguments.to, os.environ, offline=arguments.offline)
    print(told)
    return 0


def _dashboard(arguments: argparse.Namespace) -> int:
    from greenprune.config import UserError
    from greenprune.dashboard import build_workspace, describe_workspace, save_workspace
    from greenprune.tracking import has_wandb_login

    if arguments.entity is None and not arguments.print:
        raise UserError("--entity: not given; expected your W&B user or team, or --print")
    workspace = build_workspace(arguments.entity or "ENTITY", arguments.project)
    if arguments.print:
        print(describe_workspace(workspace))
        return 0
    if not has_wandb_login(os.environ):  # which W&B would ask for
        raise UserError("dashboard: nobody is logged in to W&B; expected a login (wandb login), or --print")
    print(f"{save_workspace(workspace)} is laid out")
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from greenprune.doctor import diagnose, is_fit, print_findings

    findings = diagnose(os.environ)
    if arguments.json:
        print(json.dumps({"fit": is_fit(findings), "findings": [vars(finding) for finding in findings]}, indent=2))
    else:
        print_findings(findings)
    return 0 if is_fit(findings) else 1


def main(argv: list[str] | None = None) -> int:
    """Carry out one command line.

    Args:
        argv: Arguments without the program's name; None: those of the process.

    Returns:
        The exit code.

    Raises:
        SystemExit: Help or the version was asked for (0), or the arguments are wrong (2).
    """
    ready_streams()
    with ended_by_ctrl_c():
        return _main(sys.argv[1:] if argv is None else argv)


def _main(args: list[str]) -> int:
    parser = _build_parser()
    if not args:
        parser.print_help()
        return 0
    if args[0] == "train":
        # Its flags are the fields of the config, which argparse must not touch.
        from greenprune.command import run_command

        return run_command(args[1:], os.environ, "greenprune train")
    if args[0] == "sweep":
        from greenprune.sweep.command import main as sweep

        return sweep(args[1:])
    if args[0] == "measure":
        from greenprune.energy.measure import main as measure

        return measure(args[1:], os.environ)
    arguments = parser.parse_args(args)
    commands = {
        "compare": _compare,
        "report": _report,
        "watch": _watch,
        "verify": _verify,
        "sync": _sync,
        "dashboard": _dashboard,
        "export": _export,
        "eval": _evaluate,
        "infer-bench": _benchmark,
        "doctor": _doctor,
    }
    return _carry_out(commands[arguments.command], arguments)


if __name__ == "__main__":
    sys.exit(main())
