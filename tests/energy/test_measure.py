"""Measuring a command: what it prints, what it passes on, and what it leaves alone."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

MEASURE = [sys.executable, "-W", "error", "-m", "greenprune.energy"]
GREENPRUNE = [sys.executable, "-W", "error", "-m", "greenprune.cli", "measure"]
A, B = "GPU-aaaa", "GPU-bbbb"


def with_stub(nvml_stub: Path, scenario: str, **environment: str) -> dict[str, str]:
    return {**os.environ, "LD_LIBRARY_PATH": str(nvml_stub), "NVML_STUB": scenario, **environment}


def run(*args: str, program: list[str] = MEASURE, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*program, *args], capture_output=True, text=True, timeout=60, check=False, **options)  # type: ignore[call-overload, no-any-return]


@pytest.mark.parametrize("program", [MEASURE, GREENPRUNE], ids=["python -m greenprune.energy", "greenprune measure"])
def test_the_visible_gpus_are_metered_and_the_commands_output_is_its_own(nvml_stub: Path, program: list[str]) -> None:
    scenario = f"uuid={A} watts=200 name=H100 limit=300;uuid={B} watts=900"
    environment = with_stub(nvml_stub, scenario, CUDA_VISIBLE_DEVICES="0")
    done = run("--", "sh", "-c", "cat; sleep 0.5; exit 3", program=program, env=environment, input="as it was")
    assert done.returncode == 3
    assert done.stdout == "as it was"
    (gpu,) = [line for line in done.stderr.splitlines() if A in line]
    assert "H100" in gpu
    assert "counter: NVML energy counter" in gpu
    (total,) = [line for line in done.stderr.splitlines() if "total:" in line]
    seconds = float(total.split(", ")[-1].removesuffix(" s"))
    assert seconds >= 0.5
    assert float(gpu.split()[0].replace(",", "")) == pytest.approx(200 * seconds, rel=0.05)
    assert "± 30.00" in gpu
    assert B not in done.stderr
    assert any(line.split()[2:3] == ["cpu"] for line in done.stderr.splitlines())


def test_json_has_every_device_with_source_quality_and_reason(nvml_stub: Path, tmp_path: Path) -> None:
    scenario = f"uuid={A} watts=200 counter=0 limit=300;uuid={B} mig=1"
    args = ["--json", "--output", str(tmp_path / "it.json"), "--intensity", "100", "--pue", "1.5", "--interval", "0.05"]
    done = run(*args, "--", "sleep", "0.5", env=with_stub(nvml_stub, scenario))
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert json.loads((tmp_path / "it.json").read_text()) == report
    assert report["command"] == ["sleep", "0.5"]
    gpu, divided = report["devices"][:2]
    assert gpu["energy_j"] == pytest.approx(200 * report["time_s"], rel=0.02)
    assert (gpu["device"], gpu["quality"], gpu["source"]) == (A, "integrated power", "NVML power samples")
    assert gpu["energy_bound_j"] == 300
    assert (divided["device"], divided["energy_j"], divided["quality"]) == (B, None, None)
    assert "MIG" in divided["reason"]
    assert not report["energy_complete"]
    assert report["energy_j"] == pytest.approx(sum(device["energy_j"] or 0 for device in report["devices"]))
    assert report["power_w"] == pytest.approx(report["energy_j"] / report["time_s"])
    assert report["co2_g"] == pytest.approx(report["energy_j"] * 1.5 / 3.6e6 * 100)
    assert (report["carbon_intensity_g_per_kwh"], report["carbon_intensity_source"]) == (100, "given")
    assert any("MIG" in note for note in report["notes"])


def test_secrets_in_the_command_are_left_out(tmp_path: Path) -> None:
    """The command itself gets them as they are."""
    secret, address = "pl4nted-0123456789", "https://me:hunter22@example.org"
    command = [sys.executable, "-c", "import sys; print(*sys.argv[1:])", f"--key={secret}", address]
    environment = {**os.environ, "DB_PASSWORD": secret}
    for flags in (["--output", str(tmp_path / "it.json")], ["--json"]):
        done = run(*flags, "--", *command, env=environment)
        output, *report = done.stdout.splitlines()
        assert output == f"--key={secret} {address}"
        told = done.stderr + "".join(report) + (tmp_path / "it.json").read_text()
        assert "--key=***" in told
        assert secret not in told
        assert "hunter22" not in told
    missing = run("--", f"/{secret}", env=environment)
    assert (missing.returncode, secret in missing.stderr) == (127, False)


def test_what_a_short_command_took_is_not_told_as_nothing() -> None:
    (total,) = [line for line in run("--", "true").stderr.splitlines() if line.startswith("  total: ")]
    found = re.fullmatch(r"  total: (\S+) J \(estimate\), .*, (\S+) s", total)
    assert found is not None
    assert all(float(figure) > 0 for figure in found.groups())


def test_what_libraries_print_while_they_are_imported_is_not_in_the_output(tmp_path: Path) -> None:
    """As amdsmi does where AMD's library is missing."""
    (tmp_path / "amdsmi").mkdir()
    (tmp_path / "amdsmi" / "__init__.py").write_text(
        "print('cannot find libamd_smi.so')\nraise ImportError('amdsmi')\n"
    )
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    done = run("--json", "--", "true", env={**os.environ, "PYTHONPATH": path})
    assert json.loads(done.stdout)["devices"]


def test_a_report_that_cannot_be_written_does_not_hide_the_commands_exit_code(tmp_path: Path) -> None:
    done = run("--output", str(tmp_path), "--", "sh", "-c", "exit 5")
    assert done.returncode == 5
    assert f"--output: {str(tmp_path)!r}: Is a directory" in done.stderr
    assert "total:" in done.stderr


def test_a_report_that_does_not_fit_leaves_the_earlier_one(tmp_path: Path, files_of_at_most: Any) -> None:
    output = tmp_path / "it.json"
    output.write_text("the earlier report")
    with files_of_at_most(100):
        done = run("--output", str(output), "--", "true")
    assert f"error: --output: {str(output)!r}: File too large\n" in done.stderr
    assert output.read_text() == "the earlier report"
    assert os.listdir(tmp_path) == ["it.json"]


def test_a_report_goes_to_a_pipe() -> None:
    done = run("--output", "/dev/stdout", "--", "echo", "its own")
    assert done.returncode == 0
    own, report = done.stdout.split("\n", 1)
    assert own == "its own"
    assert json.loads(report)["command"] == ["echo", "its own"]


@pytest.mark.parametrize("buffered", ["", "1"], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize(("code", "passed_on"), [(0, 1), (5, 5)])
def test_json_that_does_not_fit_is_told(code: int, passed_on: int, buffered: str) -> None:
    command = [*MEASURE, "--json", "--", "sh", "-c", f"exit {code}"]
    with Path("/dev/full").open("w") as full:
        environment = {**os.environ, "PYTHONUNBUFFERED": buffered}
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False, env=environment)
    reason = "--json: cannot write to standard output: No space left on device"
    assert done.stderr == f"python -m greenprune.energy: error: {reason}\n"
    assert done.returncode == passed_on


@pytest.mark.parametrize(("code", "passed_on"), [(0, 1), (5, 5)])
def test_a_lost_report_is_a_failure_unless_the_command_has_one(tmp_path: Path, code: int, passed_on: int) -> None:
    command = ["--", "sh", "-c", f"exit {code}"]
    with Path("/dev/full").open("w") as full:
        assert subprocess.run([*MEASURE, *command], stderr=full, check=False).returncode == passed_on
    assert run("--output", str(tmp_path), *command).returncode == passed_on


@pytest.mark.parametrize("buffered", ["", "1"], ids=["buffered", "unbuffered"])
def test_a_reader_that_has_gone_is_no_failure(buffered: str) -> None:
    options: dict[str, Any] = {"text": True, "env": {**os.environ, "PYTHONUNBUFFERED": buffered}}
    command = [*MEASURE, "--json", "--", "sleep", "0.2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0


def test_a_terminal_that_has_gone_is_no_failure() -> None:
    ours, its = pty.openpty()
    command = [*MEASURE, "--json", "--", "sleep", "0.2"]
    with subprocess.Popen(command, stdout=its, stderr=subprocess.PIPE, text=True) as process:
        os.close(its)
        os.close(ours)
        assert process.stderr is not None
        assert process.stderr.read() == ""
    assert process.returncode == 0


def test_a_report_for_a_closed_standard_error_is_not_in_the_commands_output() -> None:
    closed = ["sh", "-c", 'exec "$@" 2>&-', "sh"]
    done = run("--", "echo", "its own", program=[*closed, *MEASURE])
    assert (done.returncode, done.stdout) == (0, "its own\n")


def test_gpus_that_should_be_there_and_are_not_are_unknown(nvml_stub: Path) -> None:
    done = run("--json", "--", "true", env=with_stub(nvml_stub, "", CUDA_VISIBLE_DEVICES="0"))
    gpu = json.loads(done.stdout)["devices"][0]
    assert (gpu["device"], gpu["energy_j"]) == ("gpu", None)
    assert "Driver Not Loaded" in gpu["reason"]
    nothing = run("--json", "--", "true", env=with_stub(nvml_stub, f"uuid={A}", CUDA_VISIBLE_DEVICES="5"))
    report = json.loads(nothing.stdout)
    assert not any(device["device"].startswith("GPU") for device in report["devices"])
    assert any("'5' names none" in note for note in report["notes"])
    hidden = run("--json", "--", "true", env=with_stub(nvml_stub, f"uuid={A}", CUDA_VISIBLE_DEVICES=""))
    assert not any("gpu" in line.lower() for line in hidden.stdout.split('"notes"')[0].splitlines())


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (["sh", "-c", "exit 0"], 0),
        (["sh", "-c", "exit 77"], 77),
        (["sh", "-c", "kill -KILL $$"], 128 + 9),
        (["sh", "-c", "kill -TERM $$"], 128 + 15),
        (["no-such-program"], 127),
        (["/"], 126),
    ],
)
def test_the_exit_code_is_the_commands(command: list[str], code: int) -> None:
    done = run("--", *command)
    assert done.returncode == code
    assert len(done.stderr.strip().splitlines()) == 1 if code in (126, 127) else "total:" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_signals_are_handed_on_once(tmp_path: Path, number: signal.Signals) -> None:
    program = f"""
import signal, sys, time
got = []
signal.signal({int(number)}, lambda *_: got.append(1))
open({str(tmp_path / "ready")!r}, "w").close()
deadline = time.monotonic() + 20
while not got and time.monotonic() < deadline:
    time.sleep(0.01)
time.sleep(0.3)
sys.exit(40 + len(got))
"""
    process = subprocess.Popen(
        [*MEASURE, "--", sys.executable, "-c", program], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while not (tmp_path / "ready").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(number)
    _, text = process.communicate(timeout=30)
    assert process.returncode == 41
    assert "total:" in text


@pytest.mark.parametrize("gap_s", [0, 0.001, 0.02])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_that_comes_twice_does_not_take_the_report_away(
    tmp_path: Path, number: signal.Signals, gap_s: float
) -> None:
    """As ``timeout`` sends it: to the process and then to its group."""
    ready, output = tmp_path / "ready", tmp_path / "it.json"
    command = ["sh", "-c", f"touch {shlex.quote(str(ready))}; exec sleep 30"]
    started = [*GREENPRUNE, "--json", "--output", str(output), "--", *command]
    with subprocess.Popen(started, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        while not ready.exists() and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(number)
        time.sleep(gap_s)
        with contextlib.suppress(ProcessLookupError):  # all of them have ended
            os.killpg(process.pid, number)
        told, _ = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert json.loads(told) == json.loads(output.read_text())
    assert json.loads(told)["exit_code"] == 128 + number


def test_a_report_that_nobody_reads_can_be_ended(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    begun, output = tmp_path / "begun", str(tmp_path / "pipe")
    with subprocess.Popen([*MEASURE, "--output", output, "--", "touch", str(begun)]) as process:
        deadline = time.monotonic() + 30
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.2)
            if begun.exists():
                process.terminate()
        process.kill()
    assert process.returncode == 128 + signal.SIGTERM


def code_after_ctrl_c(command: list[str], *, once_it_says: bytes) -> int:
    """Exit code of a command that gets a Ctrl-C from a terminal of its own, once a word has come there."""
    process, terminal = pty.fork()
    if process == 0:
        os.execv(command[0], command)
    shown = b""
    while once_it_says not in shown:
        shown += os.read(terminal, 1000)
    os.write(terminal, b"\x03")
    _, status = os.waitpid(process, 0)
    os.close(terminal)
    return os.waitstatus_to_exitcode(status)


def test_ctrl_c_at_a_terminal_reaches_the_command_once() -> None:
    """The terminal signals the whole foreground group: handed on, it would come twice."""
    program = (
        "import signal, sys, time\n"
        "got = []\n"
        "signal.signal(signal.SIGINT, lambda *_: got.append(1))\n"
        "print('ready', flush=True)\n"
        "deadline = time.monotonic() + 20\n"
        "while not got and time.monotonic() < deadline: time.sleep(0.01)\n"
        "time.sleep(0.3)\n"
        "sys.exit(40 + len(got))\n"
    )
    assert code_after_ctrl_c([*MEASURE, "--", sys.executable, "-c", program], once_it_says=b"ready") == 41


OPENING = """
import sys, time
from greenprune.cli import main
from greenprune.energy import measure
opened = measure.open_local_meter
def open_slowly(*args, **options):
    print("opening", flush=True)
    time.sleep(1)
    return opened(*args, **options)
measure.open_local_meter = open_slowly
sys.exit(main(["measure", "--", "touch", sys.argv[1]]))
"""


def test_ctrl_c_before_the_command_has_begun_keeps_it_from_it(tmp_path: Path) -> None:
    """The terminal has sent it to nobody but the meter, which holds signals back by then."""
    command = [sys.executable, "-c", OPENING, str(tmp_path / "begun")]
    assert code_after_ctrl_c(command, once_it_says=b"opening") == -signal.SIGINT
    assert not (tmp_path / "begun").exists()


BESIDE_A_THREAD = """
import os, sys, threading, time
threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
from greenprune.cli import main
spawned = os.posix_spawnp
def spawn_slowly(*args, **options):
    process = spawned(*args, **options)
    os.waitid(os.P_PID, process, os.WEXITED | os.WNOWAIT)
    time.sleep(0.2)
    return process
os.posix_spawnp = spawn_slowly
sys.exit(main(["measure", "--", "sh", "-c", "exit 3"]))
"""


def test_a_command_that_ends_at_once_is_seen_beside_a_thread_that_takes_its_signal() -> None:
    """The thread does not block SIGCHLD, as those of a library that was imported before; the command ends before it is
    waited for, as on a busy machine."""
    done = subprocess.run([sys.executable, "-c", BESIDE_A_THREAD], capture_output=True, timeout=60, check=False)
    assert done.returncode == 3


def test_no_signal_can_reach_a_thread_of_a_library_instead() -> None:
    """The carbon intensity of a country comes by way of NumPy, which starts threads; they are listed after the main
    one, which waits for the signals."""
    show = ["sh", "-c", "grep -h SigBlk /proc/$PPID/task/*/status"]
    done = run("--country", "FRA", "--", *show, env={**os.environ, "OMP_NUM_THREADS": "2"})
    _, *others = [int(line.split()[1], 16) for line in done.stdout.splitlines()]
    assert others
    assert all(mask >> (signal.SIGTERM - 1) & 1 for mask in others)


def test_the_command_starts_with_the_signals_that_it_would_have_had() -> None:
    def blocked_and_ignored(status: str) -> list[int]:
        # Signals 32 and 33 are the C library's own.
        return [int(line.split()[1], 16) & 0x7FFFFFFF for line in status.splitlines()]

    fields = ["sh", "-c", "grep -E 'Sig(Blk|Ign)' /proc/self/status"]
    alone = subprocess.run(fields, capture_output=True, text=True, check=True).stdout
    assert blocked_and_ignored(run("--", *fields).stdout) == blocked_and_ignored(alone)
    assert len(blocked_and_ignored(alone)) == 2


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        ([], ["no command", "after --"]),
        (["sleep", "1"], ["no command", "after --"]),
        (["--wat", "--", "true"], ["'--wat' is not an option"]),
        (["--pue", "0.5", "--", "true"], ["--pue: 0.5", "at least 1"]),
        (["--pue", "1.5", "--", "true"], ["--pue: 1.5", "--country or --intensity"]),
        (["--interval", "0", "--", "true"], ["--interval: 0.0", "above 0"]),
        (["--country", "XYZ", "--", "true"], ["--country: 'XYZ'", "three-letter"]),
        (["--country", "FRA", "--intensity", "5", "--", "true"], ["--intensity: 5.0", "--country (FRA)"]),
        (["--output", "/no/such/folder/x", "--", "true"], ["--output", "/no/such/folder/x"]),
    ],
)
def test_wrong_arguments_are_one_line_and_nothing_is_run(args: list[str], parts: list[str]) -> None:
    done = run(*args)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    for part in parts:
        assert part in done.stderr
    assert done.stdout == ""
