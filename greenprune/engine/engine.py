"""One process's part of a run: its place among the others, its device, and the network as the ranks share it."""

from __future__ import annotations

import gc
import os
import socket
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.tracking import filter_trackers, get_available_trackers
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    broadcast_object_list,
    gather_object,
)
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from greenprune.allocation import give_back_freed_memory
from greenprune.config import Config, ConfigError, UserError
from greenprune.engine.compilation import compile_blocks
from greenprune.engine.launch_checks import check_launch, check_precision, runs_on_cpu
from greenprune.engine.peers import Peer, Peers, is_of_network, join_after_restart
from greenprune.engine.step_graph import Passes, StepGraph
from greenprune.engine.zero import ZeroParallel, quiet_deepspeed, zero_plugin, zero_stage
from greenprune.interrupt import InterruptRequest

T = TypeVar("T")


def _engine_name(stage: int | None, processes: int) -> str:
    if stage is not None:
        return f"DeepSpeed ZeRO-{stage}"
    return "DDP" if processes > 1 else "one process"


class RankMismatch(RuntimeError):
    """Ranks that should agree do not; the message names them."""

    known_to_all = False


class Engine:
    """One process's part of a data-parallel run.

    Launched by ``accelerate launch`` (or torchrun) it takes its rank and the number of processes from the launcher;
    precision, batch and clipping come from the run's config alone.

    Args:
        config: The run.

    Attributes:
        records: Whether the passes of a step are recorded as a CUDA graph.

    Raises:
        ConfigError: The precision is not to be had on this device.
        UserError: The launcher announced processes that did not come together.
    """

    def __init__(self, config: Config) -> None:
        on_cpu = runs_on_cpu(config)
        check_precision(config, on_cpu)
        stage = zero_stage(os.environ)
        announced = int(os.environ.get("WORLD_SIZE", "1"))
        check_launch(config, stage, announced, on_cpu)
        handlers: list[Any] = [DistributedDataParallelKwargs(gradient_as_bucket_view=True)]
        if on_cpu and announced > 1:
            handlers.append(InitProcessGroupKwargs(backend="gloo"))
        if stage is not None:
            quiet_deepspeed(on_cpu)
        join_after_restart(on_cpu)
        self._accelerator = Accelerator(
            cpu=on_cpu and stage is None,
            mixed_precision=config.precision if stage is None else "no",
            deepspeed_plugin=None if stage is None else zero_plugin(config, os.environ, stage),
            kwargs_handlers=handlers,
            step_scheduler_with_optimizer=False,
        )
        self._zero = None if stage is None else ZeroParallel(self._accelerator, config.precision)
        if announced != self._accelerator.num_processes:
            raise UserError(
                f"the launcher announced {announced} processes but {self._accelerator.num_processes} came together; "
                "use one of the files in launch/"
            )
        self._clip_norm = config.optim.clip_norm
        self._compile = config.model.compile
        alone = announced == 1 and stage is None and not on_cpu
        self.records = config.model.cuda_graph and not config.model.compile and alone
        self._graph: StepGraph | None = None
        self._last = True
        self._peers: Peers | None = None
        self.name: str = _engine_name(stage, announced)
        self.rank: int = self._accelerator.process_index
        self.world_size: int = self._accelerator.num_processes
        self.device: torch.device = self._accelerator.device
        if not on_cpu:
            # The shapes of a structure stay: the fastest kernels are worth finding.
            torch.backends.cudnn.benchmark = True
        # What the imports left behind stays for good; without it a collection takes milliseconds, not a quarter second.
        gc.collect()
        gc.freeze()
        self.model: nn.Module
        self.module: nn.Module
        self.optimizer: Optimizer

    @property
    def is_main(self) -> bool:
        """Whether this process speaks and writes for the run."""
        return self.rank == 0

    @property
    def device_memory(self) -> int:
        """Bytes that torch holds on this process's GPU; 0 on a CPU."""
        return torch.cuda.memory_reserved(self.device) if self.device.type == "cuda" else 0

    def local_main_first(self) -> AbstractContextManager[None]:
        """Lets one process a node through first, the others after it: for what must be fetched once."""
        context: AbstractContextManager[None] = self._accelerator.local_main_process_first()
        return context

    def prepare(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Take over a network and its optimizer: move, wrap for data parallelism, set up mixed precision.

        Afterwards ``model`` is what to call, ``module`` the unwrapped network and ``optimizer`` the raw optimizer. What
        the optimizer already keeps, from a checkpoint, is taken over; it has to be on the network's device.
        """
        self.module = model
        self.optimizer = optimizer
        if self._compile:
            compile_blocks(model)
        if self._zero is None:
            self._prepared_optimizer = self._accelerator.prepare(optimizer)
        self._wrap()

    def _wrap(self) -> None:
        if self._zero is not None:
            self._zero.prepare(self.module, self.optimizer)
            self.model = self._zero.model
        else:
            self.model = self._accelerator.prepare_model(self.module)
            self._keep_buffers_local()

    def _keep_buffers_local(self) -> None:
        # BatchNorm's running statistics are local to a rank in training and taken from rank 0 where they matter
        # (sync_buffers), so they need not travel on every step.
        if isinstance(self.model, DistributedDataParallel):
            self.model.broadcast_buffers = False

    def accumulating(self, *, last: bool) -> AbstractContextManager[None]:
        """Within, forward and backward passes add to the gradients; ranks exchange them on the last part only."""
        self._last = last
        if not last and isinstance(self.model, DistributedDataParallel):
            context: AbstractContextManager[None] = self.model.no_sync()
            return context
        return nullcontext()

    def recorded(self, passes: Passes) -> Callable[[Tensor, Tensor, Hashable], Tensor]:
        """What does the passes of a step: as a CUDA graph that is recorded once, where there is a GPU for it alone.

        With several processes or DeepSpeed, whose collectives wait for one another, with compiled blocks and on a CPU
        it is the passes themselves.

        Args:
            passes: From images and labels to a tensor: forward passes and :meth:`backward`, with no look at the device.

        Returns:
            The same with a third argument: whatever Python's part in the passes depends on.
        """
        if not self.records:
            return lambda images, labels, phase: passes(images, labels)
        self._graph = StepGraph(passes, self.module.parameters, self.device)
        return self._graph

    def backward(self, loss: Tensor) -> None:
        """Gradients of the loss, averaged over the ranks."""
        if self._zero is not None:
            self._zero.backward(loss, last=self._last)
        else:
            self._accelerator.backward(loss)

    def step(self) -> None:
        """One optimizer step with the gradients at hand, which are then gone."""
        self.got_on()
        if self._zero is not None:
            self._zero.step()
            return
        if self._clip_norm is not None:
            self._accelerator.clip_grad_norm_(self.module.parameters(), self._clip_norm)
        self._prepared_optimizer.step()
        if self._graph is None or not self._graph.keeps_gradients:
            self._prepared_optimizer.zero_grad()

    def optimizer_state(self) -> dict[str, Any]:
        """The whole state of the optimizer, whichever rank keeps it, as a plain torch optimizer's ``state_dict``.

        A collective: call it on every rank.
        """
        if self._zero is not None:
            return self._zero.state_dict(self.optimizer)
        state: dict[str, Any] = self.optimizer.state_dict()
        return state

    def release(self) -> None:
        """Unwrap: ``module`` and ``optimizer`` are then plain ones with the whole state, and nothing else is left.

        The old wrapper with its gradient buckets is gone afterwards. A collective: call it on every rank.
        """
        if self._zero is not None:
            del self.model
            self._zero.release(self.optimizer)
            return
        if self._graph is not None:
            self._graph.forget()
        self.optimizer.zero_grad(set_to_none=True)
        # What preparing has put on the module: the wrappers of mixed precision, or autocast would nest one level deeper
        # each time, and the mark with which preparing again would do nothing on one process. Accelerate's own
        # unwrap_model imports DeepSpeed where it is installed, which takes a second.
        for attribute in ("forward", "_original_forward", "_is_accelerate_prepared"):
            self.module.__dict__.pop(attribute, None)
        self._accelerator._models.clear()  # Accelerate keeps every model it ever prepared
        del self.model
        if self.world_size > 1:
            gc.collect()  # the old reducer's buckets are held in a cycle

    def rebuild(self, operate: Callable[[nn.Module, Optimizer], None]) -> None:
        """Change the structure: unwrap, operate on the raw network and optimizer, wrap what is left.

        The optimizer stays the same object.

        Args:
            operate: Changes the unwrapped network and its optimizer in place, alike on every rank.
        """
        self.release()
        operate(self.module, self.optimizer)
        if self.device.type == "cpu":
            give_back_freed_memory()
        self._wrap()

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Within, any unwrapped network computes in the run's precision and without gradients.

        Nothing is compiled for it: each structure would need graphs of its own that are used for a few batches.
        """
        with (
            torch.no_grad(),
            self.autocast(),
            torch.compiler.set_stance("force_eager") if self._compile else nullcontext(),
        ):
            yield

    def autocast(self) -> AbstractContextManager[Any]:
        """Within, any network computes in the run's precision."""
        autocast: AbstractContextManager[Any]
        autocast = self._accelerator.autocast() if self._zero is None else self._zero.autocast()
        return autocast

    def sync_buffers(self, model: nn.Module) -> None:
        """Give every rank the buffers (BatchNorm's running statistics) of rank 0, which the checkpoint holds."""
        if self.world_size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)

    def mean(self, values: Tensor) -> Tensor:
        """The mean of a tensor over all ranks; the tensor itself on one process."""
        return self.sum(values).div_(self.world_size) if self.world_size > 1 else values

    def sum(self, values: Tensor) -> Tensor:
        """The sum of a tensor over all ranks, as a new tensor; the tensor itself on one process."""
        if self.world_size == 1:
            return values
        total = values.clone()
        dist.all_reduce(total)
        return total

    def gather_objects(self, item: object) -> list[Any]:
        """One picklable object from each rank, in rank order, on every rank."""
        return list(gather_object([item])) if self.world_size > 1 else [item]

    def from_main(self, item: object) -> Any:
        """Rank 0's object, on every rank."""
        holder = [item]
        if self.world_size > 1:
            broadcast_object_list(holder)
        return holder[0]

    @contextmanager
    def watching(self, stall_s: float, advice: Callable[[], str]) -> Iterator[None]:
        """Within, find out soon if another process of the run is gone or hangs.

        Args:
            stall_s: Seconds without a step anywhere after which the run counts as hung; the process then ends.
            advice: Says how to go on after that.

        Raises:
            PeerLost: A collective failed because another process is gone; the message names it.
        """
        if self.world_size == 1:
            yield
            return
        me = Peer.here(self.rank)
        # A launcher that sees a process end sends the others a SIGTERM: they have to live to say why.
        with InterruptRequest(), Peers(me, self.gather_objects(me), stall_s, advice) as self._peers:
            try:
                yield
            except RuntimeError as error:
                lost = self._peers.find_lost() if is_of_network(error) else None
                if lost is None:
                    raise
                raise lost from error

    def got_on(self) -> None:
        """Note that this process has done a step or evaluated a batch."""
        if self._peers is not None:
            self._peers.got_on()

    def check_agreement(self, what: str, value: str) -> None:
        """Check that every rank has the same value.

        Raises:
            RankMismatch: They differ; the message names the ranks and their hosts.
        """
        values = self.gather_objects((value, socket.gethostname()))
        odd = [f"rank {rank} ({host})" for rank, (other, host) in enumerate(values) if other != values[0][0]]
        if odd:
            mismatch = RankMismatch(f"{what} differs from rank 0 on {', '.join(odd)}; the run cannot go on")
            mismatch.known_to_all = True
            raise mismatch

    def together(self, work: Callable[[], T], *, main_only: bool = False) -> T:
        """Do something that may fail on some ranks only, and fail on all of them if it does.

        Args:
            work: What to do; may not talk to other ranks.
            main_only: Do it on rank 0 only, and give its result (picklable) to all.

        Returns:
            This rank's result, or rank 0's.

        Raises:
            UserError, RuntimeError, OSError: What the first failing rank raised, on every rank, so that none is left
                waiting in a collective.
        """
        result, error = None, None
        if self.is_main or not main_only:
            try:
                result = work()
            except (UserError, RuntimeError, OSError) as caught:
                error = caught
        if self.world_size == 1:
            if error is not None:
                raise error
            return cast(T, result)
        errors = self.gather_objects(error)
        first = next((rank for rank, found in enumerate(errors) if found is not None), None)
        if first is not None:
            found = errors[first]
            found.known_to_all = True
            raise found
        return cast(T, self.from_main(result) if main_only else result)

    @property
    def loss_scale(self) -> Tensor | None:
        """Factor by which the loss is scaled in fp16, a scalar on the device that follows the scaler; else None."""
        scaler = self._accelerator.scaler
        if scaler is None:
            return None
        if scaler._scale is None:  # made when first used; reading it through get_scale() would wait for the device
            scaler._lazy_init_scale_growth_tracker(self.device)
        scale: Tensor = scaler._scale
        return scale

    def random_states(self) -> list[Tensor]:
        """States of this process's generators: the host's, and the device's own where it has one."""
        states = [torch.get_rng_state()]
        if self.device.type != "cpu":
            states.append(torch.get_device_module(self.device).get_rng_state(self.device))
        return states

    def load_random_states(self, states: Sequence[Tensor]) -> None:
        """Take up states of :meth:`random_states`, as far as there are such here: a GPU's mean nothing to a CPU."""
        host, *own = states
        torch.set_rng_state(host)
        if own and self.device.type != "cpu":
            torch.get_device_module(self.device).set_rng_state(own[0], self.device)

    def synchronize(self) -> None:
        """Wait until the device has done all that it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def wait(self) -> None:
        """Wait for all ranks."""
        self._accelerator.wait_for_everyone()

    def scaler_state(self) -> dict[str, Any] | None:
        """State of the loss scaler, if the precision has one."""
        scaler = self._accelerator.scaler
        return None if scaler is None else scaler.state_dict()

    def load_scaler_state(self, state: dict[str, Any] | None) -> None:
        """Take up a state of :meth:`scaler_state`."""
        if state is not None and self._accelerator.scaler is not None:
            self._accelerator.scaler.load_state_dict(state)

    def check_trackers(self, names: Sequence[str]) -> None:
        """Make sure that the package of every tracker is there.

        Args:
            names: Trackers, as in ``tracking.trackers``.

        Raises:
            ConfigError: One is not.
        """
        available = {str(name) for name in get_available_trackers()}
        for name in names:
            if name not in available:
                raise ConfigError(
                    f"tracking.trackers: {name!r} is not valid here, its package is not installed; "
                    f"expected one of {', '.join(sorted(available))}, or: pip install {name.replace('_', '-')}"
                )

    def start_tracker(self, name: str, run: str, options: dict[str, Any], folder: Path | None = None) -> None:
        """Start one of Accelerate's trackers beside those that are started; it speaks on rank 0 only.

        Args:
            name: The tracker, as in ``tracking.trackers``.
            run: What the tracker calls the project or the run.
            options: Arguments of its start.
            folder: Where it writes its files, if it writes any.
        """
        accelerator = self._accelerator
        started = list(accelerator.trackers)
        accelerator.project_configuration.logging_dir = None if folder is None else str(folder)
        accelerator.log_with = filter_trackers([name], accelerator.logging_dir)
        # Accelerate lists a tracker before it starts: one that does not start must not stay among the others.
        accelerator.trackers = []
        try:
            accelerator.init_trackers(run, init_kwargs={name: options})
            started += accelerator.trackers
        finally:
            accelerator.trackers = started

    def tracker(self, name: str) -> Any:
        """The raw run of a started tracker."""
        return self._accelerator.get_tracker(name, unwrap=True)

    def store_settings(self, name: str, settings: dict[str, Any]) -> None:
        """Tell a tracker how the run was set up."""
        self._accelerator.get_tracker(name).store_init_configuration(settings)

    def log(self, name: str, values: dict[str, Any], step: int | None) -> None:
        """Send values to one tracker."""
        self._accelerator.get_tracker(name).log(values, step=step)

    def finish_tracker(self, name: str) -> None:
        """Let a started tracker write its last and end; raises whatever it does."""
        tracker = self._accelerator.get_tracker(name)
        self._accelerator.trackers.remove(tracker)
        tracker.finish()

    def finish(self) -> None:
        """Let go of everything in an order that ends the process cleanly; trackers have been finished before."""
        self._graph = None
        if hasattr(self, "model"):
            self._prepared_optimizer = None
            del self.model, self.module, self.optimizer
        self._accelerator.free_memory()
        gc.collect()
        self._accelerator.trackers = []  # one that failed or hangs is not asked again
        self._accelerator.end_training()
        # Accelerate's state is shared by all of a process; a later engine starts afresh.
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
