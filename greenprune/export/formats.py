"""The formats of an exported network: how each is written, and how each is loaded back without greenprune."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import pickle
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from greenprune.checkpoint import write_file
from greenprune.config import UserError
from greenprune.export.reading import NotAnExport, layers_of
from greenprune.export.source import module_source

FILES = {
    "torch": "model.pt",
    "torch.export": "model.pt2",
    "onnx": "model.onnx",
    "safetensors": "model.safetensors",
    "hf": "model.safetensors",
}
"""The formats, and the file that holds the tensors in each."""

WITH_SOURCE = ("torch", "safetensors", "hf")
"""The formats that come with a module file."""

LEAST_OPSET = 18
"""The oldest ONNX operator set that PyTorch's exporter writes by itself; older ones are conversions that often fail."""

_SOURCE, _MODELING = "network.py", "modeling_network.py"

_MODELING_TEXT = '''"""The network for transformers, which loads it through AutoModelForImageClassification."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

from .network import Network


class NetworkConfig(PretrainedConfig):
    """Settings of the network: all of them are in network.py."""

    model_type = "greenprune"


class NetworkForImageClassification(PreTrainedModel):
    """The network with the interface of an image classifier."""

    config_class = NetworkConfig
    base_model_prefix = "network"
    main_input_name = "pixel_values"

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__(config)
        self.network = Network()
        self.post_init()

    def _init_weights(self, module: object) -> None:
        """The tensors come from the file."""

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ImageClassifierOutput:
        """Logits of normalised images, and the cross-entropy if the labels are given."""
        logits = self.network(pixel_values)
        loss = None if labels is None else functional.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)
'''


class ExportError(UserError):
    """A network that cannot be exported as asked; the message says why and what is valid."""


@dataclass(frozen=True)
class Loaded:
    """An exported network that was loaded back.

    Attributes:
        run: From images [B, C, H, W] to logits [B, classes].
        module: The network as a PyTorch module; None where another runtime runs it.
        engine: What runs it, with its version.
    """

    run: Callable[[Tensor], Tensor]
    module: nn.Module | None
    engine: str


def check_format(kind: str, opset: int | None) -> None:
    """Refuse a format that does not exist, cannot be had here, or does not go with the operator set.

    Raises:
        ExportError: It is so.
    """
    if kind not in FILES:
        raise ExportError(f"--format: {kind!r} is not valid; expected one of {', '.join(FILES)}")
    if opset is not None and kind != "onnx":
        raise ExportError(f"--opset: {opset} is not valid with --format {kind}; expected --format onnx")
    if kind != "onnx":
        return
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(
            f"--format: 'onnx' needs {', '.join(missing)}, which is not installed; expected greenprune[export]"
        )
    import onnx

    newest = onnx.defs.onnx_opset_version()
    if opset is not None and not LEAST_OPSET <= opset <= newest:
        raise ExportError(f"--opset: {opset} is not valid; expected {LEAST_OPSET} to {newest}")


def write_network(
    kind: str, network: nn.Module, images: Tensor, folder: Path, *, about: str, opset: int | None = None
) -> dict[str, Any]:
    """Write a network's files in one format into a folder.

    Args:
        kind: The format.
        network: The network, plain if the format comes with a module file; in evaluation mode.
        images: At least two images [B, C, H, W] to trace the network with.
        folder: Where the files go.
        about: What the network is, in one line.
        opset: ONNX operator set; None: the exporter's own choice.

    Returns:
        What the record should say of the files: versions, and the operator set.

    Raises:
        ExportError: The network has something that the format cannot express.
        OSError: A file cannot be written, and which.
    """
    path = folder / FILES[kind]
    if kind == "torch.export":
        _write_program(_traced(network, images), path)
        return {}
    if kind == "onnx":
        return _write_onnx(network, images, path, opset)
    assert isinstance(network, nn.Sequential)
    tensors = {name: tensor.detach().clone().contiguous() for name, tensor in network.state_dict().items()}
    if kind == "torch":
        write_file(path, lambda file: torch.save(tensors, file))
    else:
        write_file(path, lambda file: file.write(save(tensors, metadata={"format": "pt"})))
    with torch.no_grad():
        classes = network(images[:1]).shape[1]
    shapes = f"[B, {', '.join(map(str, images.shape[1:]))}]", f"[B, {classes}]"
    reader = "torch" if kind == "torch" else "safetensors"
    write_text(folder / _SOURCE, module_source(network, about, reader=reader, shapes=shapes))
    if kind == "hf":
        write_text(folder / _MODELING, _MODELING_TEXT)
        write_text(folder / "config.json", json.dumps(_hf_config(images, classes), indent=2) + "\n")
    return {}


def write_text(path: Path, text: str) -> None:
    """Write a text file of an export.

    Raises:
        OSError: It cannot be written; it bears the file's name.
    """
    write_file(path, lambda file: file.write(text.encode()))


def _write_program(program: torch.export.ExportedProgram, path: Path) -> None:
    archive = io.BytesIO()  # PyTorch ends the whole process where its own writing of a file fails
    torch.export.save(program, archive)
    write_file(path, lambda file: file.write(archive.getbuffer()))


def _hf_config(images: Tensor, classes: int) -> dict[str, Any]:
    return {
        "architectures": ["NetworkForImageClassification"],
        "model_type": "greenprune",
        "auto_map": {
            "AutoConfig": "modeling_network.NetworkConfig",
            "AutoModelForImageClassification": "modeling_network.NetworkForImageClassification",
        },
        "num_channels": images.shape[1],
        "image_size": images.shape[2],
        "id2label": {str(index): str(index) for index in range(classes)},
        "label2id": {str(index): index for index in range(classes)},
        "dtype": "float32",
    }


def _traced(network: nn.Module, images: Tensor) -> torch.export.ExportedProgram:
    """The network as a graph that takes any number of images."""
    try:
        with _quiet(), torch.no_grad():
            return torch.export.export(network, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    except (torch._dynamo.exc.TorchDynamoException, RuntimeError, ValueError, TypeError) as error:
        raise ExportError(f"the network cannot be traced by torch.export: {_first_line(error)}") from None


def _write_onnx(network: nn.Module, images: Tensor, path: Path, opset: int | None) -> dict[str, Any]:
    import onnx
    from torch.onnx import OnnxExporterError

    program = _traced(network, images)
    attention = torch.ops.aten.scaled_dot_product_attention.default
    nodes = [node for node in program.graph.nodes if node.target is attention]
    if any(node.args[0].meta["val"].dim() != 4 for node in nodes):
        # The exporter knows attention with batch, heads, positions and width only: windows are one dimension more.
        decompositions = torch.export.default_decompositions()
        with _quiet():
            program = program.run_decompositions({attention: decompositions[attention]})
    try:
        with _quiet():
            exported = torch.onnx.export(
                program,
                input_names=["images"],
                output_names=["logits"],
                opset_version=opset,
                dynamo=True,
                external_data=False,
                verbose=False,
            )
    except OnnxExporterError as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise ExportError(f"the network cannot be written as ONNX: {_first_line(cause)}") from None
    assert exported is not None
    proto = exported.model_proto
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "batch"
    proto.graph.output[0].type.tensor_type.shape.dim[0].dim_param = "batch"
    write_file(path, lambda file: file.write(proto.SerializeToString()))
    written = next(entry.version for entry in proto.opset_import if not entry.domain)
    if opset is not None and written != opset:
        raise ExportError(f"--opset: {opset} is not valid for this network, which needs {written}; expected {written}")
    return {"opset": written, "onnx": onnx.__version__}


# What PyTorch and safetensors raise at files that were tampered with.
_UNREADABLE = (
    OSError,
    RuntimeError,
    EOFError,
    AttributeError,
    KeyError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
    SafetensorError,
    zipfile.BadZipFile,
)


def load_written(kind: str, folder: Path) -> Loaded:
    """Load what :func:`write_network` has just written here, as someone without greenprune does: files' code is run.

    Raises:
        ExportError: A file cannot be read, or its runtime is not installed.
    """
    if kind not in WITH_SOURCE:
        return read_network(kind, folder, trust=True)
    module: nn.Module = _run_module(folder / _SOURCE).load_network(str(folder / FILES[kind]))
    return Loaded(module, module, f"torch {torch.__version__}")


def read_network(kind: str, folder: Path, *, trust: bool = False) -> Loaded:
    """Load an exported network from anywhere: no code in its files is run.

    Args:
        kind: The format.
        folder: Folder of the export.
        trust: Whether a format whose loader runs what the file says may be loaded all the same: torch.export. (It reads
            pickles, and its guards and symbolic shapes are Python that is evaluated.)

    Raises:
        ExportError: A file cannot be read, would have to be trusted, or its runtime is not installed.
    """
    path = folder / FILES[kind]
    if kind == "torch.export" and not trust:
        raise ExportError(
            f"FILE: {str(path)!r} may hold code, which PyTorch's loader of this format runs; expected --trust for a "
            "file whose origin you know, or another format"
        )
    try:
        if kind == "onnx":
            return _load_onnx(path)
        if kind == "torch.export":
            with _quiet():
                module: nn.Module = torch.export.load(path).module()
        else:
            module = _read_module(folder / _SOURCE, path)
    except ExportError:  # which names the file by itself
        raise
    except NotAnExport as error:
        raise ExportError(
            f"FILE: {str(folder / _SOURCE)!r} is not what greenprune export writes: {error}; it is read, not run, so "
            "expected a folder left as it was exported"
        ) from None
    except _UNREADABLE as error:
        raise ExportError(f"FILE: {str(path)!r} cannot be loaded: {_first_line(error)}") from None
    return Loaded(module, module, f"torch {torch.__version__}")


def _read_module(source: Path, tensors: Path) -> nn.Module:
    """The network that a module file spells out, with the tensors of a file."""
    network = layers_of(source.read_text(encoding="utf-8"))
    if tensors.suffix == ".pt":
        state = torch.load(tensors, map_location="cpu", weights_only=True)
    else:
        state = load_file(tensors)
    expected = network.state_dict()
    wrong = sorted(state.keys() ^ expected.keys())
    wrong += sorted(name for name in state.keys() & expected.keys() if state[name].shape != expected[name].shape)
    if wrong or any(buffer.is_meta for name, buffer in network.named_buffers() if name not in expected):
        raise NotAnExport(f"it does not fit {tensors.name}, first at {[*wrong, 'its buffers'][0]}")
    # Copies: what a file is mapped to lies at any address, and kernels are slower and round otherwise there.
    network.load_state_dict({name: tensor.clone() for name, tensor in state.items()}, assign=True)
    return network.requires_grad_(False).eval()


def _load_onnx(path: Path) -> Loaded:
    if importlib.util.find_spec("onnxruntime") is None:
        raise ExportError(f"FILE: {str(path)!r} needs onnxruntime, which is not installed; expected greenprune[export]")
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as errors

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    unreadable = (errors.Fail, errors.InvalidArgument, errors.InvalidGraph, errors.InvalidProtobuf, errors.NoSuchFile)
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except (*unreadable, errors.NotImplemented) as error:
        raise ExportError(f"FILE: {str(path)!r} cannot be loaded: {_first_line(error)}") from None
    name = session.get_inputs()[0].name

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {name: images.numpy()})[0])

    return Loaded(run, None, f"onnxruntime {onnxruntime.__version__}")


def _run_module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what PyTorch's and ONNX's exporters say of themselves off the screen.

    Errors are raised, and reported in one line.
    """
    loggers = [logging.getLogger(name) for name in ("torch.export", "torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):  # onnxscript 0.6 prints
            # PyTorch 2.11's own code, as it exports to ONNX and as it reads a program.
            warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)", category=FutureWarning)
            warnings.filterwarnings("ignore", message="The given buffer is not writable", category=UserWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__
