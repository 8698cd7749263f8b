"""The web application: metrics, health, and the pages with the data that they ask for."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from fastapi.staticfiles import StaticFiles
from starlette.concurrency import run_in_threadpool
from starlette.middleware.trustedhost import TrustedHostMiddleware

from corymb.pages.health import health_problems, progress_problems
from corymb.pages.metrics import exposition
from corymb.pages.numbers import Federation, Runs
from corymb.pages.operator import Operator

ASSETS = Path(__file__).parent / "assets"
POLL_SECONDS, BEAT_SECONDS = 0.5, 15.0
LOCAL = ["localhost", "127.0.0.1", "[::1]"]
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


def base_app(hosts: list[str] | None = None) -> FastAPI:
    """Return an application with the assets and strict headers.

    It answers requests for `hosts` (default: the names of this machine) only, so that no page elsewhere can read it
    through a name that it has made point here.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts or LOCAL)

    @app.middleware("http")
    async def add_headers(request: Request, call_next: Any) -> Response:
        response: Response = await call_next(request)
        response.headers.update(HEADERS)
        return response

    @app.exception_handler(ValueError)
    def refuse(request: Request, error: ValueError) -> Response:
        return JSONResponse({"error": str(error)}, 400)

    app.mount("/assets", StaticFiles(directory=ASSETS))
    return app


def make_app(source: Runs, hosts: list[str] | None = None) -> FastAPI:
    """Return the application for `source`, which answers requests for `hosts` only; see `base_app`."""
    app, operator = base_app(hosts), Operator(source)
    if isinstance(source, Federation):
        _add_metrics(app, source)

    @app.get("/")
    def page() -> Response:
        return FileResponse(ASSETS / "operator.html")

    @app.get("/research")
    def research() -> Response:
        return FileResponse(ASSETS / "research.html")

    @app.get("/api/research")
    def experiments() -> dict[str, Any]:
        from corymb.pages.research import payload  # imports torch, which a server need not
        from corymb.simulations.results.stored import stored_experiment
        from corymb.simulations.results.summary import experiments_under

        return payload([each for each in experiments_under(source.folder) if stored_experiment(each) is not None])

    @app.get("/api/view")
    def view(run: str = "") -> dict[str, Any]:
        return operator.view(run)

    @app.get("/api/sites")
    def sites(run: str = "", offset: int = 0, limit: int = 200, order: str = "state") -> dict[str, Any]:
        return operator.sites(run, offset, min(limit, 1000), order)

    @app.get("/api/site")
    def site(name: str, run: str = "") -> dict[str, Any]:
        return operator.site(name, run)

    @app.get("/api/events")
    async def events(run: str = "") -> Response:
        return StreamingResponse(_changes(source, run), media_type="text/event-stream")

    return app


def serve(app: FastAPI, port: int) -> None:
    """Answer at `port` of this machine until SIGINT or SIGTERM; pages that follow a run are then cut off."""
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning", timeout_graceful_shutdown=1)


def _add_metrics(app: FastAPI, source: Federation) -> None:
    @app.get("/metrics")
    def metrics() -> Response:
        return Response(exposition(source.numbers(time.time())), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/health")
    def health() -> Response:
        return _verdict(health_problems(source.numbers(time.time())))

    @app.get("/ready")
    def ready() -> Response:
        return _verdict(progress_problems(source.numbers(time.time())))


def _verdict(problems: list[str]) -> Response:
    return JSONResponse({"ok": not problems, "problems": problems}, 503 if problems else 200)


async def _changes(source: Runs, run: str) -> AsyncIterator[str]:
    """Yield a server-sent event at the beginning and for each change; the page then asks for its state anew.

    So a page whose connection broke has missed nothing once it is connected again.
    """
    known: Any = None
    beat = time.monotonic()
    while True:
        journal = await run_in_threadpool(source.journal, run)
        state = ("", 0, 0)
        if journal is not None:
            state = (str(journal.folder), journal.last_round(), journal.last_event()[0])
        seen = source.seen()
        whole = (state, sorted(name for name, site in seen["sites"].items() if site["online"]), seen["runs"])
        if whole != known:
            known, beat = whole, time.monotonic()
            yield f"id: {state[2]}\nevent: change\ndata: round {state[1]}\n\n"
        elif time.monotonic() - beat > BEAT_SECONDS:
            beat = time.monotonic()
            yield ": still here\n\n"
        await asyncio.sleep(POLL_SECONDS)
