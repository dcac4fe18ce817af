"""Whether a run can be done on the device and the way it was launched, known before anything is set up."""

from __future__ import annotations

import os

import torch
from accelerate.utils import parse_flag_from_env

from greenprune.config import Config, ConfigError, UserError

# Accelerate reads it by itself, and would divide every loss by it.
_ACCUMULATION = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"


def runs_on_cpu(config: Config) -> bool:
    """Whether the run has no GPU: by its config, by the launcher (``accelerate launch --cpu``), or as there is none."""
    return config.device == "cpu" or parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.cuda.is_available()


def check_precision(config: Config, on_cpu: bool) -> None:
    """Check that the device computes in the precision that is asked for.

    Raises:
        ConfigError: It does not.
    """
    if config.precision == "fp16" and on_cpu:
        raise ConfigError("precision: 'fp16' is not valid on a CPU; expected no or bf16")
    if config.precision == "bf16" and not on_cpu and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ConfigError(
            f"precision: 'bf16' is not valid on a {torch.cuda.get_device_name()}, which has no bf16 arithmetic; "
            "expected no or fp16"
        )


def check_launch(config: Config, stage: int | None, processes: int, on_cpu: bool) -> None:
    """Check that the run can be done the way it was launched.

    Raises:
        UserError: It cannot.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise UserError(
            "the launcher asks for FSDP, which shares out the weights, so that no rank holds a network to operate on "
            "(docs/decisions/0010); expected a file in launch/"
        )
    steps = os.environ.get(_ACCUMULATION, "1")
    if stage is None and steps != "1":  # with DeepSpeed it is one of the launcher's settings, which are checked as such
        raise ConfigError(
            f"{_ACCUMULATION}: {steps!r} in the environment is not valid; expected no such variable, because the run's "
            "own config says it in optim.accumulate"
        )
    if stage is not None and config.device == "cpu" and torch.cuda.is_available():
        raise ConfigError(
            "device: 'cpu' is not valid with DeepSpeed on a machine with GPUs; expected auto, or an environment with "
            "CUDA_VISIBLE_DEVICES= that hides them"
        )
    if stage is not None and config.optim.nonfinite == "skip":
        raise ConfigError(
            "optim.nonfinite: 'skip' is not valid with DeepSpeed, whose optimizer takes every step; expected stop, or "
            "a file in launch/ without DeepSpeed"
        )
    if config.model.sync_batchnorm and processes > 1 and on_cpu:
        raise ConfigError(
            "model.sync_batchnorm: True is not valid on CPUs, where torch has no synchronised BatchNorm; expected false"
        )
