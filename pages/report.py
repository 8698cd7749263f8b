"""The researcher's page with the data inside: one file that opens offline."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from corymb.pages.research import payload
from corymb.simulations.results.summary import experiments_under

ASSETS = Path(__file__).parent / "assets"
SCRIPTS = ("echarts.min.js", "panels.js", "research.js")


def write_report(folders: Sequence[Path], path: Path) -> Path:
    """Write the page of the finished experiments in `folders` and below to the file `path`, and return it.

    Raises `ValueError` for a folder without a finished experiment.
    """
    found = [each for folder in folders for each in experiments_under(folder) or [folder]]
    data = json.dumps(payload(found), separators=(",", ":")).replace("<", "\\u003c")  # no tag ends the script
    page = (ASSETS / "research.html").read_text()
    style = f"<style>{(ASSETS / 'page.css').read_text()}{(ASSETS / 'research.css').read_text()}</style>"
    scripts = "".join(f"<script>{(ASSETS / name).read_text()}</script>" for name in SCRIPTS)
    head, _, rest = page.partition("<!-- assets -->")
    _, _, rest = rest.partition("<!-- end of assets -->")
    body = f'<script type="application/json" id="data">{data}</script>{scripts}</body>'
    path.write_text(head + style + rest.replace("</body>", body))
    return path
