"""Secrets stay where they are, nothing that is read is run, and nothing that is written leads elsewhere."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote, quote_plus

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "distributed"))
from launching import ROOT, TRAIN, command, environment

from greenprune.cli import main
from greenprune.config import FIELDS
from greenprune.mirrors import GuardedMirror
from greenprune.provenance import collect_provenance
from greenprune.redaction import without_command_secrets, without_secrets
from greenprune.tracking import RunFolder

SECRET = "pl4nted-0123456789abcdef0123456789abcdef"
NAMES = ["WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "DB_PASSWORD", "SOME_VARIABLE", "COMET_API_KEY"]
PLANTED = dict.fromkeys(NAMES, SECRET)


def test_secrets_of_the_environment_are_in_no_file_and_on_no_screen(tmp_path: Path) -> None:
    """Not in configs, logs, provenance, checkpoints, trackers' files, reports or exports."""
    flags = ["--model.name", "resnet20", "--optim.epochs", "2", "--removal.decide_by", "0.5", "--run_name", "it"]
    flags += ["--tracking.trackers", "[wandb, tensorboard]", "--tracking.mode", "offline"]
    runs = tmp_path / "runs"
    commands = [
        command(TRAIN, [*flags, "--output_dir", str(runs)], 1),
        command(TRAIN, [*flags, "--output_dir", str(runs), "--resume", "auto"], 1),  # finished
        command(TRAIN, [*flags, "--output_dir", str(runs), "--optim.lr", SECRET], 1),  # refused, in words of its own
        *(
            [sys.executable, "-m", "greenprune.cli", *args]
            for args in (
                ["verify", str(runs / "it")],
                ["report", str(runs), "-o", str(tmp_path / "report.html")],
                ["report", str(runs), "-o", str(tmp_path / "report.json")],
                ["export", str(runs / "it"), "--format", "safetensors", "-o", str(tmp_path / "exported")],
                ["doctor"],
            )
        ),
    ]
    for line in commands:
        done = subprocess.run(
            line, env=environment() | PLANTED | {"WANDB_MODE": "offline"}, capture_output=True, text=True, check=False
        )
        assert SECRET not in done.stdout + done.stderr, line
        assert "Traceback" not in done.stderr, done.stderr
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    written = {path.name for path in files}
    assert {"config.yaml", "events.jsonl", "provenance.jsonl", "model.safetensors", "training.pt"} <= written
    assert {"report.html", "report.json", "export.json"} <= written
    for path in files:
        assert SECRET.encode() not in path.read_bytes(), path


def test_an_error_that_quotes_a_secret_is_told_without_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(_: object) -> None:
        raise ValueError(f"401 for https://user:hunter22@api.example.org with key {SECRET}")

    mirror = GuardedMirror("wandb", fail, RunFolder(tmp_path), environment=PLANTED)
    mirror({"kind": "train"})
    mirror.close()
    told = capsys.readouterr().err
    assert "wandb has failed" in told
    assert SECRET not in told
    assert "hunter22" not in told


@pytest.mark.parametrize(
    "args",
    [
        [SECRET],
        ["compare", SECRET],
        ["report", SECRET],
        ["compare", "x" * 300 + SECRET],  # which no system takes
        ["export", "it", "--format", SECRET],
        ["sweep", SECRET],
        ["sweep", "status", SECRET],
        ["sweep", "it", f"--local={SECRET}"],
        ["train", "--optim.lr", SECRET],
        ["measure", "--country", SECRET, "--", "true"],
        ["measure", "--interval", SECRET, "--", "true"],
    ],
)
def test_no_command_quotes_a_secret_in_an_error(
    args: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SOME_TOKEN", SECRET)
    monkeypatch.chdir(tmp_path)
    try:
        code = main(args)
    except SystemExit as stop:
        code = stop.code
    assert code in (1, 2)
    told = capsys.readouterr().err
    assert ": error: " in told
    assert SECRET not in told


def test_of_a_secret_that_begins_with_another_nothing_is_left() -> None:
    environment = {"TOKEN": "abcdef12", "OTHER_TOKEN": "abcdef1234567"}
    assert without_secrets("abcdef1234567 and abcdef12", environment) == "*** and ***"


@pytest.mark.parametrize("around", ["{}\n", " {}", "{}\r\n"])
def test_a_secret_read_from_a_file_is_known_without_the_files_line_end(around: str) -> None:
    assert without_secrets(f"401 for {SECRET}.", {"API_KEY": around.format(SECRET)}) == "401 for ***."


def test_a_key_in_lines_is_left_out_of_a_text_in_one() -> None:
    key = "-----BEGIN KEY-----\nMIIEabc+def/ghi\nxyz==\n-----END KEY-----\n"
    for text in (key, " ".join(key.split()), repr(key), str([key])):
        assert "MIIE" not in without_secrets(f"cannot read {text}", {"SSH_KEY": key}), text


@pytest.mark.parametrize("secret", ["ab\\cd'ef\"12", "pässword1", "a b&c/d%e"])
def test_a_secret_is_left_out_however_it_is_quoted(
    secret: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for text in (secret, repr(secret), json.dumps(secret), quote(secret, safe=""), quote_plus(secret)):
        told = without_secrets(f"401 for {text} here", {"DB_PASSWORD": secret})
        assert told in ("401 for *** here", "401 for '***' here", '401 for "***" here')
    monkeypatch.setenv("DB_PASSWORD", secret)
    assert main(["compare", secret]) == 2
    assert capsys.readouterr().err.startswith("greenprune: error: RUN: '***'")


def test_what_is_no_secret_stays() -> None:
    text = "a monkey in /home/key at https://example.org/a@b"
    assert without_secrets(text, {"API_KEY": "key", "MONKEY": "monkey", "PATH": "/home/key"}) == text


@pytest.mark.parametrize(
    "name",
    [
        "PGPASSWORD OPENAI_APIKEY MYSQL_PWD SSH_PASSPHRASE db_password GOOGLE_CREDENTIALS DB_PASS SMTP_PASS GITHUB_PAT",
        "HTTP_AUTH DOCKER_AUTH_CONFIG AUTHORIZATION ACCESSTOKEN SECRETS CLIENTSECRET",
        "SLACK_WEBHOOK_URL SSH_KEYS API_KEYS",
    ],
)
def test_a_secret_is_known_by_its_name(name: str) -> None:
    for one in name.split():
        assert without_secrets(f"--with {SECRET}", {one: SECRET}) == "--with ***", one


@pytest.mark.parametrize(
    "name",
    [
        "PWD OLDPWD PATH PYTHONPATH TOKENIZERS_PARALLELISM MONKEY KEYBOARD_LAYOUT COMPASS PASSES N_PASSES AUTHOR",
        "GIT_AUTHOR_NAME SSH_ASKPASS GIT_ASKPASS SSH_AUTH_SOCK XAUTHORITY MAX_TOKENS SECRETARY PATTERN PATIENCE_S",
    ],
)
def test_a_name_that_only_sounds_like_a_secret_is_none(name: str) -> None:
    for one in name.split():
        assert without_secrets("in /home/me/work", {one: "/home/me/work"}) == "in /home/me/work", one


def test_no_field_of_a_config_is_taken_for_a_secret() -> None:
    for field in FIELDS:
        assert without_secrets(f"--{field}=some-value --{field} other-value", {}).count("value") == 2
        assert without_command_secrets([f"--{field}", "value"], {}) == [f"--{field}", "value"]


LITERALS = {
    "--api-key=*** --lr 3": "--api-key=sk-123 --lr 3",
    "--wandb.token *** --lr 3": "--wandb.token abc --lr 3",
    "--password '***' it": "--password 'a b' it",
    "-token *** it": "-token abc it",
    "env HF_TOKEN=*** DB_PASS=*** it": "env HF_TOKEN=abc DB_PASS=d it",
    "Client(url='u', token='***')": "Client(url='u', token='abc')",
    'curl -H "Authorization: Bearer ***" it': 'curl -H "Authorization: Bearer abc" it',
    "Authorization: Basic *** and": "Authorization: Basic YTpi and",
    "Proxy-Authorization: ***": "Proxy-Authorization: abc",
    "X-Api-Key: *** and": "X-Api-Key: abc and",
    "with bearer ***.": "with bearer eyJhbGciOiJIUzI1NiJ9.",
    "{'HF_TOKEN': '***', 'lr': '0.1'}": "{'HF_TOKEN': 'ab c', 'lr': '0.1'}",
    '-d {"password":"***", "key": "n", "api_key" : "***"}': '-d {"password":"a\\"b", "key": "n", "api_key" : "c"}',
    "DB_PASS='***' and TOKEN='***' and": "DB_PASS='a\\'b c' and TOKEN='abc\\' and",
    "https://h/a?x=1&access_token=***&y=2": "https://h/a?x=1&access_token=abc&y=2",
    "https://h/a?token=***#end": "https://h/a?token=abc#end",
    "https://h/a?key=***&X-Amz-Signature=***": "https://h/a?key=abc&X-Amz-Signature=def",
}


@pytest.mark.parametrize("shown", LITERALS)
def test_a_secret_that_stands_in_a_text_is_left_out(shown: str) -> None:
    assert without_secrets(LITERALS[shown], {}) == shown
    assert without_secrets(shown, {}) == shown


@pytest.mark.parametrize(
    "text",
    [
        "python generate.py --max-tokens 512 --tokenizer gpt2 --keyboard us --passes 3 --author=me --no-auth it",
        "gate.every: 3 is not valid; expected a whole number, key by key",
        "sorted(runs, key=name) with 2 passes of 512 tokens; --token: expected one argument",
        """{"max_tokens": "512", 'key': 'name', "author": "me"}""",
        "the bearer of bad news, an authorization of ours",
        "torchrun --nproc-per-node=2 --rdzv-endpoint=host:1 train.py --data.root /data/keys?v=2",
    ],
)
def test_what_is_no_secret_stays_in_a_text(text: str) -> None:
    assert without_secrets(text, {}) == text
    assert without_command_secrets(text.split(), {}) == text.split()


def test_of_a_command_the_whole_word_is_left_out() -> None:
    words = ["env", "DB_PASS=a b", "it", "--password=a b", "--api-key", "a b", "--token", "--lr", "3", "c?token=d e"]
    shown = ["env", "DB_PASS=***", "it", "--password=***", "--api-key", "***", "--token", "--lr", "3", "c?token=*** e"]
    assert without_command_secrets(words, {}) == shown


def test_the_report_of_a_measured_command_has_no_secret_of_its_command_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    secrets = ["--api-key=sk-111222333", "--token", "tok444", "-H", "Authorization: Bearer b555", "http://h?token=u666"]
    report = tmp_path / "report.json"
    held_back = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    assert main(["measure", "--output", str(report), "--", "true", *secrets]) == 0
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == held_back
    told = report.read_text() + capfd.readouterr().err
    assert told.count("--api-key=***") == 2
    assert not re.search("111222333|tok444|b555|u666", told)


def test_provenance_has_no_secret_of_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "--hub-token", "tok444"])
    assert collect_provenance(1, torch.device("cpu"))["command"] == ["train.py", "--hub-token", "***"]


@pytest.mark.parametrize("user", ["u:pa/ss", "u:p@ss", "u:pass", ":pass", "token", "u:"])
def test_who_logs_in_is_left_out_of_an_address(user: str) -> None:
    told = without_secrets(f"from https://{user}@host/path, not me@there", {})
    assert told == "from https://***@host/path, not me@there"


def test_no_code_of_the_package_hands_text_to_a_shell_or_runs_a_pickle() -> None:
    forbidden = re.compile(
        r"shell\s*=\s*True|os\.(system|popen)\(|subprocess\.getoutput|pickle\.loads?\(|weights_only\s*=\s*False|"
        r"\beval\(\w*input|yaml\.(unsafe_load|full_load)|np\.load\(.*allow_pickle\s*=\s*True"
    )
    for path in (ROOT / "greenprune").rglob("*.py"):
        found = forbidden.search(path.read_text())
        assert found is None, f"{path}: {found}"
    assert all("weights_only=True" in line for line in _loads())


def _loads() -> list[str]:
    sources = "\n".join(path.read_text() for path in (ROOT / "greenprune").rglob("*.py"))
    return re.findall(r"torch\.load\(.*", sources)


@pytest.mark.parametrize("name", ["../up", "a/b", "$(touch x)", "a;b", "a b", "-rf\n", ".hidden", ""])
def test_a_name_that_means_something_to_a_shell_or_a_path_is_refused(name: str) -> None:
    from greenprune.config import Config, ConfigError

    with pytest.raises(ConfigError, match="run_name"):
        Config(run_name=name)
