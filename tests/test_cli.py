"""The greenprune command, as a process."""

from __future__ import annotations

import errno
import importlib.metadata
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "report"))
from recording import record_run

from greenprune.cli import main


def greenprune(*args: str, cwd: Path, **more: str) -> subprocess.CompletedProcess[str]:
    left_out = ("GREENPRUNE_DATA", "FORCE_COLOR", "TTY_COMPATIBLE")
    environment = {key: value for key, value in os.environ.items() if key not in left_out}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | more
    command = [sys.executable, "-m", "greenprune.cli", *args]
    return subprocess.run(command, check=False, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("args", [[], ["--help"]])
def test_help_explains_the_program(tmp_path: Path, args: list[str]) -> None:
    done = greenprune(*args, cwd=tmp_path)
    assert done.returncode == 0
    for word in ("train ", "compare ", "doctor ", "examples:", "greenprune train --config", "greenprune compare runs/"):
        assert word in done.stdout
    assert "usage: greenprune COMMAND" in done.stdout


def test_help_loads_nothing_heavy() -> None:
    code = "import sys, greenprune.cli; print([m for m in ('torch', 'rich', 'jsonargparse') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_version(tmp_path: Path) -> None:
    done = greenprune("--version", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"greenprune {importlib.metadata.version('greenprune')}\n")


@pytest.mark.parametrize("args", [["tarin"], ["--nonsense"], ["compare"], ["doctor", "--nonsense"]])
def test_wrong_arguments_are_one_line(tmp_path: Path, args: list[str]) -> None:
    done = greenprune(*args, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("greenprune: error: ")
    assert done.stderr.count("\n") == 1
    assert "--help" in done.stderr


def test_compare_names_a_path_that_is_no_run(tmp_path: Path) -> None:
    done = greenprune("compare", "nowhere", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("greenprune: error: RUN: 'nowhere' does not exist")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("command", ["compare", "report", "watch", "sync", "verify"])
def test_a_path_that_no_system_takes_is_one_line(capsys: pytest.CaptureFixture[str], command: str) -> None:
    assert main([command, "x" * 300]) == 1
    said = capsys.readouterr().err
    assert said.startswith("greenprune: error: ")
    assert "name too long" in said
    assert said.count("\n") == 1


def test_a_folder_that_may_not_be_read_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record_run(tmp_path / "mine")
    (tmp_path / "closed").mkdir()
    is_file = Path.is_file

    def refuse(path: Path) -> bool:
        if path.parent.name == "closed":  # the tests may run as root, who may read everything
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return is_file(path)

    monkeypatch.setattr(Path, "is_file", refuse)
    assert main(["compare", str(tmp_path)]) == 0
    assert "mine" in capsys.readouterr().out


@pytest.mark.parametrize("args", [["report", "it", "--format", "csv"], ["compare", "it"], ["compare", "it", "--json"]])
def test_a_reader_that_has_left_ends_a_command_quietly(tmp_path: Path, args: list[str]) -> None:
    record_run(tmp_path / "it")
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "greenprune.cli", *args]
    done = subprocess.run(command, check=False, cwd=tmp_path, stdout=writing, stderr=subprocess.PIPE, timeout=120)
    os.close(writing)
    assert done.stderr == b""


def test_the_doctor_as_json(tmp_path: Path) -> None:
    done = greenprune("doctor", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["fit"] is True
    assert {"area", "name", "state", "detail", "advice", "needed"} == set(report["findings"][0])


def test_the_doctor_fails_where_no_run_could_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "runs").touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        assert main(["doctor"]) == 1
    assert "not ready" in capsys.readouterr().out


def test_train_shows_all_fields(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "greenprune train" in text
    for field in ("--budget.target", "--energy.country", "--removal.decide_by", "--config"):
        assert field in text


def test_train_refuses_a_wrong_key_with_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        assert main(["train", "--budget.taget", "0.3"]) == 2
    assert "did you mean budget.target" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_run_is_trained_and_compared_with_its_twin(tmp_path: Path) -> None:
    flags = ["--model.name", "resnet20", "--optim.epochs", "2", "--data.batch_size", "256", "--device", "cpu"]
    gated = greenprune("train", *flags, cwd=tmp_path)
    assert gated.returncode == 0, gated.stderr
    assert "\x1b" not in gated.stdout
    assert "The run's files are in runs/" in gated.stdout
    dense = greenprune("train", *flags, "--gate.enabled", "false", cwd=tmp_path)
    assert dense.returncode == 0, dense.stderr
    done = greenprune("compare", "runs", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    runs = {run["summary"]["gated"]: run for run in json.loads(done.stdout)["runs"]}
    assert runs[True]["twin"] == runs[False]["name"]
    assert runs[True]["against_twin"]["flops_forward"] <= 1
    assert runs[False]["against_twin"] is None


PLAIN_C = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
SMALL = ["--model.name", "resnet20", "--gate.enabled", "false", "--optim.epochs", "1"]


ASCII = {"PYTHONIOENCODING": "ascii"}
# TensorBoard's own writer takes no folder whose name is not text, as this one's is not under the C locale.
SHOWING = [(command, locale) for command in ("compare", "watch", "report") for locale in (ASCII, PLAIN_C)]


@pytest.mark.parametrize(("command", "locale"), [*SHOWING, ("sync", ASCII)])
def test_a_name_that_the_terminal_cannot_show_is_escaped(tmp_path: Path, command: str, locale: dict[str, str]) -> None:
    record_run(tmp_path / "runs" / "ünï")
    more = {"watch": ["--once"], "sync": ["--to", "tensorboard"], "report": ["-o", "ö.html"]}.get(command, [])
    done = greenprune(command, "runs/ünï", *more, cwd=tmp_path, **locale)
    assert (done.returncode, done.stderr) == (0, "")
    if command in ("compare", "sync"):
        assert ("\\udcc3\\udcbcn\\udcc3\\udcaf" if locale == PLAIN_C else "\\xfcn\\xef") in done.stdout


def test_a_locale_without_an_encoding_of_its_own_stops_neither_run_nor_meter(tmp_path: Path) -> None:
    flags = [*SMALL, "--run_name", "it", "--energy.country", "FRA", "--output_dir", str(tmp_path)]
    done = greenprune("train", *flags, cwd=tmp_path, **PLAIN_C)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "it" / "summary.json").read_text())["co2_g"] > 0
    done = greenprune("measure", "--json", "--", "true", cwd=tmp_path, **PLAIN_C)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["energy_j"] > 0
    assert greenprune("doctor", cwd=tmp_path, **PLAIN_C).stderr == ""


@pytest.mark.parametrize("closed", [">&-", "<&- >&- 2>&-"])
def test_a_command_without_standard_streams_does_its_work(tmp_path: Path, closed: str) -> None:
    record_run(tmp_path / "runs" / "one")
    program = [sys.executable, "-m", "greenprune.cli"]
    train = [sys.executable, "-m", "greenprune.train"]
    for command in (
        [*program, "compare", "runs"],
        [*program, "report", "runs", "-o", "report.md"],
        [*program, "train", *SMALL, "--output_dir", "new", "--run_name", "by-cli"],
        [*train, *SMALL, "--output_dir", "new", "--run_name", "by-file"],
    ):
        done = subprocess.run(
            ["/bin/sh", "-c", f"{shlex.join(command)} {closed}"],
            check=False,
            cwd=tmp_path,
            env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
        )
        assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "report.md").read_text().startswith("#")
    for name in ("by-cli", "by-file"):
        lines = (tmp_path / "new" / name / "events.jsonl").read_text().splitlines()
        assert json.loads(lines[-1])["kind"] == "end"
