"""What came out of a run, and how runs compare."""

from greenprune.report.comparison import Comparison, compare_runs
from greenprune.report.runs import ComparedRun
from greenprune.report.summary import print_summary, summary_table

__all__ = ["ComparedRun", "Comparison", "compare_runs", "print_summary", "summary_table"]
