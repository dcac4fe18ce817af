"""The passes of a step as one CUDA graph: recorded once for each structure, then replayed by one call of the host."""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from greenprune.config import ConfigError

# Passes that are done as they are before the next is recorded: libraries choose kernels and get workspaces in the first
# ones. PyTorch's notes on CUDA graphs ask for three (https://docs.pytorch.org/docs/stable/notes/cuda.html).
WARM_UP = 3

Passes = Callable[[Tensor, Tensor], Tensor]


class StepGraph:
    """Forward and backward of a batch, whose thousand small kernels the host then starts with one call.

    The first passes of a structure are done as they are, the next is recorded, and from then on the record is replayed.
    Every one of them counts: no batch is passed through twice, and the results are those of the passes as they are.

    A record holds addresses: the network's tensors have to stay where they are, and so do the gradients, which a replay
    overwrites. They need not be freed between replays (:attr:`keeps_gradients`). What Python does in the passes is done
    when they are recorded and not when they are replayed: it must not depend on the step, unless by ``phase``.

    Args:
        passes: From images [B, ...] and labels [B] on the GPU to a tensor on it; adds to the gradients.
        parameters: The parameters as they are now.
        device: The GPU.
    """

    def __init__(self, passes: Passes, parameters: Callable[[], Iterable[nn.Parameter]], device: torch.device) -> None:
        self._passes = passes
        self._parameters = parameters
        self._gradients: list[tuple[nn.Parameter, Tensor]] = []
        # Warmed up and recorded on the same stream: what autograd remembers of a stream then fits.
        self._stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._phase: Hashable = None
        self._done = 0
        self._graph: torch.cuda.CUDAGraph | None = None

    @property
    def keeps_gradients(self) -> bool:
        """Whether the gradients have to stay where they are until the next pass."""
        return self._graph is not None

    def forget(self) -> None:
        """Let go of the record, its memory and the gradients in it: the network is about to change."""
        self._done = 0
        if self._graph is not None:
            self._free_gradients()
            self._graph = None
            del self._images, self._labels, self._result

    def __call__(self, images: Tensor, labels: Tensor, phase: Hashable) -> Tensor:
        """The passes for a batch.

        Args:
            images: Images [B, ...].
            labels: Labels [B].
            phase: Whatever Python's part in the passes depends on; another one is another record.

        Returns:
            What the passes return; only until the next batch.

        Raises:
            ConfigError: The passes cannot be recorded.
        """
        phase = (phase, images.shape, images.stride(), images.dtype)
        if phase != self._phase:
            self.forget()
            self._phase = phase
        if self._graph is None and self._done < WARM_UP:
            self._done += 1
            return self._as_they_are(images, labels)
        if self._graph is None:
            self._record(images, labels)
        assert self._graph is not None
        self._images.copy_(images)
        self._labels.copy_(labels)
        first, gradient = self._gradients[0]
        if first.grad is not gradient:  # someone freed them: the optimizer would find nothing
            for parameter, gradient in self._gradients:
                parameter.grad = gradient
        self._graph.replay()
        return self._result

    def _as_they_are(self, images: Tensor, labels: Tensor) -> Tensor:
        here = torch.cuda.current_stream()
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            result = self._passes(images, labels)
        here.wait_stream(self._stream)
        return result

    def _record(self, images: Tensor, labels: Tensor) -> None:
        """Record the passes for the batches to come; nothing is computed yet.

        Raises:
            ConfigError: They look at the device, or draw random numbers on the host.
        """
        self._images, self._labels = images.clone(), labels.clone()
        drawn = _random_states()
        graph = self._capture()
        if _random_states() != drawn:
            # Another thread may have drawn them: what the passes draw they draw again.
            self._free_gradients()
            drawn = _random_states()
            graph = self._capture()
            if _random_states() != drawn:
                raise _refusal("its passes draw random numbers on the host, which a record would repeat")
        self._gradients = [
            (parameter, parameter.grad) for parameter in self._parameters() if parameter.grad is not None
        ]
        self._graph = graph

    def _capture(self) -> torch.cuda.CUDAGraph:
        graph, here = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            # Other threads (checkpoints, loaders) may use the GPU meanwhile: only this one is held to what can be
            # recorded.
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                self._result = self._passes(self._images, self._labels)
        except RuntimeError as error:
            torch.cuda.set_stream(here)  # PyTorch leaves its own where a recording fails
            causes = list(_chain(error))
            if any(isinstance(cause, torch.OutOfMemoryError) for cause in causes):
                raise
            raise _refusal(str(causes[-1]).strip().partition("\n")[0]) from error
        return graph

    def _free_gradients(self) -> None:
        self._gradients = []
        for parameter in self._parameters():
            parameter.grad = None


def _refusal(reason: str) -> ConfigError:
    return ConfigError(
        f"model.cuda_graph: True is not valid for this network, whose step cannot be recorded ({reason}); "
        "expected false"
    )


def _chain(error: BaseException) -> Iterable[BaseException]:
    """An error and those that it came from: the last is what went wrong at first."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


def _random_states() -> tuple[object, ...]:
    """Where the host's random numbers are."""
    numpys: Any = np.random.get_state(legacy=True)
    return random.getstate(), numpys[1].tobytes(), numpys[2], torch.get_rng_state().numpy().tobytes()
