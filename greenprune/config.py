"""The configuration of one run: frozen dataclasses, their validation, and the way from YAML and flags to them.

One YAML file is one complete run. Every field can be set on the command line by its dotted name
(``--optim.lr 0.2``), where the last word wins. What is wrong is reported as a :class:`ConfigError` with one
message that names the key, the value and what is valid, before any file is written.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import jsonargparse
import yaml
from jsonargparse import ArgumentParser, set_loader, set_parsing_settings


class _Loader(yaml.SafeLoader):
    """YAML with the booleans and floats of version 1.2: ``precision: no`` is a word, ``lr: 5e-4`` a number."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":bool", ":float"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile("^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^([-+]?(\.\d+|\d+(\.\d*)?)([eE][-+]?\d+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"),
    list("-+.0123456789"),
)


def load_yaml(text: str) -> Any:
    """Plain values from YAML as config files are written."""
    return yaml.load(text, _Loader)


set_loader("greenprune", load_yaml, exceptions=(yaml.YAMLError,))
set_parsing_settings(docstring_parse_attribute_docstrings=True)


class UserError(ValueError):
    """Something that the user can mend; its message is all they need to see (exit code 2).

    Attributes:
        known_to_all: Whether every process of the run has raised it, so that rank 0 can speak for all.
    """

    known_to_all = False


class ConfigError(UserError):
    """A configuration that cannot be run; the message names the key, the value and what is valid."""


GateKind = Literal["conditional", "static"]
UnitKind = Literal["block", "channel"]
TrackerName = Literal["wandb", "tensorboard", "aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "trackio"]
BudgetUnit = Literal["flops", "params", "blocks"]
Precision = Literal["no", "bf16", "fp16"]


def _require(condition: bool, key: str, value: object, valid: str) -> None:
    if not condition or value == math.inf:
        raise ConfigError(f"{key}: {value!r} is not valid; expected {valid}")


@dataclass(frozen=True)
class ModelConfig:
    """The network."""

    name: str = "resnet38"
    """A CIFAR ResNet (resnet20, resnet32, resnet38, resnet44, resnet56, resnet110); one of torchvision's ResNet,
    ResNeXt, Wide ResNet, RegNet, MobileNet, EfficientNet, ConvNeXt, ViT and Swin networks by its name there (resnet50,
    vit_b_16, ...); or timm/NAME for one of timm's ResNet, ConvNeXt and ViT networks, where timm is installed."""
    shortcut: Literal["A", "B"] = "A"
    """Shortcut where a CIFAR ResNet changes shape (He et al. 2015): A subsamples and pads with zero channels (no
    parameters), B projects with a 1x1 convolution. The torchvision networks always project."""
    stem: Literal["auto", "small", "imagenet"] = "auto"
    """First layers of a torchvision ResNet, ResNeXt or Wide ResNet: small (3x3, stride 1, no pooling), imagenet (7x7,
    stride 2, pooled), or auto: small for images up to 64 pixels. CIFAR ResNets have the small stem only, all others
    their own."""
    channels_last: bool = False
    """Keep images and weights in channels-last order, which most convolution kernels prefer."""
    sync_batchnorm: bool = False
    """Normalise over the whole global batch and not over each process's part of it (GPUs only)."""
    compile: bool = False
    """Compile each block with torch.compile; after a removal, those that lost channels are compiled anew."""


@dataclass(frozen=True)
class DataConfig:
    """What is trained on, and in which batches."""

    name: str = "digits"
    """digits (embedded), fashion_mnist, cifar10, cifar100, tiny_imagenet or image_folder (ImageNet layout)."""
    root: str | None = None
    """Folder that holds the data set in its standard layout. Unset: the environment's GREENPRUNE_DATA."""
    batch_size: int = 64
    """Training samples a step, over all processes together; a multiple of the number of processes."""
    eval_batch_size: int = 512
    """Samples a forward pass in evaluation, per process."""
    download: bool = False
    """Fetch the data set where its publisher offers it, if it is not there."""
    validation: float = 0.0
    """Share of the training set held out to choose settings on. Above 0, accuracy is measured on it and not on the
    test set."""
    augment: bool = True
    """Random crop and flip in training (crops only for digits and fashion_mnist, whose images have a handedness)."""
    image_size: int | None = None
    """Side of the square training images in pixels (tiny_imagenet, image_folder). Unset: 64 or 224."""
    workers: int = 4
    """Loader processes for data sets that do not fit in memory (tiny_imagenet, image_folder)."""

    def __post_init__(self) -> None:
        _require(self.batch_size >= 1, "data.batch_size", self.batch_size, "a whole number of at least 1")
        _require(self.eval_batch_size >= 1, "data.eval_batch_size", self.eval_batch_size, "at least 1")
        _require(0 <= self.validation < 1, "data.validation", self.validation, "a share in [0, 1)")
        _require(self.workers >= 0, "data.workers", self.workers, "a whole number of at least 0")
        _require(self.image_size is None or self.image_size >= 8, "data.image_size", self.image_size, "at least 8")


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer of the weights and the length of the run."""

    name: Literal["sgd", "adamw"] = "sgd"
    """sgd (Nesterov momentum) or adamw."""
    lr: float = 0.1
    """Peak learning rate."""
    epochs: int = 24
    """Passes over the training set."""
    momentum: float = 0.9
    """Momentum of sgd."""
    weight_decay: float = 5e-4
    """Decay of the weights; biases, norms and gates are not decayed."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Course of the learning rate after its warm-up: cosine to zero, or constant."""
    warmup: float = 0.05
    """Share of the run in which the learning rate rises linearly from zero."""
    label_smoothing: float = 0.0
    """Share of the target's weight spread over all classes."""
    clip_norm: float | None = None
    """Largest norm of the whole gradient; larger ones are scaled down. Unset: no clipping."""
    accumulate: int = 1
    """Parts in which each process does its share of a batch, one after the other, to fit in memory. BatchNorm and the
    gates' penalty see one part at a time."""
    ema: float | None = None
    """Decay of a moving average of the weights, such as 0.999, that is then evaluated and exported in their place.
    Unset: none."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """What all processes do together about a loss or gradient that is not a finite number on any of them: stop when the
    loss is read next (tracking.log_every), or skip the step; after 20 steps skipped in a row they stop."""

    def __post_init__(self) -> None:
        _require(self.lr > 0, "optim.lr", self.lr, "a number above 0")
        _require(self.epochs >= 1, "optim.epochs", self.epochs, "a whole number of at least 1")
        _require(0 <= self.momentum < 1, "optim.momentum", self.momentum, "a number in [0, 1)")
        _require(self.weight_decay >= 0, "optim.weight_decay", self.weight_decay, "a number of at least 0")
        _require(0 <= self.warmup < 1, "optim.warmup", self.warmup, "a share in [0, 1)")
        _require(0 <= self.label_smoothing < 1, "optim.label_smoothing", self.label_smoothing, "a share in [0, 1)")
        _require(
            self.clip_norm is None or self.clip_norm > 0,
            "optim.clip_norm",
            self.clip_norm,
            "a number above 0 or null",
        )
        _require(self.accumulate >= 1, "optim.accumulate", self.accumulate, "a whole number of at least 1")
        _require(self.ema is None or 0 < self.ema < 1, "optim.ema", self.ema, "a number in (0, 1) or null")


@dataclass(frozen=True)
class GateConfig:
    """The gates (arXiv 2302.10798) that find the sub-network."""

    enabled: bool = True
    """Train with gates. False is the dense twin: the same run with nothing gated and nothing removed."""
    units: list[UnitKind] = field(default_factory=lambda: ["block"])
    """What gates switch: block (residual branches), channel (channels, heads and hidden neurons inside them), or both,
    as [block, channel]."""
    kind: GateKind = "conditional"
    """conditional: the decision depends on the input, as in the paper; static: one logit for all inputs."""
    warmup: float = 0.1
    """Share of the run without any penalty on the gates. This and the other defaults are our choice."""
    openness: float = 0.9
    """Openness of every gate at the start, in (0.5, 1)."""
    lr: float = 30.0
    """Sum of the gates' learning rate over the run, constant in it: a step uses gate.lr divided by the run's steps."""
    polarization: float = 0.1
    """Weight of the polarization regularizer."""

    def __post_init__(self) -> None:
        _require(0 <= self.warmup < 1, "gate.warmup", self.warmup, "a share in [0, 1)")
        _require(0.5 < self.openness < 1, "gate.openness", self.openness, "a number in (0.5, 1)")
        _require(self.lr > 0, "gate.lr", self.lr, "a number above 0")
        _require(self.polarization >= 0, "gate.polarization", self.polarization, "a number of at least 0")
        _require(
            len(self.units) == len(set(self.units)) and len(self.units) > 0,
            "gate.units",
            self.units,
            "a list without repeats of " + ", ".join(get_args(UnitKind)),
        )


@dataclass(frozen=True)
class BudgetConfig:
    """How much of the dense network's cost is kept."""

    target: float = 0.5
    """Share of the dense network's cost to keep, in (0, 1]."""
    unit: BudgetUnit = "flops"
    """What cost is counted in: flops (forward pass), params or blocks."""

    def __post_init__(self) -> None:
        _require(0 < self.target <= 1, "budget.target", self.target, "a share in (0, 1]")


@dataclass(frozen=True)
class RemovalConfig:
    """When units leave the network for good."""

    window: int | None = None
    """Steps over which a unit must be off for every sample to be removed. Unset: one epoch."""
    freeze_after: int = 3
    """Windows over which a unit must be on for every sample to lose its gate. Before the budget is met a unit whose
    gate is gone could no longer be chosen, so units freeze only then."""
    decide_by: float = 0.5
    """Share of the run after which no unit is undecided: what is left is settled against the budget."""

    def __post_init__(self) -> None:
        _require(self.window is None or self.window >= 1, "removal.window", self.window, "at least 1 step, or null")
        _require(self.freeze_after >= 1, "removal.freeze_after", self.freeze_after, "a whole number of at least 1")
        _require(0 < self.decide_by <= 1, "removal.decide_by", self.decide_by, "a share in (0, 1]")


@dataclass(frozen=True)
class SurgeryConfig:
    """How units are taken out."""

    round_to: int | None = None
    """Sets of channels shrink to multiples of this number, which kernels prefer. Unset: 8 on a GPU, 1 on a CPU."""

    def __post_init__(self) -> None:
        _require(self.round_to is None or self.round_to >= 1, "surgery.round_to", self.round_to, "at least 1, or null")


@dataclass(frozen=True)
class EnergyConfig:
    """The energy meter."""

    country: str | None = None
    """Three-letter ISO code of the country whose grid feeds the machine (FRA, USA). Unset: joules without CO2."""
    region: str | None = None
    """Province or state, where CodeCarbon knows it (for example california with country USA)."""
    intensity_g_per_kwh: float | None = None
    """Carbon intensity of the grid in gCO2e/kWh, where you know it better than a country's mean; replaces country."""
    pue: float = 1.0
    """Power usage effectiveness of the site, at least 1: CO2 counts every metered joule so many times. 1 counts the
    computers alone."""
    interval_s: float = 1.0
    """Seconds between two samples of sources that have no energy counter."""

    def __post_init__(self) -> None:
        _require(self.interval_s > 0, "energy.interval_s", self.interval_s, "a number of seconds above 0")
        _require(
            self.country is None or re.fullmatch("[A-Z]{3}", self.country) is not None,
            "energy.country",
            self.country,
            "a three-letter ISO code in capitals, such as FRA, or null",
        )
        _require(
            self.region is None or self.country is not None,
            "energy.region",
            self.region,
            "null unless energy.country is set",
        )
        _require(
            self.intensity_g_per_kwh is None or self.intensity_g_per_kwh >= 0,
            "energy.intensity_g_per_kwh",
            self.intensity_g_per_kwh,
            "a number of at least 0, or null",
        )
        _require(
            self.intensity_g_per_kwh is None or self.country is None,
            "energy.intensity_g_per_kwh",
            self.intensity_g_per_kwh,
            f"null where energy.country ({self.country}) is set: give one of the two",
        )
        _require(self.pue >= 1, "energy.pue", self.pue, "a number of at least 1")


@dataclass(frozen=True)
class TrackingConfig:
    """Where the numbers go besides the run's own events.jsonl."""

    trackers: list[TrackerName] = field(default_factory=list)
    """Mirrors of events.jsonl: wandb, tensorboard, or another of Accelerate's trackers whose package is installed."""
    project: str = "greenprune"
    """W&B project."""
    group: str | None = None
    """W&B group; null: the Slurm array that the run belongs to, else runs that differ in their seed alone."""
    mode: Literal["auto", "online", "offline"] = "auto"
    """How W&B runs: auto is online if you are logged in, else offline."""
    log_every: int = 10
    """Steps between two train events; the loss is read from the device only then."""

    def __post_init__(self) -> None:
        _require(self.log_every >= 1, "tracking.log_every", self.log_every, "a whole number of at least 1")


@dataclass(frozen=True)
class CheckpointConfig:
    """When the run is saved."""

    every: int = 1
    """Epochs between two checkpoints; the last epoch and an interrupt always write one."""
    keep_last: int = 2
    """How many of the newest checkpoints stay on disk."""
    keep_best: int = 0
    """How many checkpoints with the highest accuracy stay besides; those of epochs before all removals count too."""

    def __post_init__(self) -> None:
        _require(self.every >= 1, "checkpoint.every", self.every, "a whole number of at least 1")
        _require(self.keep_last >= 1, "checkpoint.keep_last", self.keep_last, "a whole number of at least 1")
        _require(self.keep_best >= 0, "checkpoint.keep_best", self.keep_best, "a whole number of at least 0")


@dataclass(frozen=True)
class Config:
    """One complete run."""

    seed: int = 0
    """Seed of the weights, of the order of the samples and of their augmentation."""
    output_dir: str = "runs"
    """Folder below which every run has a folder of its own."""
    run_name: str | None = None
    """Name of the run's folder. Unset: made from data, model, budget and seed, with a number if it is taken."""
    resume: str = "never"
    """never: start anew; auto: go on from the run's last checkpoint if there is one; or the path of a checkpoint. All
    fields that shape the result have to be those the run was started with."""
    precision: Precision = "no"
    """Mixed precision of the network: no (fp32), bf16 or fp16 (GPU only). Gates and penalties are always fp32."""
    device: Literal["auto", "cpu"] = "auto"
    """auto: the GPU if there is one; cpu: never the GPU."""
    stall_s: float = 600.0
    """Seconds without a step after which a run of several processes counts as hung and is ended."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    gate: GateConfig = field(default_factory=GateConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    removal: RemovalConfig = field(default_factory=RemovalConfig)
    surgery: SurgeryConfig = field(default_factory=SurgeryConfig)
    energy: EnergyConfig = field(default_factory=EnergyConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        _require(self.stall_s > 0, "stall_s", self.stall_s, "a number of seconds above 0")
        _require(0 <= self.seed < 2**31, "seed", self.seed, "a whole number in [0, 2^31)")
        _require(
            self.run_name is None or (re.fullmatch(r"[\w.+-]+", self.run_name) is not None and self.run_name[0] != "."),
            "run_name",
            self.run_name,
            "a folder name of letters, digits and _ . + -",
        )
        _require(
            self.data.batch_size % self.optim.accumulate == 0,
            "optim.accumulate",
            self.optim.accumulate,
            f"a divisor of data.batch_size ({self.data.batch_size})",
        )
        if self.gate.enabled:
            _require(
                self.removal.decide_by > self.gate.warmup,
                "removal.decide_by",
                self.removal.decide_by,
                f"more than gate.warmup ({self.gate.warmup})",
            )
            _require(
                self.budget.unit != "blocks" or self.gate.units == ["block"],
                "budget.unit",
                self.budget.unit,
                f"flops or params where channels are gated (gate.units {self.gate.units})",
            )

    def to_dict(self) -> dict[str, Any]:
        """The config as nested dictionaries of plain values, as YAML and JSON hold it."""
        return dataclasses.asdict(self)

    def identity(self) -> str:
        """A digest of everything that shapes the result: two configs with the same identity are the same run."""
        return hashlib.sha256(json.dumps(shaping_values(self.to_dict()), sort_keys=True).encode()).hexdigest()[:16]


_NOT_SHAPING = ("output_dir", "run_name", "resume", "device", "stall_s", "energy", "tracking", "checkpoint")
_NOT_SHAPING_PARTS = ("data.root", "data.download", "data.workers", "data.eval_batch_size", "model.compile")
MAY_CHANGE = ", ".join((*_NOT_SHAPING[:5], *(f"{section}.*" for section in _NOT_SHAPING[5:]), *_NOT_SHAPING_PARTS))
"""What may be changed when a run goes on, for people: nothing of it shapes the result."""


def shaping_values(values: dict[str, Any]) -> dict[str, Any]:
    """The fields of a config that shape the result, by their dotted names.

    Args:
        values: A config as :meth:`Config.to_dict` gives it, or as config.yaml holds it.
    """
    gated = values["gate"]["enabled"]
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if key in _NOT_SHAPING or (key in ("budget", "removal", "surgery", "gate") and not gated):
            continue
        if isinstance(value, dict):
            flat.update({f"{key}.{name}": item for name, item in value.items()})
        else:
            flat[key] = value
    flat["gate.enabled"] = gated
    return {key: value for key, value in flat.items() if key not in _NOT_SHAPING_PARTS}


def config_parser(prog: str = "train.py") -> ArgumentParser:
    """The parser of a run's flags: ``--config FILE`` and one flag for each field, with its docstring as help."""
    parser = ArgumentParser(
        prog=prog,
        description="Train a gated network and remove what it does not need while it trains.",
        exit_on_error=False,
        parser_mode="greenprune",
    )
    parser.add_argument("--config", action="config", help="YAML file with one complete run; later flags override it")
    parser.add_class_arguments(Config, nested_key=None)
    return parser


def _fields(cls: type, prefix: str = "") -> dict[str, bool]:
    """All dotted field names of a config dataclass, and whether each may be null."""
    found: dict[str, bool] = {}
    for item in dataclasses.fields(cls):
        default = item.default_factory() if item.default_factory is not dataclasses.MISSING else item.default
        if dataclasses.is_dataclass(default):
            found |= _fields(type(default), f"{prefix}{item.name}.")
        else:
            found[prefix + item.name] = "None" in str(item.type)
    return found


_FIELDS = _fields(Config)


def _check_file(path: Path) -> None:
    """Check that a config file is YAML with known keys, to name what is wrong better than the parser does.

    Raises:
        ConfigError: The file is missing, is not YAML, or has a key that no field has.
    """
    try:
        values = load_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config: cannot read {str(path)!r} ({error.strerror}); expected a YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config: {str(path)!r} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"--config: {str(path)!r} holds no fields; expected one YAML mapping with a complete run")
    known = list(_FIELDS)
    sections = {name.split(".")[0] for name in known if "." in name}
    for key, value in values.items():
        if key in sections and isinstance(value, dict):
            for name, item in value.items():
                _check_key(f"{key}.{name}", known)
                _check_null(f"{key}.{name}", item)
        elif key in sections:
            valid = [name for name in known if name.startswith(f"{key}.")]
            raise ConfigError(f"{key}: {value!r} is not valid; expected a mapping of {', '.join(valid)}")
        else:
            _check_key(str(key), known)
            _check_null(str(key), value)


def _check_null(key: str, value: object) -> None:
    """Refuse null (a key with nothing after it) where a field needs a value."""
    if value is None and not _FIELDS[key]:
        raise ConfigError(f"{key}: null is not valid; expected a value, or no such line to have the default")


def _check_key(key: str, known: list[str]) -> None:
    if key in known:
        return
    section = key.split(".", maxsplit=1)[0]
    siblings = [name for name in known if name.startswith(f"{section}.")] if "." in key else []
    siblings = siblings or sorted({name.split(".")[0] for name in known})
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    hint = f"did you mean {close[0]}? " if close else ""
    shown = key if key.isprintable() and key.strip() else repr(key)
    raise ConfigError(f"{shown}: unknown key; {hint}valid here: {', '.join(siblings)}")


def check_field(key: str) -> None:
    """Check that a config has a field of this dotted name.

    Raises:
        ConfigError: It has none; the message names the closest one.
    """
    _check_key(key, list(_FIELDS))


def parse_config(args: list[str], prog: str = "train.py") -> Config:
    """Turn command-line arguments, with the YAML files they name, into a validated config.

    Args:
        args: The arguments without the program's name.
        prog: Program name for the help text.

    Raises:
        ConfigError: Any key, type or value is wrong.
        SystemExit: ``--help`` was asked for (code 0).
    """
    known = list(_FIELDS)
    for index, arg in enumerate(args):
        if arg == "--config" and index + 1 < len(args):
            _check_file(Path(args[index + 1]))
        elif arg.startswith("--config="):
            _check_file(Path(arg.removeprefix("--config=")))
        elif arg.startswith("--") and arg not in ("--help", "--config", "--print_config"):
            _check_key(arg[2:].split("=")[0].split("+")[0], known)
    parser = config_parser(prog)
    try:
        namespace = parser.parse_args(args)
        config = parser.instantiate(namespace)
    except ConfigError:
        raise
    except (jsonargparse.ArgumentError, TypeError) as error:
        raise ConfigError(plain_message(error)) from None
    except ValueError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, ConfigError):
            cause = cause.__cause__ or cause.__context__
        raise cause if isinstance(cause, ConfigError) else ConfigError(plain_message(error)) from None
    values = {item.name: config[item.name] for item in dataclasses.fields(Config)}
    return Config(**values)


def load_config(path: Path, overrides: dict[str, Any] | None = None) -> Config:
    """Read a complete run from a YAML file, with fields given by their dotted names replaced.

    Raises:
        ConfigError: Any key, type or value is wrong.
    """
    words = {key: value if isinstance(value, str) else json.dumps(value) for key, value in (overrides or {}).items()}
    flags = [f"--{key}={word}" for key, word in words.items()]
    return parse_config([f"--config={path}", *flags])


def dump_config(config: Config) -> str:
    """The config as YAML that :func:`load_config` reads back."""
    return yaml.safe_dump(config.to_dict(), sort_keys=False)


def plain_message(error: BaseException) -> str:
    """One line from a parser's message, without its own preamble."""
    text = " ".join(str(error).split())
    found = re.search(r'[Kk]ey "?([\w.]+)"?:? ?(.*)', text)
    text = f"{found[1]}: {found[2]}" if found else text
    text = re.sub(r"typing\.Literal\[(.*?)\]", r"one of \1", text)
    return re.sub(r"Expected an? <class '(\w+)'>", r"Expected a value of type \1", text)
