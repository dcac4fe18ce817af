"""Taking a network away: exports that do without greenprune, their accuracy and what they cost at inference."""

from greenprune.export.accuracy import FileAccuracy, evaluate_file
from greenprune.export.exporting import Exported, export_network, export_run
from greenprune.export.formats import ExportError
from greenprune.export.inference import InferenceReport, benchmark_inference

__all__ = [
    "ExportError",
    "Exported",
    "FileAccuracy",
    "InferenceReport",
    "benchmark_inference",
    "evaluate_file",
    "export_network",
    "export_run",
]
