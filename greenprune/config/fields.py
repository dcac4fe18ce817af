"""The configuration of one run: frozen dataclasses, each of which refuses what cannot be run."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from greenprune.config.checked import Checked, ConfigError

GateKind = Literal["conditional", "static"]
UnitKind = Literal["block", "channel"]
TrackerName = Literal["wandb", "tensorboard", "aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "trackio"]
BudgetUnit = Literal["flops", "params", "blocks", "time", "energy"]
Precision = Literal["no", "bf16", "fp16"]


def _require(condition: bool, key: str, value: object, valid: str) -> None:
    if not condition or value == math.inf:
        raise ConfigError(f"{key}: {value!r} is not valid; expected {valid}")


_LONGEST_NAME = 240  # of the 255 bytes that file systems take, less what a folder's temporary name has besides


def _require_path(path: str | None, key: str) -> None:
    """Refuse what only a shell reads as the home folder: a folder named ``~`` would be made in its place."""
    _require(
        path is None or not path.startswith("~"),
        key,
        path,
        "a path without ~, which only a shell replaces by your home folder (./~ for a folder of that name)",
    )


@dataclass(frozen=True)
class ModelConfig(Checked):
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
    cuda_graph: bool = True
    """Record the passes of a step once for each structure and replay them, so that the host starts one graph instead of
    a thousand kernels: one process on one GPU, without DeepSpeed and model.compile. To be turned off for networks of
    one's own whose forward pass looks at the device or draws random numbers on the host."""
    structure: str | None = None
    """What is removed before training begins: the folder of a run that found it, its structure.json, or the removals as
    text, as which the run keeps them: remove UNIT UNIT[CHANNELS] ... Without gates what a run has found is so trained
    from scratch; with gates more may go."""


@dataclass(frozen=True)
class DataConfig(Checked):
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

    def _check(self) -> None:
        _require(self.batch_size >= 1, "data.batch_size", self.batch_size, "a whole number of at least 1")
        _require(self.eval_batch_size >= 1, "data.eval_batch_size", self.eval_batch_size, "at least 1")
        _require(0 <= self.validation < 1, "data.validation", self.validation, "a share in [0, 1)")
        _require(self.workers >= 0, "data.workers", self.workers, "a whole number of at least 0")
        _require(self.image_size is None or self.image_size >= 8, "data.image_size", self.image_size, "at least 8")
        _require_path(self.root, "data.root")


@dataclass(frozen=True)
class OptimConfig(Checked):
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

    def _check(self) -> None:
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
class GateConfig(Checked):
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
    lr: float | None = None
    """Sum of the gates' learning rate over the run, constant in it: a step uses gate.lr divided by the run's steps.
    null: the square root of the number of samples that gates learn from in the run, to two digits, as fast as the noise
    of their gradient allows; with adamw, whose steps do not grow with the gradient, 30."""
    polarization: float = 0.1
    """Weight of the polarization regularizer."""
    every: int = 4
    """Gates learn from every so many-th sample of a batch, with so many times its gradient: 1 is every sample. They
    decide for all of them, and removals are by what they decided for all of them."""

    def _check(self) -> None:
        _require(self.every >= 1, "gate.every", self.every, "a whole number of at least 1")
        _require(0 <= self.warmup < 1, "gate.warmup", self.warmup, "a share in [0, 1)")
        _require(0.5 < self.openness < 1, "gate.openness", self.openness, "a number in (0.5, 1)")
        _require(self.lr is None or self.lr > 0, "gate.lr", self.lr, "a number above 0 or null")
        _require(self.polarization >= 0, "gate.polarization", self.polarization, "a number of at least 0")
        _require(
            len(self.units) == len(set(self.units)) and len(self.units) > 0,
            "gate.units",
            self.units,
            "a list without repeats of " + ", ".join(get_args(UnitKind)),
        )

    def lr_of_step(self, total_steps: float, batch_size: int, *, adaptive: bool) -> float:
        """Learning rate of the gates in each step.

        Args:
            total_steps: Steps of the whole run.
            batch_size: Samples of a step, over all ranks.
            adaptive: Whether the optimizer's steps are as large for a small gradient as for a large one, as Adam's are.
        """
        if self.lr is not None:
            return self.lr / total_steps
        as_fast_as_noise_allows = math.sqrt(total_steps * batch_size / self.every)
        return (30.0 if adaptive else float(f"{as_fast_as_noise_allows:.2g}")) / total_steps


@dataclass(frozen=True)
class BudgetConfig(Checked):
    """How much of the dense network's cost is kept."""

    target: float = 0.5
    """Share of the dense network's cost to keep, in (0, 1]."""
    unit: BudgetUnit = "flops"
    """What cost is counted in: flops (forward pass), params, blocks, or time or energy (of the forward and backward
    pass of a training step, measured for each block on this device at the start of the run; for units [block]; energy
    needs a device with a counter of joules)."""

    def _check(self) -> None:
        _require(0 < self.target <= 1, "budget.target", self.target, "a share in (0, 1]")


@dataclass(frozen=True)
class RemovalConfig(Checked):
    """When units leave the network for good."""

    window: int | None = None
    """Steps over which a unit must be off for every sample to be removed. Unset: one epoch, or, if shorter, a 25th
    of the run but at least 10,000 samples."""
    freeze_after: int = 3
    """Windows over which a unit must be on for every sample to lose its gate. Before the budget is met a unit whose
    gate is gone could no longer be chosen, so units freeze only then."""
    decide_by: float = 0.2
    """Share of the run after which no unit is undecided: what is left is settled against the budget."""

    def _check(self) -> None:
        _require(self.window is None or self.window >= 1, "removal.window", self.window, "at least 1 step, or null")
        _require(self.freeze_after >= 1, "removal.freeze_after", self.freeze_after, "a whole number of at least 1")
        _require(0 < self.decide_by <= 1, "removal.decide_by", self.decide_by, "a share in (0, 1]")


@dataclass(frozen=True)
class SurgeryConfig(Checked):
    """How units are taken out."""

    round_to: int | None = None
    """Sets of channels shrink to multiples of this number, which kernels prefer. Unset: 8 on a GPU, 1 on a CPU.

    A run that goes on elsewhere keeps the one it began with."""

    def _check(self) -> None:
        _require(self.round_to is None or self.round_to >= 1, "surgery.round_to", self.round_to, "at least 1, or null")


@dataclass(frozen=True)
class EnergyConfig(Checked):
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

    def _check(self) -> None:
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
class TrackingConfig(Checked):
    """Where the numbers go besides the run's own events.jsonl."""

    trackers: list[TrackerName] = field(default_factory=list)
    """Mirrors of events.jsonl: wandb, tensorboard, or another of Accelerate's trackers whose package is installed."""
    project: str = "greenprune"
    """W&B project."""
    group: str | None = None
    """W&B group; null: the Slurm array that the run belongs to, else runs that differ in their seed alone."""
    mode: Literal["auto", "online", "offline"] = "auto"
    """How W&B runs: auto is online if you are logged in, else offline."""
    log_every: int | None = None
    """Steps between two train events; the loss and the meters are read only then. Unset: ten, or as many as take a
    second where that is more."""

    def _check(self) -> None:
        valid = self.log_every is None or self.log_every >= 1
        _require(valid, "tracking.log_every", self.log_every, "null or a whole number of at least 1")


@dataclass(frozen=True)
class CheckpointConfig(Checked):
    """When the run is saved."""

    every: int = 1
    """Epochs between two checkpoints; the last epoch and an interrupt always write one."""
    keep_last: int = 2
    """How many of the newest checkpoints stay on disk."""
    keep_best: int = 0
    """How many checkpoints with the highest accuracy stay besides; those of epochs before all removals count too."""

    def _check(self) -> None:
        _require(self.every >= 1, "checkpoint.every", self.every, "a whole number of at least 1")
        _require(self.keep_last >= 1, "checkpoint.keep_last", self.keep_last, "a whole number of at least 1")
        _require(self.keep_best >= 0, "checkpoint.keep_best", self.keep_best, "a whole number of at least 0")


@dataclass(frozen=True)
class Config(Checked):
    """One complete run."""

    seed: int = 0
    """Seed of the weights, of the order of the samples and of their augmentation."""
    output_dir: str = "runs"
    """Folder below which every run has a folder of its own."""
    run_name: str | None = None
    """Name of the run's folder. Unset: made from data, model, budget and seed, with a number if it is taken."""
    resume: str = "never"
    """never: start anew; auto: go on from the run's last checkpoint if there is one, and do no finished run again; or
    the path of a checkpoint. All fields that shape the result have to be those the run was started with."""
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

    def _check(self) -> None:
        _require(self.stall_s > 0, "stall_s", self.stall_s, "a number of seconds above 0")
        _require(0 <= self.seed < 2**31, "seed", self.seed, "a whole number in [0, 2^31)")
        _require(
            self.run_name is None or (re.fullmatch(r"[\w.+-]+", self.run_name) is not None and self.run_name[0] != "."),
            "run_name",
            self.run_name,
            "a folder name of letters, digits and _ . + -",
        )
        _require(
            len((self.run_name or "").encode()) <= _LONGEST_NAME,
            "run_name",
            self.run_name,
            f"a folder name of at most {_LONGEST_NAME} bytes",
        )
        _require_path(self.output_dir, "output_dir")
        _require(
            self.data.batch_size % self.optim.accumulate == 0,
            "optim.accumulate",
            self.optim.accumulate,
            f"a divisor of data.batch_size ({self.data.batch_size})",
        )
        if self.gate.enabled:
            check_deadline(self.removal, self.gate)
            check_budget_unit(self.budget, self.gate)

    @property
    def is_dense(self) -> bool:
        """Whether nothing is gated, and nothing removed before training: the run is a dense twin."""
        return not self.gate.enabled and self.model.structure is None

    def to_dict(self) -> dict[str, Any]:
        """The config as nested dictionaries of plain values, as YAML and JSON hold it."""
        return dataclasses.asdict(self)

    def identity(self) -> str:
        """A digest of everything that shapes the result: two configs with the same identity are the same run."""
        return hashlib.sha256(json.dumps(shaping_values(self.to_dict()), sort_keys=True).encode()).hexdigest()[:16]


def check_deadline(removal: RemovalConfig, gate: GateConfig) -> None:
    """Check that there is time between the warm-up and the deadline.

    Raises:
        ConfigError: There is none.
    """
    _require(
        removal.decide_by > gate.warmup,
        "removal.decide_by",
        removal.decide_by,
        f"more than gate.warmup ({gate.warmup})",
    )


def check_budget_unit(budget: BudgetConfig, gate: GateConfig) -> None:
    """Check that a budget's unit can be counted for what is gated.

    Raises:
        ConfigError: It counts whole blocks, and channels are gated.
    """
    _require(
        budget.unit not in ("blocks", "time", "energy") or gate.units == ["block"],
        "budget.unit",
        budget.unit,
        f"flops or params where channels are gated (gate.units {gate.units})",
    )


_NOT_SHAPING = (
    *("output_dir", "run_name", "resume", "device", "stall_s"),
    *("data.root", "data.download", "data.workers", "data.eval_batch_size"),
    *("model.compile", "model.cuda_graph"),
)
_NOT_SHAPING_SECTIONS = ("energy", "tracking", "checkpoint")
MAY_CHANGE = ", ".join((*_NOT_SHAPING, *(f"{section}.*" for section in _NOT_SHAPING_SECTIONS)))
"""What may be changed when a run goes on, for people: nothing of it shapes the result."""


def shaping_values(values: dict[str, Any]) -> dict[str, Any]:
    """The fields of a config that shape the result, by their dotted names.

    Args:
        values: A config as :meth:`Config.to_dict` gives it, or as config.yaml holds it.
    """
    gated = values["gate"]["enabled"]
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if key in _NOT_SHAPING_SECTIONS or (key in ("budget", "removal", "surgery", "gate") and not gated):
            continue
        if isinstance(value, dict):
            flat.update({f"{key}.{name}": item for name, item in value.items()})
        else:
            flat[key] = value
    flat["gate.enabled"] = gated
    return {key: value for key, value in flat.items() if key not in _NOT_SHAPING}
