"""The model card: what an exported network is, what its training took, and how it is loaded, for a person and a hub."""

from __future__ import annotations

from typing import Any

import yaml

from greenprune.energy import format_intensity
from greenprune.formatting import UNKNOWN, format_joules, format_percent, format_removed, format_share, format_si

_LIBRARIES = {"onnx": "onnx", "hf": "transformers"}

_USE = {
    "torch": """
from network import load_network  # network.py in this folder

network = load_network("model.pt")
logits = network(images)""",
    "safetensors": """
from network import load_network  # network.py in this folder

network = load_network("model.safetensors")
logits = network(images)""",
    "torch.export": """
import torch

network = torch.export.load("model.pt2").module()
logits = network(images)""",
    "onnx": """
import onnxruntime

session = onnxruntime.InferenceSession("model.onnx")
(logits,) = session.run(None, {"images": images})""",
    "hf": """
from transformers import AutoModelForImageClassification

network = AutoModelForImageClassification.from_pretrained("path/to/this/folder", trust_remote_code=True)
logits = network(images).logits""",
}


def model_card(record: dict[str, Any]) -> str:
    """The text of README.md for an exported network.

    Args:
        record: Content of export.json.
    """
    summary: dict[str, Any] = record["summary"] or {}
    sections = [
        f"# {record['name']}",
        _introduction(record, summary),
        "## Use it",
        _use(record),
        "## Figures",
        _table(_figures(record, summary)),
        "## Structure",
        _structure(summary),
        "## Licence",
        "Not stated: whoever publishes the network chooses it and enters it above, as `license`.",
    ]
    return f"---\n{_front_matter(record, summary)}---\n\n" + "\n\n".join(sections) + "\n"


def _front_matter(record: dict[str, Any], summary: dict[str, Any]) -> str:
    """The metadata that the Hugging Face hub reads; grams of CO2e in the convention of its co2_eq_emissions."""
    values: dict[str, Any] = {
        "library_name": _LIBRARIES.get(record["kind"], "pytorch"),
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "pruned", "greenprune"],
    }
    text = _yaml(values) + "# license: left to whoever publishes the network\n"
    if summary.get("co2_g") is not None:
        emissions = {
            "emissions": summary["co2_g"],
            "source": f"greenprune: energy by {summary['energy_quality']}; {_intensity(summary)}",
            "training_type": "pre-training",
            "geographical_location": record["country"],
            "hardware_used": record["hardware"],
        }
        known = {key: value for key, value in emissions.items() if value is not None}
        text += _yaml({"co2_eq_emissions": known})
    if summary.get("accuracy") is not None:
        dataset = {"type": summary["data"], "name": summary["data"], "split": summary["accuracy_kind"]}
        result = {
            "task": {"type": "image-classification"},
            "dataset": dataset,
            "metrics": [{"type": "accuracy", "value": summary["accuracy"]}],
        }
        text += _yaml({"model-index": [{"name": record["name"], "results": [result]}]})
    return text


def _intensity(summary: dict[str, Any]) -> str:
    """What turned joules into grams."""
    text = format_intensity(summary["carbon_intensity_g_per_kwh"])
    if summary.get("carbon_intensity_source"):
        text += f" ({summary['carbon_intensity_source']})"
    return text if summary.get("pue") in (None, 1) else f"{text} and a PUE of {summary['pue']:g}"


def _yaml(values: dict[str, Any]) -> str:
    """Values with their innermost mappings on one line each."""
    return yaml.safe_dump(values, sort_keys=False, default_flow_style=None, width=10_000, allow_unicode=True)


def _introduction(record: dict[str, Any], summary: dict[str, Any]) -> str:
    what = f"{summary['model']} trained on {summary['data']}" if summary else "A network"
    if summary.get("gated"):
        what += " with gates, which removed what it does not need while it trained. No gate is left in it"
    return f"{what}. Written by greenprune {record['made_with']['greenprune']}, which is not needed to use it."


def _use(record: dict[str, Any]) -> str:
    channels, height, width = record["input"]["shape"]
    lines = [f"Images are float32 [B, {channels}, {height}, {width}], for any B; logits are [B, {record['classes']}]."]
    if record["input"]["mean"] is not None:
        mean, std = (", ".join(f"{value:.6g}" for value in record["input"][key]) for key in ("mean", "std"))
        lines.append(
            f"They are (pixel - mean) / deviation for each channel, with mean ({mean}) and deviation ({std}) in the "
            "units in which the data set stores its pixels."
        )
    return " ".join(lines) + f"\n\n```python{_USE[record['kind']]}\n```"


def _figures(record: dict[str, Any], summary: dict[str, Any]) -> list[tuple[str, str]]:
    check = record["check"]
    rows = [
        (
            "exported against trained",
            f"{check['max_relative_logit_difference']:.1e} largest logit difference, relative to the largest logit, on "
            f"{check['images']} images of {check['data']} ({check['engine']})",
        )
    ]
    if not summary:
        return rows
    if summary["co2_g"] is None:
        co2 = f"{UNKNOWN}: the energy or the grid's carbon intensity is"
    else:
        co2 = f"{format_si(summary['co2_g'], 'g')}, at {_intensity(summary)}"
    return [
        ("data", summary["data"]),
        ("accuracy", _accuracy(summary)),
        ("parameters", _against_dense(summary, "params", "")),
        ("FLOPs, one image (a multiply-add counts as 2)", _against_dense(summary, "flops_forward", "FLOPs")),
        ("FLOPs of training", _against_dense(summary, "flops_train", "FLOPs")),
        ("energy of training", _energy(summary)),
        ("CO2e of training", co2),
        ("hardware", record["hardware"] or UNKNOWN),
        *rows,
    ]


def _accuracy(summary: dict[str, Any]) -> str:
    """The run's own figure, with the precision in which it was measured if that is not the export's."""
    measured = f"{format_percent(summary['accuracy'], 2)} on the {summary['accuracy_kind']} set"
    return measured if summary["precision"] == "no" else f"{measured}, in {summary['precision']} (this file is fp32)"


def _energy(summary: dict[str, Any]) -> str:
    """Joules with their bound, their quality, and each device's source."""
    if summary["energy_j"] is None:
        return UNKNOWN
    by_device = summary["energy_by_device_j"]
    complete = summary.get("energy_complete", True) and None not in by_device.values()
    bound = "" if summary.get("energy_bound_j") is None else f" ± {format_joules(summary['energy_bound_j'])}"
    sources = "; ".join(f"{device} {format_joules(joules)}" for device, joules in by_device.items())
    joules = f"{'' if complete else 'at least '}{format_joules(summary['energy_j'])}{bound}"
    return f"{joules} ({summary['energy_quality'] or 'quality unknown'}: {sources})"


def _against_dense(summary: dict[str, Any], key: str, unit: str) -> str:
    now, dense = summary[key], summary[f"{key}_dense"]
    if now == dense:
        return format_si(now, unit)
    return f"{format_si(now, unit)}, dense {format_si(dense, unit)} ({format_share(now, dense)})"


def _table(rows: list[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows)])


def _structure(summary: dict[str, Any]) -> str:
    if not summary:
        return "Not recorded."
    if not summary["removals"]:
        return "Nothing was removed: this is the dense network."
    left = f"{summary['blocks']} of {summary['blocks_dense']} blocks are left"
    if summary.get("channels_dense"):
        left += f", {summary['channels']:,} of {summary['channels_dense']:,} channels inside blocks"
    return f"{left}. Removed: {format_removed(summary['removals'])}."
