"""From a finished run, or a network at hand, to a folder that someone without greenprune can use."""

from __future__ import annotations

import copy
import dataclasses
import importlib.metadata
import json
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from greenprune.checkpoint import CheckpointCorrupt, list_checkpoints, load_checkpoint
from greenprune.config import Config, ConfigError, UserError, load_config
from greenprune.data import ImageData, data_error_by_flags, open_data
from greenprune.export.card import model_card
from greenprune.export.formats import (
    FILES,
    WITH_SOURCE,
    ExportError,
    check_format,
    load_written,
    write_network,
    write_text,
)
from greenprune.export.plain import NoPlainForm, fold_batch_norm, plain_network
from greenprune.export.target import naming_the_target, new_folder, refuse_existing
from greenprune.formatting import format_counted
from greenprune.gating import find_gates
from greenprune.models import build_model
from greenprune.surgery import Structure, StructureMismatch, refuse_wrapped, replay
from greenprune.tracking import RunFolder, gpus_of_attempt, read_attempts, write_json

TOLERANCE = 1e-5
"""Largest difference of a logit from the trained network's, relative to the largest logit, in fp32."""

RECORD = "export.json"
CHECKED_IMAGES = 16

_FORMAT = 1
_RECORDED = frozenset(
    (
        "format",
        "kind",
        "name",
        "model",
        "input",
        "summary",
        "made_with",
        "classes",
        "weights_bytes",
        "batch_norms_folded",
    )
)
_SUMMARISED = frozenset(
    [
        "model",
        "data",
        "gated",
        "steps",
        "accuracy",
        "accuracy_kind",
        "precision",
        "params",
        "params_dense",
        "flops_forward",
        "flops_forward_dense",
        "flops_train",
        "flops_train_dense",
        "blocks",
        "blocks_dense",
        "removals",
        "energy_j",
        "energy_quality",
        "energy_by_device_j",
        "co2_g",
        "carbon_intensity_g_per_kwh",
    ]
)


@dataclasses.dataclass(frozen=True)
class Exported:
    """An exported network.

    Attributes:
        path: Its folder.
        record: Content of its export.json.
        seconds: What the export took, the check included.
    """

    path: Path
    record: dict[str, Any]
    seconds: float

    @property
    def max_relative_logit_difference(self) -> float:
        """Largest difference of a logit from the trained network's, relative to the largest logit."""
        return float(self.record["check"]["max_relative_logit_difference"])

    def __str__(self) -> str:
        check = self.record["check"]
        files = ", ".join(sorted(path.name for path in self.path.iterdir()))
        folded = self.record["batch_norms_folded"]
        return (
            f"exported to {self.path} in {self.seconds:.1f} s: {files}\n"
            f"loaded back with {check['engine']} and compared on {check['images']} images of {check['data']}: largest "
            f"relative logit difference {self.max_relative_logit_difference:.1e} (at most {TOLERANCE:.0e})"
            + (f"\nbatch norms folded: {folded}" if folded else "")
        )


@dataclasses.dataclass(frozen=True)
class TrainedRun:
    """A finished run with its network.

    Attributes:
        folder: The run's folder.
        config: Its config.
        summary: Its summary.
        data: Its data.
        model: Its network, without gates, in evaluation mode on the CPU.
    """

    folder: RunFolder
    config: Config
    summary: dict[str, Any]
    data: ImageData
    model: nn.Module


def export_run(
    run: Path | str,
    kind: str,
    output: Path | str | None = None,
    *,
    fold_batch_norm: bool = False,
    opset: int | None = None,
    data_root: str | None = None,
    default_root: str | None = None,
) -> Exported:
    """Export the network of a finished run, and check it against the trained one on images of the run's data.

    Args:
        run: The run's folder.
        kind: The format: torch, torch.export, onnx, safetensors or hf.
        output: Folder to write, which must not be there; None: ``export/<format>`` in the run's folder.
        fold_batch_norm: Fold batch normalisation into the convolutions before it.
        opset: ONNX operator set; None: the exporter's own choice.
        data_root: Folder of the data set; None: the one that the run's config names.
        default_root: Folder of the data set if the config names none, or none that is here.

    Raises:
        UserError: The run is not finished or still has gates, the format cannot hold its network, or the output is
            there or cannot be written. Nothing is left of it.
        CheckpointCorrupt: The run's files are damaged.
    """
    started = time.monotonic()
    check_format(kind, opset)
    target = Path(output) if output is not None else Path(run) / "export" / kind
    refuse_existing(target)
    trained = open_run(Path(run), data_root, default_root)
    mean, std = trained.data.normalisation
    record = {
        "name": trained.folder.path.resolve().name,
        "model": dataclasses.asdict(trained.config.model),
        "input": {"mean": mean, "std": std},
        "country": trained.config.energy.region or trained.config.energy.country,
        "hardware": _hardware(trained.folder),
        "summary": trained.summary,
    }
    images = next(trained.data.eval_batches())[0]
    about = f"{record['name']}: {trained.summary['model']} for {trained.data.name}, in plain PyTorch."
    return _export(
        trained.model,
        images,
        kind,
        target,
        record,
        about=about,
        checked_on=trained.data.name,
        fold=fold_batch_norm,
        opset=opset,
        started=started,
    )


def export_network(
    model: nn.Module,
    images: Tensor,
    kind: str,
    output: Path | str,
    *,
    fold_batch_norm: bool = False,
    opset: int | None = None,
) -> Exported:
    """Export a network at hand, such as one that a :class:`greenprune.Pruner` has finished, in fp32.

    Args:
        model: The network, without gates and unwrapped; it is left as it is.
        images: Real images [B, C, H, W], B at least 2: what is written is checked on them.
        kind: The format: torch, torch.export, onnx, safetensors or hf.
        output: Folder to write, which must not be there.
        fold_batch_norm: Fold batch normalisation into the convolutions before it.
        opset: ONNX operator set; None: the exporter's own choice.

    Raises:
        UserError: The network is wrapped, still has gates, or gives something other than logits, the images are none,
            the format cannot hold it, or the output is there or cannot be written. Nothing is left of it.
    """
    started = time.monotonic()
    check_format(kind, opset)
    refuse_existing(Path(output))
    try:
        refuse_wrapped(model)
    except TypeError as error:
        raise ExportError(f"the network is wrapped ({error}); expected the network itself") from None
    gates = find_gates(model)
    if gates:
        raise ExportError(f"the network is undecided (gates left: {len(gates)}); expected a call of finalize first")
    if not isinstance(images, Tensor):
        raise ExportError(f"images: a {type(images).__name__} is not valid; expected a tensor of images [B, C, H, W]")
    if images.dim() != 4:
        raise ExportError(f"images: a tensor of shape {tuple(images.shape)} is not valid; expected images [B, C, H, W]")
    if len(images) < 2:
        raise ExportError(f"images: {len(images)} image is not enough to check with; expected at least 2")
    name = type(model).__name__
    record = {
        "name": name,
        "model": None,
        "input": {"mean": None, "std": None},
        "country": None,
        "hardware": None,
        "summary": None,
    }
    return _export(
        copy.deepcopy(model).cpu().float().eval(),
        images.cpu().float() if images.is_floating_point() else images.cpu(),
        kind,
        Path(output),
        record,
        about=f"{name}, in plain PyTorch.",
        checked_on="the caller",
        fold=fold_batch_norm,
        opset=opset,
        started=started,
    )


def _export(  # noqa: PLR0913 -- what both ways in differ in
    model: nn.Module,
    images: Tensor,
    kind: str,
    target: Path,
    record: dict[str, Any],
    *,
    about: str,
    checked_on: str,
    fold: bool,
    opset: int | None,
    started: float,
) -> Exported:
    network, folded = form_to_write(model, kind, fold)
    with torch.no_grad():
        expected = [_logits(model(some), named=network is not model) for some in (images, images[:1])]
    versions = {"greenprune": importlib.metadata.version("greenprune"), "torch": torch.__version__}
    with new_folder(target) as folder:
        with naming_the_target(folder, target):
            written = write_network(kind, network, images, folder, about=about, opset=opset)
        loaded = load_written(kind, folder)
        with torch.no_grad():
            found = [loaded.run(images), loaded.run(images[:1])]
        difference = max(_relative_difference(a, b) for a, b in zip(found, expected, strict=True))
        if not difference <= TOLERANCE:
            raise ExportError(
                f"--format: {kind!r} computes other logits than the trained network (largest relative difference "
                f"{difference:.1e}, expected at most {TOLERANCE:.0e}); nothing was written"
                + ("; without --fold-batch-norm it may be less" if fold else "")
            )
        record = {
            "format": _FORMAT,
            "kind": kind,
            **record,
            "made_with": versions | written,
            "input": {"shape": list(images.shape[1:]), **record["input"]},
            "classes": expected[0].shape[1],
            "weights_bytes": weights_bytes(network),
            "batch_norms_folded": folded,
            "check": {
                "max_relative_logit_difference": difference,
                "tolerance": TOLERANCE,
                "images": len(images),
                "data": checked_on,
                "engine": loaded.engine,
            },
        }
        with naming_the_target(folder, target):
            write_json(folder / RECORD, record)
            write_text(folder / "README.md", model_card(record))
    return Exported(target, record, time.monotonic() - started)


def form_to_write(model: nn.Module, kind: str, fold: bool) -> tuple[nn.Module, int]:
    """The network in the form that is written, and how many batch norms were folded.

    Raises:
        ExportError: The form that is asked for needs a plain network, and there is none.
    """
    try:
        plain = plain_network(model)
    except NoPlainForm as error:
        if kind in WITH_SOURCE:
            raise ExportError(
                f"--format: {kind!r} cannot be written: {error}; torch.export and onnx need no plain form"
            ) from None
        if fold:
            raise ExportError(f"--fold-batch-norm: not possible: {error}; expected an export without it") from None
        return model, 0
    folded = fold_batch_norm(plain) if fold else 0
    return plain.requires_grad_(False), folded


def weights_bytes(network: nn.Module) -> int:
    """Bytes of a network's parameters and buffers."""
    return sum(tensor.numel() * tensor.element_size() for tensor in network.state_dict().values())


def _logits(output: object, *, named: bool) -> Tensor:
    """What a network gives, if it is what can be exported.

    Args:
        output: What it gives.
        named: Whether they may be in a mapping, as transformers has it: the plain form gives the logits alone.

    Raises:
        ExportError: It is not one tensor with a dimension of classes.
    """
    if named and isinstance(output, Mapping) and "logits" in output:
        output = output["logits"]
    if not isinstance(output, Tensor):
        raise ExportError(f"the network gives a {type(output).__name__}; expected one tensor of logits [B, classes]")
    if output.dim() < 2:
        raise ExportError(f"the network gives a tensor of shape {tuple(output.shape)}; expected logits [B, classes]")
    return output


def _relative_difference(found: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest logit; 0 of two that are all 0, as an untrained head may give."""
    if found.shape != expected.shape:
        return float("inf")
    difference = (found - expected).abs().max()
    return float(difference / expected.abs().max()) if difference else 0.0


def open_run(path: Path, data_root: str | None, default_root: str | None = None) -> TrainedRun:
    """The network of a finished run as it was trained, and the run's data.

    Args:
        path: The run's folder.
        data_root: Folder of the data set; None: the one that the run's config names.
        default_root: Folder of the data set if the config names none, or none that is here.

    Raises:
        UserError: It is no run, or not a finished one without gates, or its data is not there, or another set is.
        CheckpointCorrupt: The run's files are damaged, or do not belong together.
    """
    folder = RunFolder(path)
    if not folder.config.is_file():
        raise UserError(f"RUN: {str(path)!r} is not the folder of a run; expected one with config.yaml in it")
    config = load_config(folder.config)
    checkpoints = list_checkpoints(folder.checkpoints)
    if not folder.summary.is_file():
        done = f"{checkpoints[-1].name} is its newest checkpoint" if checkpoints else "it has no checkpoint yet"
        raise UserError(
            f"RUN: {str(path)!r} is not finished ({done}); expected a finished run: go on with greenprune train "
            f"{shlex.join(_flags_to_go_on(folder, config, checkpoints))}"
        )
    summary = _read_json(folder.summary)
    if not summary.keys() >= _SUMMARISED:
        raise CheckpointCorrupt(f"{folder.summary}: lacks {', '.join(sorted(_SUMMARISED - summary.keys()))}")
    if not checkpoints:
        raise UserError(f"RUN: {str(path)!r} has no checkpoint; expected a run's folder with checkpoints/")
    checkpoint = load_checkpoint(checkpoints[-1])
    if checkpoint.state["step"] != summary["steps"]:
        raise CheckpointCorrupt(f"{checkpoints[-1]}: not the end of the run, which took {summary['steps']} steps")
    if _read_json(folder.structure) != checkpoint.state["structure"]:
        raise CheckpointCorrupt(f"{folder.structure}: not the structure of {checkpoints[-1].name}")
    wanted = dataclasses.replace(config.data, eval_batch_size=CHECKED_IMAGES)  # more need not be read from files
    own_root = config.data.root
    if own_root is None or (default_root is not None and not Path(own_root).is_dir()):
        own_root = default_root
    try:
        data = open_data(wanted, data_root or own_root, config.seed)
    except UserError as error:
        raise data_error_by_flags(error, root="--root") from None
    if summary.get("data_digest", data.digest) != data.digest:
        raise UserError(
            f"--root: {data_root or own_root!r} holds another {data.name} than the one that the run was trained on; "
            "expected the same files"
        )
    model = build_model(config.model, classes=data.classes, channels=data.channels, image_size=data.image_size)
    try:
        replay(Structure.from_dict(checkpoint.state["structure"]), model)
    except StructureMismatch as error:
        raise CheckpointCorrupt(f"{folder.structure}: {error}") from None
    # A run with a moving average of the weights was evaluated with it.
    _load_tensors(model, checkpoint.training.get("average") or checkpoint.model, path, checkpoints[-1])
    return TrainedRun(folder, config, summary, data, model.eval())


def _load_tensors(model: nn.Module, tensors: dict[str, Tensor], run: Path, checkpoint: Path) -> None:
    """Load a checkpoint's tensors into the network, all of them and no other.

    Raises:
        UserError: There are tensors of gates among them.
        CheckpointCorrupt: They are not those of the network.
    """
    expected = model.state_dict()
    gates = {name.rpartition(".")[0] for name in tensors.keys() - expected.keys() if "gate" in name.split(".")}
    if gates:
        raise UserError(
            f"RUN: {str(run)!r} is undecided (gates left in {checkpoint.name}: {len(gates)}); expected a finished "
            "run, whose units are all kept or removed"
        )
    wrong = sorted(tensors.keys() ^ expected.keys())
    wrong += sorted(name for name in tensors.keys() & expected.keys() if tensors[name].shape != expected[name].shape)
    if wrong:
        raise CheckpointCorrupt(f"{checkpoint}: does not fit the run's structure, first at {wrong[0]}")
    model.load_state_dict(tensors)


def _flags_to_go_on(folder: RunFolder, config: Config, checkpoints: Sequence[Path]) -> list[str]:
    """Flags of train that go on with a run wherever its folder was moved, and whatever it is called since."""
    try:
        dataclasses.replace(config, run_name=folder.path.name)
        how = ["--output_dir", str(folder.path.parent), "--run_name", folder.path.name, "--resume", "auto"]
    except ConfigError:  # no name that a run may have, or "." from within the folder
        how = ["--resume", str(checkpoints[-1]) if checkpoints else "auto"]
    return ["--config", str(folder.config), *how]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        why = (isinstance(error, OSError) and error.strerror) or " ".join(str(error).split())[:200]
        raise CheckpointCorrupt(f"{path}: cannot be read ({why})") from None
    if not isinstance(values, dict):
        raise CheckpointCorrupt(f"{path}: not a JSON object")
    return values


def _hardware(folder: RunFolder) -> str | None:
    """What the last attempt of a run computed on; None if it is not recorded."""
    if not folder.provenance.is_file():
        return None
    try:
        attempts = read_attempts(folder.provenance)
    except OSError:
        return None
    if not attempts:
        return None
    on_gpu = str(attempts[-1].get("device", "")).startswith("cuda")
    names = gpus_of_attempt(attempts[-1]) if on_gpu else [str(attempts[-1].get("cpu"))]
    return format_counted(names) or None


def read_record(path: Path) -> tuple[Path, dict[str, Any]]:
    """The folder of an exported network and what its export.json says.

    Args:
        path: The folder, or a file in it.

    Raises:
        UserError: There is no exported network.
    """
    folder = path if path.is_dir() else path.parent
    expected = (
        f"expected a folder that greenprune export wrote, or the {', '.join(dict.fromkeys(FILES.values()))} in it"
    )
    if not path.exists():
        raise UserError(f"FILE: {str(path)!r} does not exist; {expected}")
    try:
        record = json.loads((folder / RECORD).read_text())
    except OSError:
        raise UserError(f"FILE: there is no {RECORD} beside {str(path)!r}; {expected}") from None
    except ValueError as error:
        raise UserError(f"FILE: {str(folder / RECORD)!r} cannot be read ({error}); {expected}") from None
    if not isinstance(record, dict) or not record.keys() >= _RECORDED or record["kind"] not in FILES:
        raise UserError(f"FILE: {str(folder / RECORD)!r} does not tell of an exported network; {expected}")
    if record["format"] != _FORMAT:
        raise UserError(f"FILE: {str(folder / RECORD)!r} is of format {record['format']}; expected {_FORMAT}")
    return folder, record
