"""The configuration: what is valid, what is refused and with which words, and which runs are the same run."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from greenprune.config import (
    BudgetConfig,
    Config,
    ConfigError,
    DataConfig,
    EnergyConfig,
    GateConfig,
    ModelConfig,
    OptimConfig,
    RemovalConfig,
    TrackingConfig,
    config_parser,
    dump_config,
    load_config,
    parse_config,
    shaping_values,
)

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))


def fields_of(cls: type, prefix: str = "") -> Iterator[tuple[str, bool]]:
    """Dotted names of all fields, and whether each may be null."""
    for field in dataclasses.fields(cls):
        default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        if dataclasses.is_dataclass(default):
            yield from fields_of(type(default), f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, "None" in str(field.type)


def nested(key: str, value: object) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value  # type: ignore[return-value]


def parse_values(folder: Path, values: object) -> Config:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return parse_config(["--config", str(path)])


def refusal(args: list[str]) -> str:
    with pytest.raises(ConfigError) as refused:
        parse_config(args)
    message = str(refused.value)
    assert "\n" not in message
    return message


# Reading.


def test_an_unknown_key_with_line_breaks_is_named_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text('"a\\n\\nb": 1\n')
    with pytest.raises(ConfigError, match=r"^'a\\n\\nb': unknown key") as refused:
        load_config(path)
    assert "\n" not in str(refused.value)


def test_no_arguments_give_the_defaults() -> None:
    assert parse_config([]) == Config()


def test_every_field_can_be_read_from_yaml_and_written_back(tmp_path: Path) -> None:
    config = Config(
        seed=7,
        output_dir="some where",
        run_name="a.b-c_1",
        resume="auto",
        precision="bf16",
        device="cpu",
        model=ModelConfig(name="resnet50", shortcut="B", stem="imagenet", channels_last=True),
        data=DataConfig(name="cifar10", root="/data", batch_size=32, validation=0.1, augment=False, image_size=64),
        optim=OptimConfig(name="adamw", lr=1e-3, epochs=3, schedule="constant", clip_norm=1.5, label_smoothing=0.1),
        gate=GateConfig(kind="static", warmup=0.2, openness=0.8, lr=3.0, polarization=0.0),
        budget=BudgetConfig(target=0.3, unit="params"),
        removal=RemovalConfig(window=5, freeze_after=1, decide_by=0.7),
        energy=EnergyConfig(country="USA", region="california", pue=1.3, interval_s=0.5),
        tracking=TrackingConfig(trackers=["wandb"], project="p", mode="offline", log_every=3),
    )
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config))
    assert load_config(path) == config
    assert parse_config([f"--config={path}"]).identity() == config.identity()


def test_the_defaults_survive_a_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(Config()))
    assert load_config(path) == Config()


@pytest.mark.parametrize("word", ["5e-4", "7e4", "1234e56", "1.5", "012", "1_000", "no", "true", "2024-01-01"])
def test_text_that_looks_like_something_else_survives_a_round_trip(tmp_path: Path, word: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(Config(run_name=word)))
    assert load_config(path) == Config(run_name=word)
    assert yaml.safe_load(path.read_text())["run_name"] == word  # readers of YAML 1.1 see the same


def test_the_last_word_wins(tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text("seed: 1\noptim:\n  lr: 0.1\n  epochs: 5\n")
    (tmp_path / "two.yaml").write_text("optim:\n  lr: 0.2\n")
    one, two = f"--config={tmp_path / 'one.yaml'}", f"--config={tmp_path / 'two.yaml'}"
    config = parse_config([one, two, "--optim.lr", "0.4", "--optim.lr=0.3"])
    assert (config.seed, config.optim.lr, config.optim.epochs) == (1, 0.3, 5)
    assert parse_config(["--optim.lr", "0.4", one]).optim.lr == 0.1


@pytest.mark.parametrize("number", ["1e-3", "0.001", "1.0e-3"])
def test_numbers_in_scientific_notation_are_numbers(tmp_path: Path, number: str) -> None:
    (tmp_path / "run.yaml").write_text(f"optim:\n  lr: {number}\n")
    assert parse_config(["--config", str(tmp_path / "run.yaml")]).optim.lr == 1e-3
    assert parse_config([f"--optim.lr={number}"]).optim.lr == 1e-3


def test_overrides_of_any_type(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("seed: 1\noptim:\n  clip_norm: 1.0\n")
    overrides = {
        "seed": 3,
        "optim.lr": 0.25,
        "optim.clip_norm": None,
        "gate.enabled": False,
        "model.name": "resnet20",
        "output_dir": "some where",
        "run_name": "name",
        "precision": "no",
        "tracking.trackers": ["wandb"],
    }
    config = load_config(tmp_path / "run.yaml", overrides)
    assert config.to_dict() | {"optim": None, "gate": None, "model": None, "tracking": None} == {
        **Config(seed=3, output_dir="some where", run_name="name").to_dict(),
        **{"optim": None, "gate": None, "model": None, "tracking": None},
    }
    assert (config.optim.lr, config.optim.clip_norm, config.gate.enabled) == (0.25, None, False)
    assert (config.model.name, config.tracking.trackers) == ("resnet20", ["wandb"])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_file_is_a_run(path: Path) -> None:
    config = load_config(path)
    values = yaml.safe_load(path.read_text())
    assert config.data.name == values["data"]["name"]


def test_there_are_config_files() -> None:
    assert CONFIGS


def test_help_names_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        parse_config(["--help"])
    assert left.value.code in (0, None)
    text = capsys.readouterr().out
    assert all(f"--{name}" in text for name, _ in fields_of(Config))
    assert text == config_parser().format_help()
    refused = {name.partition(".")[0] for name, _ in fields_of(Config) if "." in name}
    assert not [section for section in refused if f"--{section} " in text]


# What is refused: values.

OUT_OF_RANGE = [
    ("seed", -1, "[0, 2^31)"),
    ("seed", 2**31, "[0, 2^31)"),
    ("run_name", "a/b", "folder name"),
    ("run_name", "..", "folder name"),
    ("run_name", ".hidden", "folder name"),
    ("run_name", "", "folder name"),
    ("run_name", "a b", "folder name"),
    ("data.batch_size", 0, "at least 1"),
    ("data.eval_batch_size", 0, "at least 1"),
    ("data.validation", 1.0, "[0, 1)"),
    ("data.validation", -0.1, "[0, 1)"),
    ("data.workers", -1, "at least 0"),
    ("data.image_size", 7, "at least 8"),
    ("optim.lr", 0.0, "above 0"),
    ("optim.lr", -0.1, "above 0"),
    ("optim.epochs", 0, "at least 1"),
    ("optim.momentum", 1.0, "[0, 1)"),
    ("optim.momentum", -0.1, "[0, 1)"),
    ("optim.weight_decay", -1e-4, "at least 0"),
    ("optim.warmup", 1.0, "[0, 1)"),
    ("optim.warmup", -0.1, "[0, 1)"),
    ("optim.label_smoothing", 1.0, "[0, 1)"),
    ("optim.label_smoothing", -0.1, "[0, 1)"),
    ("optim.clip_norm", 0.0, "above 0 or null"),
    ("gate.units", [], "without repeats"),
    ("gate.units", ["block", "block"], "without repeats"),
    ("gate.warmup", 1.0, "[0, 1)"),
    ("gate.warmup", -0.1, "[0, 1)"),
    ("gate.openness", 0.5, "(0.5, 1)"),
    ("gate.openness", 1.0, "(0.5, 1)"),
    ("gate.lr", 0.0, "above 0"),
    ("gate.polarization", -0.1, "at least 0"),
    ("gate.every", 0, "at least 1"),
    ("budget.target", 0.0, "(0, 1]"),
    ("budget.target", 1.1, "(0, 1]"),
    ("removal.window", 0, "at least 1 step, or null"),
    ("removal.freeze_after", 0, "at least 1"),
    ("removal.decide_by", 0.0, "(0, 1]"),
    ("removal.decide_by", 1.1, "(0, 1]"),
    ("energy.interval_s", 0.0, "above 0"),
    ("energy.country", "fra", "three-letter ISO code"),
    ("energy.country", "FRANCE", "three-letter ISO code"),
    ("energy.region", "california", "energy.country"),
    ("energy.intensity_g_per_kwh", -1.0, "at least 0, or null"),
    ("energy.pue", 0.9, "at least 1"),
    ("tracking.log_every", 0, "at least 1"),
    ("checkpoint.every", 0, "at least 1"),
    ("checkpoint.keep_last", 0, "at least 1"),
]


@pytest.mark.parametrize(("key", "value", "valid"), OUT_OF_RANGE, ids=str)
def test_a_value_out_of_range_is_refused_with_key_value_and_what_is_valid(
    tmp_path: Path, key: str, value: object, valid: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_values(tmp_path, nested(key, value))
    message = str(refused.value)
    assert message.startswith(f"{key}: {value!r} is not valid; expected ")
    assert valid in message


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("optim.lr", "abc", "Expected a value of type float. Got value: abc"),
        ("gate.lr", "abc", "Expected a value of type float or null. Got value: abc"),
        ("removal.window", "[1]", "Expected a value of type int or null. Got value: [1]"),
        ("gate.kind", "abc", "Expected one of 'conditional', 'static'. Got value: abc"),
        ("gate.units", "[foo]", "Expected one of 'block', 'channel'. Got value: foo"),
    ],
    ids=str,
)
def test_a_value_of_the_wrong_type_is_refused_in_one_sentence(key: str, value: str, told: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_config([f"--{key}={value}"])
    assert str(refused.value) == f"{key}: {told}"


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("gate.units", "block", "'block' is not valid; expected a list such as '[block]' of block, channel"),
        ("gate.units", "channel", "'channel' is not valid; expected a list such as '[channel]' of block, channel"),
        ("gate.units", "", "'' is not valid; expected a list such as '[block]' of block, channel"),
        ("gate.units", "null", "null is not valid; expected a list such as '[block]' of block, channel"),
        ("gate.units", "3", "3 is not valid; expected a list such as '[block]' of block, channel"),
        ("tracking.trackers", "wandb", "'wandb' is not valid; expected a list such as '[wandb]' of wandb, tensorboard"),
    ],
    ids=str,
)
def test_a_value_for_a_list_is_refused_with_the_form_and_the_valid_items(key: str, value: str, told: str) -> None:
    assert refusal([f"--{key}={value}"]).startswith(f"{key}: {told}")


@pytest.mark.parametrize(("key", "value"), [("optim.lr", -0.1), ("seed", -1)])
def test_a_flag_out_of_range_is_refused_in_the_same_words(tmp_path: Path, key: str, value: float) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_values(tmp_path, nested(key, value))
    assert refusal([f"--{key}={value}"]) == refusal([f"--{key}", str(value)]) == str(refused.value)


@pytest.mark.parametrize(
    "config",
    [
        Config(seed=0, run_name="a"),
        Config(seed=2**31 - 1, run_name="_"),
        Config(data=DataConfig(batch_size=1, eval_batch_size=1, workers=0, image_size=8)),
        Config(optim=OptimConfig(epochs=1, momentum=0, weight_decay=0, warmup=0)),
        Config(energy=EnergyConfig(intensity_g_per_kwh=0, pue=1)),
        Config(gate=GateConfig(warmup=0, polarization=0)),
        Config(budget=BudgetConfig(target=1.0), removal=RemovalConfig(decide_by=1.0, window=1, freeze_after=1)),
    ],
    ids=["seed", "largest seed", "data", "optim", "energy", "gate", "budget"],
)
def test_values_at_the_edge_are_valid(tmp_path: Path, config: Config) -> None:
    assert parse_values(tmp_path, config.to_dict()) == config


def test_a_country_and_an_intensity_exclude_each_other() -> None:
    message = refusal(["--energy.country", "FRA", "--energy.intensity_g_per_kwh", "50"])
    assert message.startswith("energy.intensity_g_per_kwh: 50.0 is not valid; expected null where energy.country (FRA)")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "key", ["optim.lr", "optim.weight_decay", "gate.lr", "gate.polarization", "energy.interval_s", "budget.target"]
)
def test_a_number_that_is_not_finite_is_refused(tmp_path: Path, key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(key)}: {value}"):
        parse_values(tmp_path, nested(key, value))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", "one"),
        ("seed", 1.5),
        ("seed", True),
        ("optim.lr", "fast"),
        ("optim.lr", [0.1]),
        ("optim.epochs", 2.5),
        ("optim.name", "lion"),
        ("optim.clip_norm", "some"),
        ("data.batch_size", 1.5),
        ("data.augment", "maybe"),
        ("gate.enabled", 1),
        ("gate.kind", "soft"),
        ("gate.units", ["layer"]),
        ("gate.units", "block"),
        ("budget.unit", "joules"),
        ("budget.target", "half"),
        ("removal.window", 2.5),
        ("precision", "fp8"),
        ("model.shortcut", "C"),
        ("tracking.trackers", ["paper"]),
        ("tracking.mode", "dry"),
        ("run_name", 7),
    ],
    ids=str,
)
def test_a_value_of_the_wrong_type_is_refused_with_key_and_value(tmp_path: Path, key: str, value: object) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_values(tmp_path, nested(key, value))
    message = str(refused.value)
    assert message.startswith(f"{key}: ")
    assert str(value[0] if key in ("gate.units", "tracking.trackers") and isinstance(value, list) else value) in message
    assert "xpected" in message


@pytest.mark.parametrize("key", [name for name, optional in fields_of(Config) if not optional])
def test_a_field_left_empty_is_refused(tmp_path: Path, key: str) -> None:
    """A key with nothing after it is null in YAML."""
    with pytest.raises(ConfigError, match=f"^{re.escape(key)}: "):
        parse_values(tmp_path, nested(key, None))


@pytest.mark.parametrize("key", [name for name, optional in fields_of(Config) if optional])
def test_an_optional_field_may_be_null(tmp_path: Path, key: str) -> None:
    assert parse_values(tmp_path, nested(key, None)) == Config()


@pytest.mark.parametrize("decide_by", [0.2, 0.3])
def test_the_deadline_lies_after_the_warm_up(decide_by: float) -> None:
    args = [f"--removal.decide_by={decide_by}", "--gate.warmup=0.3"]
    assert refusal(args) == f"removal.decide_by: {decide_by} is not valid; expected more than gate.warmup (0.3)"
    assert not parse_config([*args, "--gate.enabled=false"]).gate.enabled


# What is refused: keys and files.


@pytest.mark.parametrize(
    ("key", "suggestion", "valid"),
    [
        ("optim.lrate", "optim.lr", ["optim.lr", "optim.epochs"]),
        ("budget.taget", "budget.target", ["budget.target", "budget.unit"]),
        ("sed", "seed", ["seed", "optim", "output_dir"]),
        ("optm", "optim", ["optim", "seed"]),
    ],
)
def test_an_unknown_key_is_refused_with_the_closest_one(
    tmp_path: Path, key: str, suggestion: str, valid: list[str]
) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_values(tmp_path, nested(key, 1))
    for message in (str(refused.value), refusal([f"--{key}", "1"]), refusal([f"--{key}=1"])):
        assert "unknown key" in message
        assert f"did you mean {suggestion}?" in message
        assert all(name in message.split("valid here: ")[1].split(", ") for name in valid)


def test_an_unknown_section_is_refused_with_the_closest_one(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"^optmi: unknown key; did you mean optim\? valid here: .*\boptim, output_dir"
    ):
        parse_values(tmp_path, {"optmi": {"lr": 1}})
    assert "did you mean optim.lr?" in refusal(["--optmi.lr", "1"])


def test_a_field_that_is_given_by_itself_and_in_its_section_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^optim\.epochs: given by itself and in optim; expected each key once$"):
        parse_values(tmp_path, {"optim.epochs": 1, "optim": {"epochs": 2}})
    assert parse_values(tmp_path, {"optim.epochs": 1, "optim": {"lr": 0.5}}).optim.epochs == 1


@pytest.mark.parametrize("key", ["output_dir", "data.root"])
def test_a_home_folder_that_only_a_shell_knows_is_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{key}: '~/here' is not valid; expected a path without ~"):
        parse_values(tmp_path, nested(key, "~/here"))
    assert parse_values(tmp_path, nested(key, "./~/here"))


def test_a_name_that_no_file_system_takes_is_refused_before_anything_is_written() -> None:
    assert refusal(["--run_name", "a" * 241]).endswith("expected a folder name of at most 240 bytes")
    assert refusal(["--run_name", "é" * 121]).endswith("expected a folder name of at most 240 bytes")
    assert parse_config(["--run_name", "a" * 240]).run_name == "a" * 240


def test_a_key_like_no_other_is_refused_without_a_guess() -> None:
    assert "did you mean" not in refusal(["--zzzzzz", "1"])
    assert refusal(["--zzzzzz", "1"]).startswith("zzzzzz: unknown key; valid here: ")


@pytest.mark.parametrize("content", ["optim: 3\n", "optim:\n", "optim: [lr]\n", "optim: sgd\n"])
def test_a_section_that_is_not_a_mapping_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.yaml").write_text(content)
    message = refusal(["--config", str(tmp_path / "run.yaml")])
    assert message.startswith("optim: ")
    assert "expected a mapping of optim.name, optim.lr" in message


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "holds no fields"),
        (b"# nothing but a comment\n", "holds no fields"),
        (b"- seed\n- 1\n", "holds no fields"),
        (b"7\n", "holds no fields"),
        (b"seed: [1\n", "not valid YAML"),
        (b"seed: 1\n  optim: 2\n", "not valid YAML"),
        (b"\tseed: 1\n", "not valid YAML"),
        (b"seed: \xff\xfe\n", "not valid YAML"),
        (b"seed: \x00\n", "not valid YAML"),
    ],
    ids=["empty", "comment", "list", "number", "unclosed", "indented", "tab", "not text", "control character"],
)
@pytest.mark.parametrize("flag", ["--config={}", "--config {}"])
def test_a_file_that_is_no_run_is_refused_by_its_name(
    tmp_path: Path, content: bytes, complaint: str, flag: str
) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    message = refusal(flag.format(path).split(" "))
    assert message.startswith(f"--config: {str(path)!r}")
    assert complaint in message


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("optim: {lr: 0.5}\nseed: 1\noptim: {epochs: 3}\n", "'optim' is given twice, in lines 1 and 3"),
        ("seed: 1\noptim:\n  lr: 0.5\n  epochs: 3\n  lr: 0.1\n", "'lr' is given twice, in lines 3 and 5"),
        ("seed: 1\n'seed': 1\n", "'seed' is given twice, in lines 1 and 2"),
    ],
    ids=["section", "field", "quoted"],
)
def test_a_key_that_is_given_twice_is_refused(tmp_path: Path, content: str, complaint: str) -> None:
    """Else all that the first one says would be dropped without a word."""
    path = tmp_path / "run.yaml"
    path.write_text(content)
    message = refusal(["--config", str(path)])
    assert message.startswith(f"--config: {str(path)!r}")
    assert message.endswith(f"{complaint}; expected each key once")


def test_what_a_mapping_takes_over_from_another_may_be_given_again(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("optim: &base {lr: 0.5, epochs: 3}\n")
    assert load_config(path).optim.lr == 0.5
    path.write_text("energy: {country: null}\noptim: {<<: {lr: 0.5, epochs: 3}, lr: 0.1}\n")
    assert (load_config(path).optim.lr, load_config(path).optim.epochs) == (0.1, 3)


def test_a_missing_file_is_refused_by_its_name(tmp_path: Path) -> None:
    path = tmp_path / "nothing.yaml"
    assert re.match(rf"--config: cannot read '{path}' \(No such file", refusal(["--config", str(path)]))
    with pytest.raises(ConfigError, match="cannot read"):
        load_config(tmp_path)


@pytest.mark.parametrize("args", [["--config"], ["--optim.lr"], ["train"]])
def test_arguments_that_are_no_flags_are_refused(args: list[str]) -> None:
    assert args[0] in refusal(args)


# Identity.


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"optim.lr": 0.2},
        {"optim.epochs": 3},
        {"budget.target": 0.3},
        {"gate.warmup": 0.15},
        {"gate.enabled": "false"},
        {"removal.decide_by": 0.6},
        {"model.name": "resnet20"},
        {"data.name": "cifar10"},
        {"data.batch_size": 32},
        {"precision": "bf16"},
    ],
    ids=str,
)
def test_what_shapes_the_result_makes_another_run(change: dict[str, object]) -> None:
    assert parse_config([f"--{key}={value}" for key, value in change.items()]).identity() != Config().identity()


@pytest.mark.parametrize(
    "change",
    [
        {"output_dir": "elsewhere"},
        {"run_name": "name"},
        {"resume": "auto"},
        {"device": "cpu"},
        {"energy.country": "FRA"},
        {"energy.interval_s": 3},
        {"tracking.trackers": "[wandb]"},
        {"tracking.log_every": 3},
        {"checkpoint.every": 3},
        {"data.root": "/data"},
        {"data.workers": 0},
        {"data.eval_batch_size": 8},
    ],
    ids=str,
)
def test_what_does_not_shape_the_result_makes_the_same_run(change: dict[str, object]) -> None:
    config = parse_config([f"--{key}={value}" for key, value in change.items()])
    assert config != Config()
    assert config.identity() == Config().identity()


def test_a_dense_run_does_not_depend_on_how_it_would_have_been_pruned() -> None:
    dense = Config(gate=GateConfig(enabled=False))
    other = Config(
        gate=GateConfig(enabled=False, kind="static", warmup=0.3, lr=1.0),
        budget=BudgetConfig(target=0.2, unit="params"),
        removal=RemovalConfig(window=3, decide_by=0.9),
    )
    assert dense.identity() == other.identity()
    assert dense.identity() != dataclasses.replace(dense, seed=1).identity()


def test_the_way_a_number_is_written_does_not_matter(tmp_path: Path) -> None:
    texts = ("lr: 1", "lr: 1.0", "lr: 1e0")
    identities = set()
    for text in texts:
        (tmp_path / "run.yaml").write_text(f"optim:\n  {text}\n")
        identities.add(load_config(tmp_path / "run.yaml").identity())
    assert identities == {Config(optim=OptimConfig(lr=1.0)).identity()}


def test_shaping_values_can_be_read_from_a_saved_config() -> None:
    config = Config(budget=BudgetConfig(target=0.3))
    assert shaping_values(yaml.safe_load(dump_config(config))) == shaping_values(config.to_dict())
    assert shaping_values(config.to_dict())["budget.target"] == 0.3


def test_a_flag_that_is_a_section_is_told_from_one_that_is_unknown() -> None:
    message = refusal(["--optim", "adamw"])
    assert message.startswith(
        "optim: a section, which takes no value of its own; expected one of its fields: optim.name"
    )
    assert "did you mean" not in message


def test_a_config_can_come_through_a_pipe() -> None:
    """As with ``--config <(...)``: what has been read of a pipe is gone from it."""
    reading, writing = os.pipe()
    os.write(writing, b"seed: 3\noptim:\n  lr: 0.25\n")
    os.close(writing)
    try:
        config = parse_config(["--config", f"/dev/fd/{reading}", "--optim.epochs", "7"])
    finally:
        os.close(reading)
    assert (config.seed, config.optim.lr, config.optim.epochs) == (3, 0.25, 7)


def test_a_config_is_utf8_whatever_the_locale(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("# für Große\nmodel: {name: größe}\n", encoding="utf-8")
    code = "import sys, greenprune.config as c; print(ascii(c.parse_config(['--config', sys.argv[1]]).model.name))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        check=False,
        env=os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0"},
        capture_output=True,
        text=True,
    )
    assert (done.stdout.strip(), done.stderr) == (r"'gr\xf6\xdfe'", "")
