"""Create a package for a new rule: `corymb new rule NAME`."""

from __future__ import annotations

import keyword
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from corymb.strategies import known_rules

KINDS = ("sighted", "blind")


def new_rule(name: str, kind: str, parent: Path) -> Path:
    """Create and return the folder `parent/name` with a rule of `kind`, its entry point, a test and an experiment.

    Raises `ValueError` if the name is not a module name or is taken, the kind is unknown, or the folder exists.
    """
    if not name.isidentifier() or keyword.iskeyword(name) or name != name.lower():
        raise ValueError(f"The name {name!r} is not a module name; use lower-case letters, digits and underscores.")
    if name in known_rules():
        raise ValueError(f"A rule {name!r} exists already; choose another name.")
    if kind not in KINDS:
        raise ValueError(f"The kind {kind!r} is unknown; choose one of {', '.join(KINDS)}.")
    folder = parent / name
    if folder.exists():
        raise ValueError(f"The path {folder} exists already; choose another name or another folder (--out).")
    templates = FileSystemLoader(Path(__file__).parent / "templates")
    environment = Environment(loader=templates, undefined=StrictUndefined, keep_trailing_newline=True)
    title = "".join(part.capitalize() for part in name.split("_"))
    folder.mkdir(parents=True)
    for template, file in (
        ("pyproject.toml", "pyproject.toml"),
        (f"{kind}.py", f"{name}.py"),
        ("test.py", f"test_{name}.py"),
        ("experiment.toml", f"{name}.toml"),
    ):
        text = environment.get_template(f"{template}.j2").render(name=name, title=title)
        (folder / file).write_text(text)
    return folder
