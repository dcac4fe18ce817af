"""Job files: what they say for a site, and what their shell does, run by bash with stand-ins for the programs."""

from __future__ import annotations

import dataclasses
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest

from greenprune.config import ConfigError
from greenprune.sweep.command import job_files
from greenprune.sweep.jobs import Shape, render_job
from greenprune.sweep.plan import SweepConfig
from greenprune.sweep.reading import read_settings
from greenprune.sweep.site import Site
from greenprune.sweep.slurm import array_command, array_numbers, collect_command

ROOT = Path(__file__).parents[2]
HOSTILE = "a b $(touch pwned) `touch pwned` 'q' \"d\" ; touch pwned #%j"


def test_the_files_in_slurm_are_those_of_the_example_site() -> None:
    site = read_settings(ROOT / "slurm" / "site.example.yaml", Site, "site")
    files = job_files(site)
    assert {path.name for path in (ROOT / "slurm").glob("*.sbatch")} == files.keys()
    for name, text in files.items():
        assert (ROOT / "slurm" / name).read_text() == text, f"greenprune sweep jobs slurm writes {name} anew"


def test_the_documentation_names_every_key() -> None:
    text = (ROOT / "docs" / "slurm.md").read_text()
    for cls in (Site, SweepConfig):
        for field in dataclasses.fields(cls):
            assert f"`{field.name}`" in text or f"{field.name}:" in text, field.name


def test_what_a_site_says_is_in_the_head() -> None:
    site = Site(
        account="proj",
        partition="a,b",
        qos="high",
        constraint="[x|y]",
        gres="gpu:h100:{processes}",
        cpus_per_process=4,
        mem_per_process="16G",
        time="1-00:00:00",
        warning_s=300,
    )
    text = render_job("many_nodes", site, Shape(3, 2))
    for option in (
        "nodes=3",
        "ntasks-per-node=1",
        "account=proj",
        "partition=a,b",
        "qos=high",
        "constraint=[x|y]",
        "gres=gpu:h100:2",
        "cpus-per-task=8",
        "mem=32G",
        "time=1-00:00:00",
        "signal=B:USR1@300",
        "requeue",
        "open-mode=append",
    ):
        assert f"#SBATCH --{option}\n" in text
    assert "localhost" not in text
    bare = render_job("collect", Site())
    assert "account" not in bare
    assert "gres" not in render_job("collect", site)


def test_an_exclusive_job_has_whole_nodes_and_its_report_none() -> None:
    """Else tasks that share a node each count the joules of all of it."""
    for kind, wanted in (("array", True), ("single_node", True), ("many_nodes", True), ("collect", False)):
        for exclusive in (True, False):
            lines = render_job(kind, Site(exclusive=exclusive)).splitlines()  # type: ignore[arg-type]
            assert ("#SBATCH --exclusive" in lines) == (wanted and exclusive)


@pytest.mark.parametrize("kind", ["array", "single_node", "many_nodes", "collect"])
@pytest.mark.parametrize("processes", [1, 2])
def test_every_job_is_bash(kind: str, processes: int) -> None:
    site = Site(modules=[HOSTILE], environment={"A": HOSTILE})
    text = render_job(kind, site, Shape(2 if kind == "many_nodes" else 1, processes))  # type: ignore[arg-type]
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)


def test_numbers_of_an_array() -> None:
    assert array_numbers([0, 1, 2, 3], 2) == "0-3%2"
    assert array_numbers([0, 2, 3, 4, 9], 1) == "0,2-4,9%1"


def test_arguments_are_passed_as_they_are(tmp_path: Path) -> None:
    folder = tmp_path / HOSTILE.replace("/", "")
    command = array_command(folder, folder / "array.sbatch", [0, 1], 2)
    assert command[-2:] == [str(folder / "array.sbatch"), str(folder)]
    assert f"--output={folder}/logs/".replace("%j", "%%j") + "%4a.log" in command
    assert "--dependency=afterany:1:2" in collect_command(folder, folder / "collect.sbatch", ["1", "2"])


BAD_SITES = {
    "unknown key": ("acount: a", "acount: unknown key; did you mean account?"),
    "two words": ("account: a b", "account: 'a b' is not valid"),
    "another option": ('partition: "gpu\\n#SBATCH --uid=0"', "partition: "),
    "time": ("time: tomorrow", "time: 'tomorrow' is not valid"),
    "a number as a time": ("warning_s: soon", "warning_s: "),
    "no warning": ("warning_s: 0", "warning_s: 0 is not valid"),
    "memory": ("mem_per_process: much", "mem_per_process: 'much' is not valid"),
    "gres": ("gres: gpu:{gpus}", "gres: 'gpu:{gpus}' is not valid"),
    "exclusive": ("exclusive: user", "exclusive: "),
    "variable": ("environment: {A-B: x}", "environment: 'A-B' is not valid"),
    "secret": ("environment: {WANDB_API_KEY: abc}", "environment: WANDB_API_KEY looks like a secret"),
    "secret as databases name it": ("environment: {PGPASSWORD: abc}", "environment: PGPASSWORD looks like a secret"),
    "secret in a line": ("setup: ['export HF_TOKEN=abc']", "setup: HF_TOKEN looks like a secret"),
    "secret by another name": ("environment: {SMTP_PASS: abc}", "environment: SMTP_PASS looks like a secret"),
    "login": ("environment: {DATABASE_URL: 'postgres://u:abc@h/d'}", "environment: DATABASE_URL holds what looks like"),
    "login in a line": ("setup: [date, 'pip install git+https://abc@h/r']", "setup: line 2 holds what looks like"),
    "flag in a line": ("setup: ['hf login --token abc']", "setup: line 1 holds what looks like"),
    "list": ("modules: cuda", "modules: "),
    "null": ("modules:", "modules: null is not valid; expected a value, or no such line"),
    "no mapping": ("- a", "holds no keys"),
}


@pytest.mark.parametrize("case", BAD_SITES)
def test_what_is_wrong_in_a_site_is_named(case: str, tmp_path: Path) -> None:
    text, message = BAD_SITES[case]
    path = tmp_path / "site.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        read_settings(path, Site, "site")
    assert message in str(error.value)
    assert "site.yaml" in str(error.value)
    assert "abc" not in str(error.value)


def test_what_only_leads_to_a_secret_may_stand_in_a_site() -> None:
    lines = [
        "export http_proxy=http://proxy:3128",
        "pip install git+ssh://git@host/repository",
        'hf login --token "$HF" --add && other --password $(cat ~/.secret) it',
        'curl -H "Authorization: Bearer ${IT}" https://$USER:$IT@host/a',
    ]
    assert Site(setup=lines, environment={"HTTP_PROXY": "http://proxy:3128", "REPO": "ssh://git@host/r"}).setup == lines


# The shell of the jobs.


class Shell:
    """Runs job files with stand-ins for greenprune and Slurm, which write down how they were called."""

    def __init__(self, folder: Path) -> None:
        self.programs = folder / "bin"
        self.programs.mkdir()
        self.called = folder / "called"
        for name in ("bash", "ls", "seq", "sleep", "rm", "touch", "cat", "wc", "tail"):
            (self.programs / name).symlink_to(str(shutil.which(name)))
        self.program("squeue", "echo ${STATE:-RUNNING}")
        self.program("scontrol", ":")
        self.program("module", ":")

    def program(self, name: str, body: str) -> None:
        path = self.programs / name
        path.write_text(f'#!/bin/bash\nprintf "%s|" {name} "$@" >>"{self.called}"; echo >>"{self.called}"\n{body}\n')
        path.chmod(0o755)

    def calls(self) -> list[list[str]]:
        return [line.split("|")[:-1] for line in self.called.read_text().splitlines()] if self.called.exists() else []

    def start(self, text: str, *args: str, **variables: str) -> subprocess.Popen[bytes]:
        job = self.called.with_name("job.sbatch")
        job.write_text(text)
        environment = {"PATH": str(self.programs), "SLURM_JOB_ID": "42"}
        environment |= {"SLURM_ARRAY_JOB_ID": "42", "SLURM_ARRAY_TASK_ID": "7"}  # as the last task of an array has it
        return subprocess.Popen([str(self.programs / "bash"), str(job), *args], env=environment | variables)

    def run(self, text: str, *args: str) -> int:
        return self.start(text, *args).wait(timeout=30)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.01)


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path)


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    folder = tmp_path / HOSTILE.replace("/", "")
    for name in ("configs", "exits"):
        (folder / name).mkdir(parents=True)
    (folder / "configs" / "0007.yaml").write_text("")
    return folder


def test_a_task_runs_its_config_and_leaves_its_exit_code(shell: Shell, sweep: Path) -> None:
    site = Site(modules=[HOSTILE], environment={"SAID": HOSTILE})
    shell.program("greenprune", 'printf "%s" "$SAID" >"$3.said"; exit 3')
    (sweep / "exits" / "0007").write_text("of the attempt before\n")
    assert shell.run(render_job("array", site), str(sweep)) == 3
    config = str(sweep / "configs" / "0007.yaml")
    assert shell.calls() == [["module", "load", HOSTILE], ["greenprune", "train", "--config", config]]
    assert Path(f"{config}.said").read_text() == HOSTILE
    assert (sweep / "exits" / "0007").read_text() == "3\n"
    assert not list(sweep.parent.rglob("pwned"))
    assert not (Path.cwd() / "pwned").exists()


def test_a_config_that_is_seen_late_is_waited_for(shell: Shell, sweep: Path) -> None:
    config = sweep / "configs" / "0007.yaml"
    config.unlink()
    shell.program("greenprune", 'test -e "$3"')
    appear = threading.Timer(1.5, lambda: config.write_text(""))
    appear.start()
    assert shell.run(render_job("array", Site()), str(sweep)) == 0
    appear.join()


STOPS = 'trap "sleep .3; exit 143" TERM; touch "$3.started"; for _ in $(seq 100); do sleep .1; done'


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
@pytest.mark.parametrize(
    ("variables", "requeued"),
    [
        ({}, True),
        ({"SLURM_RESTART_COUNT": "4"}, True),
        ({"SLURM_RESTART_COUNT": "5"}, False),
        ({"STATE": "COMPLETING"}, False),
    ],
)
def test_told_to_stop_it_waits_for_the_program_and_queues_itself(
    shell: Shell, sweep: Path, number: int, variables: dict[str, str], requeued: bool
) -> None:
    shell.program("greenprune", STOPS)
    job = shell.start(render_job("array", Site(requeues=5)), str(sweep), **variables)
    wait_for(sweep / "configs" / "0007.yaml.started")
    job.send_signal(number)
    assert job.wait(timeout=20) == 143
    assert (sweep / "exits" / "0007").read_text() == "143\n"
    asked = [call for call in shell.calls() if call[0] in ("squeue", "scontrol")]
    assert not any("42" in word.split("=") for call in asked for word in call)  # that would be all tasks of the array
    assert (["scontrol", "requeue", "42_7"] in asked) == requeued


@pytest.mark.parametrize(("kind", "code"), [("interrupt", 143), ("train", 1), ("", 1)])
def test_of_several_processes_the_exit_code_is_that_of_their_stop(
    shell: Shell, sweep: Path, kind: str, code: int
) -> None:
    """A launcher ends with 1 whatever ended its processes; what an attempt before recorded is none of this one."""
    events = sweep / "runs" / "0007-it" / "events.jsonl"
    events.parent.mkdir(parents=True)
    events.write_text('{"time": 1.0, "step": 2, "kind": "interrupt"}\n')
    line = f'{{"time": 1.0, "step": 3, "kind": "{kind}"}}\n' if kind else ""
    (sweep / "recorded").write_text(line)
    find = "sweep=${!#}; sweep=${sweep%/configs/*}"
    shell.program("accelerate", f'{find}; cat "$sweep"/recorded >>"$sweep"/runs/*/events.jsonl; exit 1')
    assert shell.run(render_job("array", Site(), Shape(1, 2)), str(sweep)) == 1
    assert (sweep / "exits" / "0007").read_text() == f"{code}\n"


def test_a_job_that_is_no_array_queues_itself(shell: Shell, tmp_path: Path) -> None:
    shell.program("greenprune", STOPS)
    config = tmp_path / "config.yaml"
    alone = {"SLURM_ARRAY_JOB_ID": "", "SLURM_ARRAY_TASK_ID": ""}
    job = shell.start(render_job("single_node", Site()), "--config", str(config), **alone)
    wait_for(Path(f"{config}.started"))
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=20) == 143
    assert ["scontrol", "requeue", "42"] in shell.calls()


def test_one_that_ends_by_itself_is_not_queued_again(shell: Shell, sweep: Path) -> None:
    for code in (0, 1):
        shell.program("greenprune", f"exit {code}")
        assert shell.run(render_job("array", Site()), str(sweep)) == code
    assert not any(call[0] == "scontrol" for call in shell.calls())


def test_one_that_finishes_although_told_to_stop_is_done(shell: Shell, sweep: Path) -> None:
    shell.program("greenprune", 'trap : TERM; touch "$3.started"; sleep 1; sleep 1; exit 0')
    job = shell.start(render_job("array", Site()), str(sweep))
    wait_for(sweep / "configs" / "0007.yaml.started")
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=20) == 0
    assert not any(call[0] == "scontrol" for call in shell.calls())


def test_what_a_line_of_setup_sources_or_sets_does_not_reach_the_job(shell: Shell, sweep: Path, tmp_path: Path) -> None:
    """A script that is sourced has the job's arguments for its own; -e would end the shell as a signal ends wait."""
    (tmp_path / "activate").write_text('printf "%s" "$#" >"$WHERE/given"\nset -- its own\n')
    shell.program("greenprune", STOPS)
    site = Site(environment={"WHERE": str(tmp_path)}, setup=["set -euo pipefail", 'source "$WHERE/activate"'])
    job = shell.start(render_job("array", site), str(sweep))
    wait_for(sweep / "configs" / "0007.yaml.started")
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=20) == 143
    assert (tmp_path / "given").read_text() == "0"
    assert (sweep / "exits" / "0007").read_text() == "143\n"
    assert ["scontrol", "requeue", "42_7"] in shell.calls()


@pytest.mark.parametrize("busy", ["squeue", "scontrol"])
def test_a_controller_that_does_not_answer_at_once_is_asked_again(
    shell: Shell, sweep: Path, tmp_path: Path, busy: str
) -> None:
    shell.program("greenprune", STOPS)
    first = f'[ -e "{tmp_path}/asked" ] || {{ touch "{tmp_path}/asked"; exit 1; }}'
    shell.program(busy, f"{first}; echo RUNNING")
    job = shell.start(render_job("array", Site()), str(sweep))
    wait_for(sweep / "configs" / "0007.yaml.started")
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=20) == 143
    asked = [call[0] for call in shell.calls() if call[0] in ("squeue", "scontrol")]
    expected = {"squeue": ["squeue", "squeue", "scontrol"], "scontrol": ["squeue", "scontrol"] * 2}
    assert asked == expected[busy]


def test_the_user_s_own_defaults_do_not_hide_the_job(shell: Shell, sweep: Path) -> None:
    shell.program("greenprune", STOPS)
    shell.program("squeue", 'echo "${SQUEUE_STATES:-COMPLETING}"')
    job = shell.start(render_job("array", Site()), str(sweep), SQUEUE_STATES="RUNNING")
    wait_for(sweep / "configs" / "0007.yaml.started")
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=20) == 143
    assert not any(call[0] == "scontrol" for call in shell.calls())


def test_a_job_submitted_by_an_array_s_task_queues_itself_and_not_that_task(shell: Shell, tmp_path: Path) -> None:
    """Slurm leaves the array's variables in the environment of what its task submits."""
    shell.program("greenprune", f'[ -z "${{SLURM_ARRAY_JOB_ID:-}}" ] || exit 9\n{STOPS}')
    config = tmp_path / "config.yaml"
    job = shell.start(render_job("single_node", Site()), "--config", str(config))
    wait_for(Path(f"{config}.started"))
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=20) == 143
    assert ["scontrol", "requeue", "42"] in shell.calls()


@pytest.mark.parametrize(
    ("time_limit", "warning_s", "valid"),
    [
        ("1", 60, False),
        ("1", 59, True),
        ("2:30", 150, False),
        ("0:02:31", 150, True),
        ("1-0", 65535, True),
        ("0-0:02", 120, False),
        ("0", 120, True),  # without a limit
    ],
)
def test_a_warning_comes_after_the_start(time_limit: str, warning_s: int, valid: bool) -> None:
    """Told to stop as it starts, a job would queue itself again and again and never train."""
    if valid:
        Site(time=time_limit, warning_s=warning_s)
        return
    with pytest.raises(ConfigError, match=f"warning_s: {warning_s} is not valid; expected fewer .*time {time_limit}"):
        Site(time=time_limit, warning_s=warning_s)


@pytest.mark.parametrize("time_limit", ["4:00:00", "04:00:00", "90:00", "1-0"])
def test_a_time_needs_no_quotes(tmp_path: Path, time_limit: str) -> None:
    """YAML 1.1 takes some of them for numbers to the base of sixty."""
    path = tmp_path / "site.yaml"
    path.write_text(f"time: {time_limit}\n")
    assert read_settings(path, Site, "site").time == time_limit
