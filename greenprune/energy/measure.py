"""Measure a command: run it, pass its signals and its exit code on, and say what joules it took.

Linux only: signals are waited for with their sender, to tell a Ctrl-C, which the terminal has already sent to the
command, from a signal that only this process got.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import shlex
import signal
import stat
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TextIO

from greenprune.config import EnergyConfig, UserError
from greenprune.energy import CarbonIntensity, Measurement, co2_g, format_intensity, open_local_meter
from greenprune.energy.options import add_carbon_options, by_options, carbon_of
from greenprune.redaction import print_error, without_command_secrets, without_secrets
from greenprune.whole_files import write_output

_DESCRIPTION = """\
Run a command and say what energy the GPUs that it can see, the CPU and the memory of this machine took meanwhile.
The figures include what other processes do on the same devices. The report goes to standard error, the command keeps
its own input and output, and its exit code is passed on; a report that cannot be written makes a 0 a 1."""

_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)

_IGNORED_BY_PYTHON = (signal.SIGPIPE, signal.SIGXFSZ)

# si_code of a signal that the kernel sent, such as the terminal's on Ctrl-C, to the whole foreground group.
_SI_KERNEL = 0x80

# Who signals a process and then its group, as timeout does, sends the second one within milliseconds.
_ECHO_S = 0.3
_LOOK_S = 0.02


class _Parser(argparse.ArgumentParser):
    """A parser whose complaints are one line."""

    def error(self, message: str) -> NoReturn:
        told = without_secrets(message, os.environ)
        self.exit(2, f"{self.prog}: error: {told}; see {self.prog} --help\n")


def main(args: Sequence[str], environment: Mapping[str, str], prog: str = "greenprune measure") -> int:
    """Measure the command on a command line.

    Args:
        args: Arguments without the program's name: options, ``--`` and the command.
        environment: The process's environment, which the command gets.
        prog: Program name for the help text.

    Returns:
        The command's exit code; 128 + n if signal n ended it, 126 or 127 if it could not be started, 2 if the
        arguments are wrong, 1 if all went well but the report cannot be written.

    Raises:
        SystemExit: Help was asked for (0), or the arguments are wrong (2).
    """
    options, command = _parse(args, prog)
    if not hasattr(signal, "sigwaitinfo"):
        print_error("this system cannot tell who sent a signal; measure works on Linux", environment, prog)
        return 2
    shown = without_command_secrets(command, environment)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # one that was inherited as ignored would never be told
    with contextlib.ExitStack() as stack:
        # Before anything is imported that starts threads (NumPy's linear algebra): signals would reach those.
        mask = _hold_back(stack, signal.SIGCHLD, *_FORWARDED)
        try:
            EnergyConfig(interval_s=options.interval)
            carbon = carbon_of(options)
        except UserError as error:
            print_error(by_options(error), environment, prog)
            return 2
        with open_local_meter(environment, interval_s=options.interval) as meter:
            if _is_to_end():  # by what came while the meter was opened, as soon as that is let through
                return 1
            with meter.window("command") as window:
                try:
                    # Not subprocess: it cannot give the command back the signals that are blocked here without
                    # running Python code between fork and exec, which is not safe beside the meter's thread.
                    process = os.posix_spawnp(
                        command[0], command, dict(environment), setsigmask=mask, setsigdef=_IGNORED_BY_PYTHON
                    )
                except OSError as error:
                    print_error(f"{command[0]}: {error.strerror}", environment, prog)
                    return 127 if isinstance(error, FileNotFoundError) else 126
                code, was_signalled = _wait(process)
            notes = meter.notes
        # A signal that comes once more would end this process before or while it tells the report.
        echo_until = time.monotonic() + _ECHO_S
        report = _report(window.measurement, shown, code, carbon, notes)
        with _ended_by_signals(after=echo_until):
            told = _tell(report, options, environment, prog)
        if was_signalled:
            _drop_signals(echo_until)
    return code if told else code or 1


def _tell(report: dict[str, Any], options: argparse.Namespace, environment: Mapping[str, str], prog: str) -> bool:
    """Write the report where it was asked for, and say where that was not possible; whether it was everywhere."""
    failures = []
    if options.output is not None:
        try:
            write_output(options.output, json.dumps(report, indent=2) + "\n")
        except OSError as error:
            failures.append(f"--output: {str(options.output)!r}: {error.strerror}")
    try:
        if options.json:
            _print(json.dumps(report), sys.stdout)
        else:
            _print(_text(report), sys.stderr)
    except OSError as error:
        where = "--json: cannot write to standard output" if options.json else "cannot write to standard error"
        failures.append(f"{where}: {error.strerror}")
    for failure in failures:
        with contextlib.suppress(OSError):  # there is no other place to say it
            print_error(failure, environment, prog)
    return not failures


def _print(text: str, stream: TextIO | None) -> None:
    """Print a text now, unless nobody is there to read it: the stream is closed, or its pipe or terminal is gone.

    Raises:
        OSError: It cannot be written for another reason.
    """
    if stream is None:  # which print takes for standard output
        return
    try:
        print(text, file=stream, flush=True)
    except OSError as error:
        is_terminal = stat.S_ISCHR(os.fstat(stream.fileno()).st_mode)
        # What is left in the buffer would fail once more as Python ends, with an exit code of its own.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        if error.errno != errno.EPIPE and not (error.errno == errno.EIO and is_terminal):
            raise


def _parse(args: Sequence[str], prog: str) -> tuple[argparse.Namespace, list[str]]:
    parser = _Parser(
        prog=prog,
        usage=f"{prog} [options] -- COMMAND ...",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print one line of JSON to standard output at the end")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the JSON to a file as well")
    parser.add_argument(
        "--interval", type=float, default=1.0, metavar="S", help="seconds between two samples where there is no counter"
    )
    add_carbon_options(parser)
    known = list(args)
    split = known.index("--") if "--" in known else len(known)
    (options, unknown), command = parser.parse_known_args(known[:split]), known[split + 1 :]
    if not command:
        parser.error("there is no command; expected it after --, as in: -- python train.py")
    if unknown:
        parser.error(f"{unknown[0]!r} is not an option; the command starts after --")
    if options.output is not None and not options.output.absolute().parent.is_dir():
        parser.error(f"--output: the folder of {str(options.output)!r} is not there; expected a file in one that is")
    return options, command


def _hold_back(stack: contextlib.ExitStack, *signals: signal.Signals) -> set[int]:
    """Hold signals back until a stack is closed, in this thread and those it starts, and tell what was held before."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    stack.callback(signal.pthread_sigmask, signal.SIG_SETMASK, before)
    return {int(number) for number in before}


def _ending() -> set[signal.Signals]:
    """What of the signals that are held back would end this process; some it may have been started to ignore."""
    return {number for number in _FORWARDED if signal.getsignal(number) is not signal.SIG_IGN}


def _is_to_end() -> bool:
    """Whether a signal is held back that ends this process once it is let through."""
    return bool(signal.sigpending() & _ending())


@contextlib.contextmanager
def _ended_by_signals(after: float) -> Iterator[None]:
    """Within, a signal that is held back ends this process, which tells a report that nobody may be reading.

    Not one that comes before a moment (of the monotonic clock): the command had it too.
    """
    done = threading.Event()

    def look() -> None:
        _drop_signals(after, done)
        while not done.wait(_LOOK_S):
            if (caught := signal.sigtimedwait(_ending(), 0)) is not None:
                os._exit(128 + caught.si_signo)

    looking = threading.Thread(target=look, daemon=True)
    looking.start()
    try:
        yield
    finally:
        done.set()
        looking.join()


def _drop_signals(until: float, done: threading.Event | None = None) -> None:
    """Take signals that are held back, for nothing, until a moment of the monotonic clock or something is done."""
    while (left := until - time.monotonic()) > 0 and not (done and done.is_set()):
        signal.sigtimedwait(_ending(), min(left, _LOOK_S))


def _wait(process: int) -> tuple[int, bool]:
    """Wait for a child and hand it the signals that come meanwhile.

    Returns:
        Its exit code, or 128 + n if signal n ended it; and whether there were signals.
    """
    was_signalled = False
    watcher = threading.Thread(target=_signal_end, args=(process, threading.get_ident()), daemon=True)
    watcher.start()
    while True:
        caught = signal.sigwaitinfo({signal.SIGCHLD, *_FORWARDED})
        if caught.si_signo == signal.SIGCHLD:
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                watcher.join()
                code = os.waitstatus_to_exitcode(status)
                return (code if code >= 0 else 128 - code), was_signalled
            continue
        was_signalled = True
        if caught.si_code != _SI_KERNEL:
            os.kill(process, caught.si_signo)  # not reaped yet, so the number is still the child's


def _signal_end(process: int, thread: int) -> None:
    """Send a thread SIGCHLD once a child has ended; does not reap it.

    The kernel's own SIGCHLD is for the whole process: a thread that does not block it, such as one of a library that
    was imported before, takes it, and nobody would learn of a child that ended before it was waited for.
    """
    with contextlib.suppress(ChildProcessError):  # reaped already, on the kernel's signal
        os.waitid(os.P_PID, process, os.WEXITED | os.WNOWAIT)
    signal.pthread_kill(thread, signal.SIGCHLD)


def _report(
    measured: Measurement, command: list[str], code: int, carbon: CarbonIntensity | None, notes: Sequence[str]
) -> dict[str, Any]:
    """What was measured, as plain values; unknown is None."""
    energy_j = measured.energy_j
    return {
        "command": command,
        "exit_code": code,
        "time_s": measured.seconds,
        "energy_j": energy_j,
        "energy_bound_j": measured.bound_j,
        "energy_quality": measured.quality,
        "energy_complete": measured.complete,
        "power_w": None if energy_j is None else energy_j / measured.seconds,
        "devices": [
            {
                "device": reading.device,
                "model": reading.model,
                "source": reading.source,
                "quality": reading.quality,
                "energy_j": reading.joules,
                "energy_bound_j": reading.bound_j,
                "reason": reading.reason,
            }
            for reading in measured.readings
        ],
        "co2_g": co2_g(energy_j, carbon),
        "carbon_intensity_g_per_kwh": carbon.g_per_kwh if carbon else None,
        "carbon_intensity_source": carbon.source if carbon else None,
        "pue": carbon.pue if carbon else None,
        "notes": list(notes),
    }


def _text(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = [f"measured: {shlex.join(report['command'])}"]
    for device in report["devices"]:
        name = device["device"] if device["model"] is None else f"{device['device']} {device['model']}"
        how = f"{device['quality']}: {device['source']}" if device["quality"] else "not measured"
        why = f"; {device['reason']}" if device["reason"] else ""
        lines.append(f"  {_joules(device['energy_j'], device['energy_bound_j']):>22}  {name} ({how}{why})")
    least = "" if report["energy_complete"] or report["energy_j"] is None else "at least "
    total = f"{least}{_joules(report['energy_j'], report['energy_bound_j'])}"
    if report["energy_j"] is not None:
        total += f" ({report['energy_quality']}), {report['power_w']:.1f} W on average"
    lines.append(f"  total: {total}, {_number(report['time_s'])} s")
    if report["co2_g"] is not None:
        lines.append(
            f"  CO2e: {report['co2_g']:.3g} g, at {format_intensity(report['carbon_intensity_g_per_kwh'])} "
            f"({report['carbon_intensity_source']}) and a PUE of {report['pue']:g}"
        )
    lines += [f"  note: {note}" for note in report["notes"]]
    return "\n".join(lines)


def _joules(energy_j: float | None, bound_j: float | None) -> str:
    if energy_j is None:
        return "unknown"
    return f"{_number(energy_j)} J" if bound_j is None else f"{_number(energy_j)} J ± {bound_j:,.2f}"


def _number(value: float) -> str:
    """To two decimals, but never 0.00 for what is more than nothing."""
    return f"{value:,.2f}" if value == 0 or abs(value) >= 0.1 else f"{value:.3g}"
