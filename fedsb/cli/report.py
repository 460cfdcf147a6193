"""`fedsb report`: a run or a comparison as one page that a browser shows without a network."""

from pathlib import Path
from typing import Annotated

import typer

from fedsb.errors import StoreError
from fedsb.report.compare_page import RESULTS, compare_page
from fedsb.report.page import html_of
from fedsb.report.run_page import run_page
from fedsb.store.files import write_file


def report(
    folder: Annotated[Path, typer.Argument(help="of a run or a comparison, also of one that is not finished")],
    out: Annotated[Path | None, typer.Option(help="file to write; by default report.html in the folder")] = None,
) -> None:
    """Write what happened as one HTML page: whether it went well, losses, scores, bytes, ε, and what the adapters look like."""
    if not folder.is_dir():
        raise StoreError(f"{folder}: there is no such folder; name one of a run or a comparison")
    page = compare_page(folder) if (folder / RESULTS).exists() else run_page(folder)
    path = out or folder / "report.html"
    if path.is_dir():
        raise StoreError(f"{path} is a folder; name a file, such as {path / 'report.html'}")
    write_file(path, html_of(page).encode())
    print(path)
