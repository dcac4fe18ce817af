"""Which networks of torchvision and timm can be gated and lose units exactly, and why the others cannot.

    python benchmarks/zoo.py
    python benchmarks/zoo.py --only resnet50 vit_b_16 timm/resnet26 --units channel

Each network is built with its library's own default size and random weights, and goes the way of a user's: a
:class:`greenprune.Pruner` with gates on blocks and channels, two steps of training with its penalty, ``finalize`` to
half of its FLOPs (or to more, where more of it has no gate), another step. Beside it stands a copy that keeps all its
parameters and has the gates of what was removed shut: both have to compute the same. Two images a batch; the steps
train nothing, they only have to work.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import gc
import json
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import timm
import torch
import torchvision
from torch import Tensor, nn

from greenprune import BudgetConfig, GateConfig, Pruner
from greenprune.config import UserError
from greenprune.gating import find_gates, gated_units
from greenprune.provenance import collect_provenance
from greenprune.surgery import Operation

RESULTS = Path(__file__).parent / "results"
BATCH = 2
TARGETS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99)  # a network of which more has no gate is pruned to the next
# Rounding alone: sums of the same numbers in another order, over the depth of a network in fp32.
SAME = 1e-4

Kind = Literal["classification", "segmentation", "detection", "video", "timm"]


@dataclass(frozen=True)
class Entry:
    """A network of the zoo.

    Attributes:
        name: Its name, timm's as ``timm/<name>``.
        kind: What it is for; of those for detection the backbone is taken.
        side: Pixels of a side of its images, or of its frames.
    """

    name: str
    kind: Kind
    side: int

    def build(self) -> nn.Module:
        """The network with random weights."""
        if self.kind == "timm":
            return timm.create_model(self.name.removeprefix("timm/"), pretrained=False)
        options: dict[str, Any] = {"weights": None}
        if self.kind in ("segmentation", "detection"):
            options["weights_backbone"] = None
        if self.name in ("googlenet", "inception_v3"):
            options["init_weights"] = False
        model = torchvision.models.get_model(self.name, **options)
        return model.backbone if self.kind == "detection" else model

    def example(self) -> Tensor:
        """A batch [2, 3, side, side], or of 16 frames [2, 3, 16, side, side]."""
        frames = (16,) if self.kind == "video" else ()
        return torch.randn(BATCH, 3, *frames, self.side, self.side)


@dataclass
class Found:
    """What came of a network.

    Attributes:
        name: Its name.
        kind: What it is for.
        side: Pixels of a side.
        params: Parameters of the dense network.
        refused: Why it cannot be pruned; None if it can.
        blocks: Gated blocks.
        sets: Gated sets of channels.
        channels: Units in them.
        flops_kept: Share of the FLOPs that is kept.
        params_kept: Share of the parameters.
        deviation: Largest difference between removed and masked, over the largest output.
        removal_s: Seconds of ``finalize``.
        notes: How many parts of it are named as not gated.
    """

    name: str
    kind: Kind
    side: int
    params: int = 0
    refused: str | None = None
    blocks: int = 0
    sets: int = 0
    channels: int = 0
    flops_kept: float = 1.0
    params_kept: float = 1.0
    deviation: float = 0.0
    removal_s: float = 0.0
    notes: int = 0

    @property
    def outcome(self) -> str:
        """In a word: pruned, refused (with a reason that a user can read), inexact or failed."""
        if self.refused is not None:
            return "failed" if self.refused.startswith("failed: ") else "refused"
        return "pruned" if self.deviation <= SAME else "inexact"


def zoo() -> list[Entry]:
    """Every network of torchvision but those made for quantization and optical flow; of timm one of each module."""
    models = torchvision.models
    entries = []
    modules: list[tuple[Kind, Any]] = [
        ("classification", models),
        ("segmentation", models.segmentation),
        ("detection", models.detection),
        ("video", models.video),
    ]
    for kind, module in modules:
        for name in models.list_models(module=module):
            entries.append(Entry(name, kind, _side_in_torchvision(name, kind)))
    for module in timm.list_modules():
        names = timm.list_models(module=module)
        if names:
            name = min(names, key=lambda name: (_side_of(name), names.index(name)))
            entries.append(Entry(f"timm/{name}", "timm", _side_of(name)))
    return entries


def _side_in_torchvision(name: str, kind: Kind) -> int:
    """Pixels that it takes: few where any will do."""
    of_its_own = {"vit_h_14": 518, "inception_v3": 299, "ssd300_vgg16": 300, "s3d": 224}
    if name in of_its_own:
        return of_its_own[name]
    if name.startswith(("vit", "swin", "maxvit", "mvit")):
        return 224
    return 64 if kind == "video" else 128


def _side_of(name: str) -> int:
    """Pixels that one of timm's takes; networks with local attention want them to be divisible into its windows."""
    config = timm.get_pretrained_cfg(name)
    side = 224 if config is None else int(config.input_size[-1])
    fixed = config is None or config.fixed_input_size or any(kind in name for kind in ("halo", "bat_"))
    return side if fixed else min(side, 128)


def tensors_of(output: Any) -> Iterator[Tensor]:
    """The tensors of an output, in tuples, lists and dicts."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from tensors_of(value)
    elif isinstance(output, tuple | list):
        for value in output:
            yield from tensors_of(value)


def wake(model: nn.Module, example: Tensor) -> None:
    """Move what libraries start at a constant, so that every branch says something, and take up the statistics."""
    for parameter in model.parameters():
        if parameter.numel() > 1 and parameter.detach().std() < 1e-3:
            centre = 1.0 if parameter.detach().mean() > 0.5 else 0.0
            nn.init.uniform_(parameter, centre - 0.3, centre + 0.3)
    with torch.no_grad():
        model.train()(example)


def train_step(model: nn.Module, example: Tensor, optimizer: torch.optim.Optimizer, pruner: Pruner) -> None:
    """One step; the loss is the mean square of all outputs."""
    model.train()
    loss = torch.stack([out.float().square().mean() for out in tensors_of(model(example))]).sum() + pruner.penalty()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def shut(masked: nn.Module, removed: list[Operation]) -> None:
    """Set the gates of a network that lost nothing so that what was removed is off, and all else on."""
    blocks = {done.unit for done in removed if done.action == "remove" and done.channels is None}
    channels = {done.unit: done.channels for done in removed if done.channels is not None}
    for name, gate in find_gates(masked).items():
        block = name.rpartition(":")[0] or name
        if gate.weight is not None:
            nn.init.zeros_(gate.weight)
        nn.init.constant_(gate.bias, -1.0 if {name, block} & blocks else 1.0)
        with torch.no_grad():
            gate.bias[list(channels.get(name) or ())] = -1.0


def _pruner(model: nn.Module, example: Tensor, units: list[str]) -> Pruner:
    """The network's pruner, on its blocks alone where it has no channels, to the first of the targets that it can."""
    for target in TARGETS:
        budget, gate = BudgetConfig(target=target), GateConfig(units=units)  # type: ignore[arg-type]
        try:
            return Pruner(model, example, total_steps=100, gate=gate, budget=budget)
        except UserError as refusal:
            if len(units) > 1 and "gate.units: 'channel'" in str(refusal):
                return _pruner(model, example, ["block"])
            if "budget.target" not in str(refusal) or target == TARGETS[-1]:
                raise
    raise AssertionError("no targets")


def try_out(entry: Entry, units: list[str], most_params: float) -> Found | None:
    """Take one network all the way; None if it is larger than asked for."""
    torch.manual_seed(0)
    found = Found(entry.name, entry.kind, entry.side)
    model = entry.build()
    found.params = sum(parameter.numel() for parameter in model.parameters())
    if found.params > most_params:
        return None
    example = entry.example()
    wake(model, example)
    try:
        pruner = _pruner(model, example, units)
    except UserError as refusal:
        found.refused = " ".join(str(refusal).split())
        return found
    gates = find_gates(model)
    found.blocks = sum(":" not in name for name in gates)
    found.sets = len(gates) - found.blocks
    found.channels = len(gated_units(model)) - found.blocks
    found.notes = len(pruner.notes)
    optimizer = torch.optim.SGD(pruner.parameter_groups(batch_size=BATCH), lr=1e-6, momentum=0.9)
    for _ in range(2):
        train_step(model, example, optimizer, pruner)
        pruner.step(optimizer)
    optimizer.zero_grad()
    masked = copy.deepcopy(model)
    began_s = time.perf_counter()
    shut(masked, pruner.finalize(optimizer))
    found.removal_s = time.perf_counter() - began_s
    with torch.no_grad():
        ours, theirs = (list(tensors_of(network.eval()(example))) for network in (model, masked))
    del masked
    differences = [(a - b).abs().max() / b.abs().max().clamp(min=1e-30) for a, b in zip(ours, theirs, strict=True)]
    found.deviation = float(torch.stack(differences).max())
    train_step(model, example, optimizer, pruner)
    if not all(bool(out.isfinite().all()) for out in tensors_of(model.eval()(example))):
        found.deviation = float("inf")
    report = pruner.report()
    found.flops_kept = report["flops_forward"] / report["flops_forward_dense"]
    found.params_kept = sum(parameter.numel() for parameter in model.parameters()) / found.params
    return found


def table(rows: list[Found], left_out: list[str], provenance: dict[str, Any], units: list[str]) -> str:
    """What can be pruned, and what cannot with the reason, in Markdown."""
    counts = {word: sum(row.outcome == word for row in rows) for word in ("pruned", "refused", "inexact", "failed")}
    lines = [
        ", ".join(f"{count} {word}" for word, count in counts.items() if count) + f"; gates on {' and '.join(units)}."
    ]
    heads = [
        "network",
        "parameters",
        "images",
        "blocks",
        "channels in sets",
        "FLOPs kept",
        "parameters kept",
        "deviation",
    ]
    lines += ["", f"| {' | '.join([*heads, 'removal s', 'parts not gated'])} |", "|---" * (len(heads) + 2) + "|"]
    for row in rows:
        if row.refused is None:
            cells = [
                row.name,
                f"{row.params / 1e6:.1f} M",
                f"{row.side}",
                f"{row.blocks}",
                f"{row.channels} in {row.sets}",
            ]
            cells += [f"{row.flops_kept:.3f}", f"{row.params_kept:.3f}", f"{row.deviation:.0e}"]
            lines.append(f"| {' | '.join([*cells, f'{row.removal_s:.2f}', f'{row.notes}'])} |")
    lines += ["", "| refused | reason |", "|---|---|"]
    lines += [f"| {row.name} | {row.refused.replace('|', '/')} |" for row in rows if row.refused is not None]
    if left_out:
        lines += ["", f"Left out, of more parameters than asked for: {', '.join(left_out)}."]
    git = provenance["git"] or {"revision": "unknown", "changed": False}
    versions = {**provenance["versions"], "timm": timm.__version__}
    said = ", ".join(f"{name} {versions[name]}" for name in ("greenprune", "torch", "torchvision", "timm"))
    lines += [
        "",
        f"{provenance['cpu']}; revision {git['revision'][:12]}{' with changes' if git['changed'] else ''}; {said}.",
    ]
    return "\n".join(lines) + "\n"


def write(folder: Path, rows: list[Found], left_out: list[str], provenance: dict[str, Any], units: list[str]) -> None:
    """Write the table, and all figures beside it."""
    (folder / "zoo.md").write_text(table(rows, left_out, provenance, units))
    content = {"provenance": provenance, "arguments": sys.argv[1:], "units": units, "left_out": left_out}
    content["rows"] = [{**dataclasses.asdict(row), "outcome": row.outcome} for row in rows]
    text = json.dumps(content, indent=1).replace(str(folder), folder.name)  # where it lies is nobody's business
    (folder / "zoo.json").write_text(text + "\n")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", help="only these networks")
    parser.add_argument("--units", nargs="+", choices=("block", "channel"), default=["block", "channel"])
    parser.add_argument("--most-params", type=float, default=150e6, help="larger networks are left out")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the result files")
    args = parser.parse_args(argv)
    entries = zoo()
    if args.only is not None:
        known = {entry.name: entry for entry in entries} | {
            f"timm/{name}": Entry(f"timm/{name}", "timm", _side_of(name)) for name in timm.list_models()
        }
        unknown = sorted(set(args.only) - known.keys())
        if unknown:
            parser.error(f"--only: {', '.join(unknown)} is not a network of torchvision (timm's are timm/<name>)")
        entries = [known[name] for name in args.only]
    rows: list[Found] = []
    left_out: list[str] = []
    provenance = collect_provenance(1, torch.device("cpu"))
    args.output.mkdir(parents=True, exist_ok=True)
    for number, entry in enumerate(entries, start=1):
        began_s = time.perf_counter()
        try:
            found = try_out(entry, args.units, args.most_params)
        except Exception as error:  # noqa: BLE001 - whatever it is, it belongs into the table
            found = Found(entry.name, entry.kind, entry.side)
            found.refused = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        gc.collect()
        if found is None:
            left_out.append(entry.name)
            continue
        rows.append(found)
        said = found.refused or f"{found.blocks} blocks, {found.channels} channels, {found.deviation:.0e}"
        took_s = time.perf_counter() - began_s
        print(f"[{number}/{len(entries)}] {entry.name}: {found.outcome}, {said} ({took_s:.0f} s)", flush=True)
        # Network by network: what is known stays when a later one ends the process.
        write(args.output, rows, left_out, provenance, args.units)
    return int(any(row.outcome in ("inexact", "failed") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
