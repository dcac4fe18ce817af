"""DeepSpeed's ZeRO under the engine: its settings, and the way of an optimizer's state in and out of its partitions.

ZeRO (Rajbhandari et al., arXiv 1910.02054) gives every rank one part of the optimizer's state (stage 1) and of the
gradients (stage 2). Surgery and checkpoints know nothing of that: they see the network and a plain torch optimizer with
the whole state, which is gathered from the parts before and shared out again after.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import json
import logging
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.utils import convert_outputs_to_fp32
from torch import Tensor, nn
from torch.optim import Optimizer

from greenprune.config import Config, ConfigError, UserError

State = dict[str, Any]
"""What an optimizer keeps for one parameter: tensors of its shape, and single values."""

_STAGES = (0, 1, 2)

# What a DeepSpeed JSON may not say, because the run's config says it. Keys of deepspeed.ai/docs/config-json.
_FROM_CONFIG = {
    "train_batch_size": "data.batch_size",
    "train_micro_batch_size_per_gpu": "data.batch_size",
    "gradient_accumulation_steps": "optim.accumulate",
    "gradient_clipping": "optim.clip_norm",
    "optimizer": "optim.name",
    "scheduler": "optim.schedule",
    "fp16": "precision",
    "bf16": "precision",
    "amp": "precision",
    "torch_autocast": "precision",
    "data_types": "precision",
}

# The largest buckets in elements, DeepSpeed's own default; smaller where the network is.
_BUCKET = 500_000_000


# Name of the parameter that stands in for those of a group that has none.
_PLACEHOLDER = "_no_parameters"


class _Plugin(DeepSpeedPlugin):  # type: ignore[misc]
    """Accelerate's settings of DeepSpeed without its hook into transformers, which need not be installed."""

    def set_deepspeed_weakref(self) -> None:
        """Nothing to tell."""


def zero_stage(environment: Mapping[str, str]) -> int | None:
    """The ZeRO stage that the launcher asks for, or None if it does not ask for DeepSpeed.

    Raises:
        UserError: DeepSpeed is not installed, or the stage or an offload is not supported.
    """
    if environment.get("ACCELERATE_USE_DEEPSPEED", "false").lower() != "true":
        return None
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            "the launcher asks for DeepSpeed, which is not installed; expected: pip install 'greenprune[deepspeed]', "
            "or a file in launch/ without it"
        )
    file = _json_of(environment)
    section = file.get("zero_optimization", {}) if file else {}
    stage = int(section.get("stage", 0) if file else environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", 2))
    if stage not in _STAGES:
        raise UserError(
            f"zero_stage: {stage} is not valid; expected 0, 1 or 2: stage 3 also shares out the weights, so that no "
            "rank holds a network to operate on (docs/decisions/0010)"
        )
    for part in ("optimizer", "param"):
        device = environment.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{part.upper()}_DEVICE", "none")
        device = section.get(f"offload_{part}", {}).get("device", "none") if file else device
        if device not in ("none", None):
            raise UserError(f"offload_{part}_device: {device!r} is not valid; expected none")
    return stage


def _json_of(environment: Mapping[str, str]) -> dict[str, Any]:
    """The DeepSpeed JSON that the launcher names, or nothing.

    Raises:
        UserError: It cannot be read, or it says what the run's config has to say.
    """
    path = environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if path == "none":
        return {}
    try:
        settings = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"deepspeed_config_file: cannot read {path!r} ({error}); expected a JSON file") from None
    if not isinstance(settings, dict):
        raise UserError(f"deepspeed_config_file: {path!r} holds no settings; expected one JSON object")
    return settings


def _check_silent(settings: Mapping[str, Any], environment: Mapping[str, str]) -> None:
    """Check that the launcher says nothing of what the run's config says.

    Raises:
        ConfigError: It does; the message names the key and the field that it belongs to.
    """
    from_flags = {
        "gradient_accumulation_steps": environment.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "auto"),
        "gradient_clipping": environment.get("ACCELERATE_GRADIENT_CLIPPING", "auto"),
    }
    # `accelerate launch` hands on 1 step of accumulation where nobody asked for anything.
    if from_flags["gradient_accumulation_steps"] == "1":
        del from_flags["gradient_accumulation_steps"]
    for key, field in _FROM_CONFIG.items():
        value = settings.get(key, from_flags.get(key, "auto"))
        if value != "auto":
            raise ConfigError(
                f"{key}: {value!r} in the launcher's DeepSpeed settings is not valid; expected no such key, because "
                f"the run's own config says it in {field}"
            )


def zero_plugin(config: Config, environment: Mapping[str, str], stage: int) -> DeepSpeedPlugin:
    """Accelerate's settings of DeepSpeed for a run: from the run's config, whatever else from the launcher's JSON.

    The network stays in fp32 and computes under autocast, as it does without DeepSpeed: gates and their penalties stay
    in fp32, and the weights are their own master copy.

    Args:
        config: The run.
        environment: The process's environment, as ``accelerate launch`` made it.
        stage: From :func:`zero_stage`.

    Raises:
        ConfigError: The precision is not to be had, or the launcher's settings say what the run's config says.
    """
    if config.precision == "fp16":
        raise ConfigError(
            "precision: 'fp16' is not valid with DeepSpeed; expected no or bf16, or a file in launch/ without "
            "DeepSpeed: ranks that each see a part of the gradient would not agree on which steps to skip"
        )
    settings = _json_of(environment)
    _check_silent(settings, environment)
    world_size = int(environment.get("WORLD_SIZE", "1"))
    # "none": the settings are put together here, not by Accelerate from the launcher's file.
    plugin = _Plugin(hf_ds_config="none", zero_stage=stage, gradient_accumulation_steps=1)
    plugin.deepspeed_config.update(settings)
    plugin.deepspeed_config.update(
        zero_optimization={**settings.get("zero_optimization", {}), "stage": stage},
        gradient_accumulation_steps=1,
        gradient_clipping=config.optim.clip_norm or 0.0,  # left out, it would be clipped to a norm of 1
        train_micro_batch_size_per_gpu=max(1, config.data.batch_size // world_size),
        train_batch_size="auto",
    )
    return plugin


def quiet_deepspeed(on_cpu: bool) -> None:
    """Import DeepSpeed without its reports, for the right device, and without compiling a kernel for a CPU's ranks.

    Its shared-memory collectives are compiled at the first start (40 s, and a compiler is needed); gloo does the same.
    """
    if on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # torch's extension builder, which DeepSpeed imports, reports that a CPU machine has no CUDA.
    builder = logging.getLogger("torch.utils.cpp_extension")
    level = builder.level
    builder.setLevel(logging.ERROR)
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    if on_cpu:
        backend: Any = importlib.import_module("deepspeed.comm.torch")
        backend.build_shm_op = lambda: None
    builder.setLevel(level)
    # DeepSpeed calls collectives by names that torch is about to give up.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)


class ZeroParallel:
    """A network and its optimizer under a DeepSpeed engine.

    Args:
        accelerator: Accelerate, set up with :func:`zero_plugin`.
        precision: Mixed precision of the network, no or bf16.

    Attributes:
        model: The DeepSpeed engine: what to call.
    """

    model: nn.Module

    def __init__(self, accelerator: Accelerator, precision: str) -> None:
        self._accelerator = accelerator
        self._half = precision == "bf16"
        section = accelerator.deepspeed_plugin.deepspeed_config["zero_optimization"]
        self._our_buckets = {"reduce_bucket_size", "allgather_bucket_size"} - section.keys()
        self._groups: list[list[nn.Parameter]] = []

    def prepare(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Take over a plain network and its optimizer, with all that the optimizer already keeps."""
        model.to(self._accelerator.device)
        for parameter in model.parameters():  # DeepSpeed takes them for rows of bytes, in no other layout than C's
            parameter.data = _in_rows(parameter.data)
        self._groups = [list(group["params"]) for group in optimizer.param_groups]
        state = {
            parameter: {name: _in_rows(value) if isinstance(value, Tensor) else value for name, value in kept.items()}
            for parameter, kept in optimizer.state.items()
        }
        optimizer.state.clear()
        for group in optimizer.param_groups:
            if not group["params"]:  # DeepSpeed would drop the group, and schedules count on every group's place
                group["params"] = [nn.Parameter(torch.zeros(1, device=self._accelerator.device))]
                model.register_parameter(_PLACEHOLDER, group["params"][0])
        if self._half:
            model.forward = convert_outputs_to_fp32(self.autocast()(model.forward))
        size = sum(parameter.numel() for parameter in model.parameters())
        section = self._accelerator.deepspeed_plugin.deepspeed_config["zero_optimization"]
        section.update(dict.fromkeys(self._our_buckets, min(_BUCKET, size + size % 2)))
        self.model, _ = self._accelerator.prepare(model, optimizer)
        model._parameters.pop(_PLACEHOLDER, None)
        self._join_masters()
        self._share_out(state, optimizer)

    def _join_masters(self) -> None:
        """Let the master copy of this rank's part be the weights themselves: both are fp32.

        What bounds a weight after a step (the gates' logits) then reaches what the next step starts from.
        """
        if self._partitioned:
            zero: Any = self.model.optimizer
            for parts, master in zip(
                zero.parallel_partitioned_bit16_groups, zero.single_partition_of_fp32_groups, strict=True
            ):
                master.data = parts[dist.get_rank()]

    def autocast(self) -> torch.autocast:
        """Within, the run's precision."""
        return torch.autocast(self._accelerator.device.type, dtype=torch.bfloat16, enabled=self._half)

    @property
    def _partitions(self) -> list[tuple[list[nn.Parameter], Tensor, Tensor]]:
        """For each group of ZeRO: its parameters, the tensor that holds them all, and this rank's part of it."""
        zero: Any = self.model.optimizer
        return list(zip(zero.bit16_groups, zero.bit16_groups_flat, zero.single_partition_of_fp32_groups, strict=True))

    @property
    def _partitioned(self) -> bool:
        return hasattr(self.model.optimizer, "single_partition_of_fp32_groups")

    def _share_out(self, state: dict[Tensor, State], optimizer: Optimizer) -> None:
        """Give the optimizer its part of a whole state."""
        if not self._partitioned:
            optimizer.state.update(state)
            return
        for parameters, whole, part in self._partitions:
            kept = next((state[parameter] for parameter in parameters if parameter in state), None)
            if kept is None:
                continue  # no step was done yet
            start = part.numel() * dist.get_rank()
            for name, value in kept.items():
                if not _of_parameter(value):
                    optimizer.state[part][name] = value
                    continue
                flat = torch.zeros_like(whole)
                for parameter, offset in _offsets(parameters, whole):
                    flat[offset : offset + parameter.numel()] = state[parameter][name].flatten()
                optimizer.state[part][name] = flat[start : start + part.numel()].clone()

    def state(self, optimizer: Optimizer) -> dict[Tensor, State]:
        """The optimizer's whole state by parameter; a collective, to be called on every rank."""
        if not self._partitioned:
            return {parameter: dict(kept) for parameter, kept in optimizer.state.items()}
        found: dict[Tensor, State] = {}
        for (parameters, whole, part), ours in zip(self._partitions, self._groups, strict=True):
            if not ours:
                continue
            for name, value in optimizer.state.get(part, {}).items():
                flat = None
                if _of_parameter(value):
                    flat = torch.empty_like(whole)
                    _all_gather(flat, value)
                for parameter, offset in _offsets(parameters, whole):
                    kept = found.setdefault(parameter, {})
                    kept[name] = value if flat is None else _piece(flat, offset, parameter)
        return found

    def state_dict(self, optimizer: Optimizer) -> dict[str, Any]:
        """The optimizer's state as a plain torch optimizer's ``state_dict``; a collective."""
        state, number, groups = self.state(optimizer), 0, []
        by_number: dict[int, State] = {}
        for group, parameters in zip(optimizer.param_groups, self._groups, strict=True):
            for place, parameter in enumerate(parameters):
                if parameter in state:
                    by_number[number + place] = state[parameter]
            numbers = list(range(number, number + len(parameters)))
            groups.append({**{key: value for key, value in group.items() if key != "params"}, "params": numbers})
            number += len(parameters)
        return {"state": by_number, "param_groups": groups}

    def release(self, optimizer: Optimizer) -> None:
        """Take the engine apart: the network and the optimizer are plain ones again, with the whole state.

        The network gets new parameters, on which nothing of the engine hangs.
        """
        engine: Any = self.model
        state = self.state(optimizer)
        model: nn.Module = engine.module
        model.__dict__.pop("forward", None)
        # The engine would otherwise leave its hooks on the module.
        for name in ("module_forward_pre_hook", "module_forward_post_hook", "first_dataloader_check"):
            handle = getattr(engine, name, None)
            if handle is not None and hasattr(handle, "remove"):
                handle.remove()
                setattr(engine, name, None)
        del engine, self.model
        fresh = _fresh_parameters(model)
        self._accelerator.free_memory()
        optimizer.state.clear()
        for group, parameters in zip(optimizer.param_groups, self._groups, strict=True):
            group["params"] = [fresh[parameter] for parameter in parameters]
        for parameter, kept in state.items():
            optimizer.state[fresh[parameter]] = kept
        gc.collect()

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Gradients of the loss; with ``last``, averaged over the ranks."""
        engine: Any = self.model
        engine.set_gradient_accumulation_boundary(is_boundary=last)
        engine.backward(loss)

    def step(self) -> None:
        """Clip, and one step of the optimizer; the gradients are gone afterwards.

        ZeRO leaves a step out whose gradient is not finite, and tells nobody. Done, it would break the weights, by
        which the run is stopped when the loss is read next; so they are broken here.
        """
        engine: Any = self.model
        engine.step()
        if getattr(engine.optimizer, "overflow", False):  # on the host already, and alike on all ranks
            with torch.no_grad():
                next(engine.module.parameters()).fill_(torch.nan)


def _all_gather(whole: Tensor, part: Tensor) -> None:
    """Put the ranks' parts one after the other; torch 2.14 has another name for it."""
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(whole, part)


def _of_parameter(value: object) -> bool:
    """Whether a value of a flat state has an element for each of the parameters' elements."""
    return isinstance(value, Tensor) and value.dim() > 0


def _in_rows(tensor: Tensor) -> Tensor:
    """A tensor laid out row by row. ``contiguous()`` would leave the strides of 1x1 convolutions that are not so."""
    return tensor.clone(memory_format=torch.contiguous_format)


def _offsets(parameters: list[nn.Parameter], whole: Tensor) -> list[tuple[nn.Parameter, int]]:
    """Where each parameter lies in the flat tensor that it is a view of, in elements."""
    start, size = whole.data_ptr(), whole.element_size()
    return [(parameter, (parameter.data_ptr() - start) // size) for parameter in parameters]


def _piece(flat: Tensor, offset: int, parameter: nn.Parameter) -> Tensor:
    return flat[offset : offset + parameter.numel()].view(parameter.shape).clone()


def _fresh_parameters(model: nn.Module) -> dict[Tensor, nn.Parameter]:
    """Put a new parameter in each one's place: no view of a flat tensor, no hook of the engine.

    Returns:
        The new one by the old one.
    """
    fresh: dict[Tensor, nn.Parameter] = {}
    for module in model.modules():
        for name, old in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if old not in fresh:
                fresh[old] = nn.Parameter(old.detach().clone(), requires_grad=old.requires_grad)
            setattr(module, name, fresh[old])
    return fresh
