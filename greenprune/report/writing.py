"""A report in the form that is asked for, written to a file or to standard output."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from greenprune.config import UserError
from greenprune.energy import CarbonIntensity
from greenprune.report.contents import build_report
from greenprune.report.parts import Report
from greenprune.report.words import render_csv, render_json, render_markdown
from greenprune.tracking import RunFolder
from greenprune.whole_files import write_atomically, write_output

FORMATS = ("html", "md", "csv", "json", "png")
_TEXT = {"md": render_markdown, "csv": render_csv, "json": render_json}


def write_report(
    paths: Sequence[Path],
    output: Path | None,
    form: str | None,
    notes: Sequence[str] = (),
    carbon: CarbonIntensity | None = None,
) -> Path | None:
    """Read runs and write a report of them.

    Args:
        paths: Runs' folders, their summary.json, or folders that hold runs.
        output: The file, ``-`` for standard output; None: ``report.html`` or ``report.png``, or standard output for
            the other forms.
        form: One of :data:`FORMATS`; None: what the file's name ends in, or html.
        notes: What else a reader must know of the runs.
        carbon: Tell all CO2e at this intensity and PUE; None: at those of each run, where it knows them.

    Returns:
        The file that was written; None if it was standard output.

    Raises:
        UserError: There is no run at a path, the form is not known or needs what is not there, or the file cannot be
            written.
    """
    form = form or _form_of(output)
    report = build_report(paths, notes, carbon)
    content = _render(report, form)
    if output is None and form in ("html", "png"):
        output = Path(f"report.{form}")
    if output is None or str(output) == "-":
        sys.stdout.buffer.write(content)
        sys.stdout.flush()
        return None
    try:
        write_output(output, content)
    except OSError as error:
        raise UserError(f"-o: cannot write {str(output)!r} ({error.strerror}); expected a file in a folder") from None
    return output


def write_run_report(run: RunFolder, folder: Path) -> list[Path]:
    """Write a finished run's report into a folder: as Markdown, and as HTML where its libraries are there.

    Args:
        run: The run.
        folder: Where to write it.

    Returns:
        The files.

    Raises:
        OSError: One cannot be written.
    """
    report = build_report([run.path])
    written = []
    for form in report_forms():
        written.append(folder / f"report.{form}")
        write_atomically(written[-1], _render(report, form))
    return written


def report_forms() -> list[str]:
    """The forms that a report can be kept in here: Markdown, and HTML where its libraries are there."""
    html = importlib.util.find_spec("plotly") and importlib.util.find_spec("jinja2")
    return ["md", "html"] if html else ["md"]


def _form_of(output: Path | None) -> str:
    ending = output.suffix.removeprefix(".").lower() if output is not None else ""
    if ending and ending not in FORMATS:
        raise UserError(f"-o: {str(output)!r} has no known ending; expected {', '.join(FORMATS)}, or --format")
    return ending or "html"


def _render(report: Report, form: str) -> bytes:
    # A name that the file system has in another encoding is no text; what stands for its bytes is escaped.
    if form in _TEXT:
        return _TEXT[form](report).encode(errors="backslashreplace")
    try:
        if form == "png":
            return _picture(report)
        from greenprune.report.page import render_page
    except ModuleNotFoundError as error:
        raise UserError(
            f"--format: {form!r} needs {error.name}; expected md, csv or json, or: pip install 'greenprune[report]'"
        ) from None
    return render_page(report, importlib.metadata.version("greenprune")).encode(errors="backslashreplace")


def _picture(report: Report) -> bytes:
    import kaleido
    from choreographer.errors import ChromeNotFoundError

    from greenprune.report.figures import overview

    try:
        # Nothing is fetched: formulas, which need a library from elsewhere, are not in these figures.
        picture = kaleido.calc_fig_sync(overview(report), opts={"format": "png", "scale": 2}, kopts={"mathjax": False})
    except ChromeNotFoundError:
        raise UserError(
            "--format: 'png' needs Chrome or Chromium, which is not on the PATH; expected html, md, csv or json"
        ) from None
    assert isinstance(picture, bytes)
    return picture
