"""The page of a site, for the people who own its data: what ran on them, what left, and what is allowed."""

from __future__ import annotations

from collections import Counter
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Response
from fastapi.responses import HTMLResponse
from jinja2 import Environment, PackageLoader, StrictUndefined

from corymb.client.gate.ledger import Ledger, in_words
from corymb.client.gate.policy import Refusal, SitePolicy
from corymb.pages.app import base_app

SHOWN = 200  # entries of the ledger
templates = Environment(loader=PackageLoader("corymb.pages", "assets"), autoescape=True, undefined=StrictUndefined)


def site_state(folder: Path, now: datetime) -> dict[str, Any]:
    """Return what the page shows of the site whose kit lies in `folder`, at the time `now`."""
    ledger, problem = Ledger(folder / "ledger.jsonl"), ""
    entries: list[dict[str, Any]] = []
    try:
        entries.extend(ledger.entries())
    except ValueError as error:
        problem = str(error)
    try:
        policy = SitePolicy.read(folder / "policy.toml")
    except Refusal as error:
        return {"name": folder.name, "problem": f"Nothing runs: {error}.", "policy": None, "entries": [], "apps": []}
    left = [entry for entry in entries if "bytes" in entry]
    ran = [entry for entry in entries if entry["event"] == "ran" and _is_training(entry)]  # as the gate counts them
    today = [entry for entry in ran if now - _time_of(entry) < timedelta(days=1)]
    budget = f"{len(today)} of {policy.most_rounds_a_day}" if policy.most_rounds_a_day else str(len(today))
    apps = [
        {
            "app": approval.app, "purpose": approval.purpose, "expires": approval.expires,
            "is_over": approval.expires <= now.date(),
            "tasks": sum(entry.get("app") == approval.app for entry in left),
        }
        for approval in policy.approved
    ]  # fmt: skip
    return {
        "name": folder.name,
        "problem": problem,
        "policy": policy,
        "budget": budget,
        "apps": apps,
        "bytes": sum(entry["bytes"] for entry in left),
        "tasks": len(left),
        "refused": Counter(entry["reason"] for entry in entries if entry["event"] == "refused" and "reason" in entry),
        "last": _time_of(entries[-1]) if entries else None,
        "entries": [in_words(entry) for entry in reversed(entries[-SHOWN:])],
        "head": ledger.head(),
    }


def make_site_app(folder: Path, hosts: list[str] | None = None) -> FastAPI:
    """Return the application for the site whose kit lies in `folder`. Raises `ValueError` if it has no policy."""
    if not (folder / "policy.toml").exists():
        raise ValueError(f"{folder} has no policy.toml; give the kit of a site.")
    app = base_app(hosts)

    @app.get("/")
    def page() -> Response:
        state = site_state(folder, datetime.now().astimezone())
        return HTMLResponse(templates.get_template("site.html.j2").render(state))

    return app


def _time_of(entry: dict[str, Any]) -> datetime:
    return datetime.fromisoformat(entry["at"]).astimezone()


def _is_training(entry: dict[str, Any]) -> bool:
    return str(entry.get("kind", "")).startswith("train")
