"""The pages in Chromium, through the commands that users run: a live run, a restart of the server, keyboard, themes."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect, sync_playwright

from corymb.client.gate.ledger import Ledger
from corymb.client.gate.policy import template
from corymb.simulations import Experiment, run
from corymb.tests.pages.world import federation, make_kit, publish, run_rounds

CHROMIUM = shutil.which("chromium")
QUIET = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync")  # fmt: skip
SCREENSHOTS = os.environ.get("CORYMB_SCREENSHOTS", "")  # a folder for the pictures of the documentation
expect.set_options(timeout=60_000)  # on a machine whose cores are busy
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),  # of Playwright, as it closes
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium, of Debian's package chromium"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=list(QUIET))
        yield opened
        opened.close()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextmanager
def command(*arguments: str, port: int) -> Iterator[str]:
    """Run `corymb ARGUMENTS --port PORT` until the context ends, and yield its address."""
    address = f"http://127.0.0.1:{port}/"
    process = subprocess.Popen([sys.executable, "-m", "corymb.cli", *arguments, "--port", str(port)])
    try:
        for _ in range(300):
            try:
                urlopen(address, timeout=5).close()
                break
            except URLError:
                assert process.poll() is None
                time.sleep(0.1)
        yield address
    finally:
        process.terminate()
        process.wait()


@contextmanager
def opened(browser: Browser, address: str, scheme: str = "light") -> Iterator[tuple[Page, list[str]]]:
    """Open a page, and yield it with the list of its console errors."""
    page = browser.new_page(color_scheme=scheme, viewport={"width": 1200, "height": 900})  # type: ignore[arg-type]
    errors: list[str] = []
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(address)
    try:
        yield page, errors
    finally:
        page.close()


def serious(page: Page) -> list[str]:
    """Return the findings of axe-core that are serious or worse."""
    found = Axe().run(page).response["violations"]
    return [f"{each['id']}: {each['nodes'][0]['html']}" for each in found if each["impact"] in ("serious", "critical")]


def picture(page: Page, name: str) -> None:
    if SCREENSHOTS:
        page.screenshot(path=Path(SCREENSHOTS) / name, full_page=True)


def test_a_live_run_is_followed_to_its_end_across_a_restart(browser: Browser, tmp_path: Path) -> None:
    kit, port = make_kit(tmp_path), free_port()
    publish(kit, runs={"1": "running"})
    code = (
        "from pathlib import Path; from corymb.tests.pages.world import run_rounds; "
        f"run_rounds(Path({str(kit / 'var/corymb/runs/run-1')!r}), rounds=25, wrong='south', seconds=0.1)"
    )
    with command("dashboard", str(kit), port=port) as address, opened(browser, address) as (page, errors):
        expect(page.locator("#sentence")).to_have_text("No run has begun yet.")
        running = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
        expect(page.locator("#run")).to_have_text("Corymb · run-1")
        expect(page.locator("#sentence")).to_contain_text(" of 25")
        assert errors == []
        first = page.locator("#sentence").inner_text()
    with opened_across_restart(browser, kit, port) as (page, errors):
        assert running.wait(timeout=120) == 0
        publish(kit, runs={"1": "finished:completed"})
        expect(page.locator("#sentence")).to_have_text("Finished after round 25 of 25.")
        assert page.locator("#sentence").inner_text() != first
        expect(page.locator("#rows tr")).to_have_count(3)
        expect(page.locator("#rows")).to_contain_text("tensor 'w' has NaN")
        expect(page.locator("#cards")).to_contain_text("96.15 %")
        assert [error for error in errors if "ERR_CONNECTION" not in error and "ERR_INCOMPLETE" not in error] == []
        picture(page, "operator.png")


@contextmanager
def opened_across_restart(browser: Browser, kit: Path, port: int) -> Iterator[tuple[Page, list[str]]]:
    """Open the page, end its server, start another at the same port, and yield the page once it is connected again."""
    with command("dashboard", str(kit), port=port) as address:
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        errors: list[str] = []
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.goto(address)
        expect(page.locator("#rows tr")).to_have_count(3)
    expect(page.locator("#link")).to_contain_text("is lost")
    with command("dashboard", str(kit), port=port):
        expect(page.locator("#link")).to_contain_text("online")
        yield page, errors
    page.close()


def test_keyboard_and_both_themes(browser: Browser, tmp_path: Path) -> None:
    source = federation(tmp_path, wrong="south")
    port = free_port()
    with command("dashboard", str(source.folder), port=port) as address:
        for scheme in ("light", "dark"):
            with opened(browser, address, scheme) as (page, errors):
                expect(page.locator("#rows tr")).to_have_count(3)
                assert serious(page) == []
                assert errors == []
                if scheme == "dark":
                    picture(page, "operator-dark.png")
        with opened(browser, address) as (page, errors):
            expect(page.locator("#rows tr")).to_have_count(3)
            for _ in range(40):  # Tab reaches the first site
                page.keyboard.press("Tab")
                if page.evaluate("document.activeElement.dataset.site") == "south":
                    break
            page.keyboard.press("Enter")
            expect(page.locator("#site h2").first).to_have_text("The site south")
            expect(page.locator("#site tbody tr")).to_have_count(3)
            assert page.evaluate("document.activeElement.textContent") == "Close"
            page.keyboard.press("Enter")
            expect(page.locator("#site")).to_be_hidden()
            assert page.evaluate("document.activeElement.dataset.site") == "south"
            assert errors == []


def test_a_site_called_like_a_script_is_text(browser: Browser, tmp_path: Path) -> None:
    name = "<script>alert(1)</script>"
    run_rounds(tmp_path / "runs" / "one", rounds=2, names=(name, "north"))
    dialogs: list[str] = []
    with command("dashboard", str(tmp_path / "runs"), port=free_port()) as address:
        with opened(browser, address) as (page, errors):
            page.on("dialog", lambda dialog: dialogs.append(dialog.message))
            expect(page.locator("#rows")).to_contain_text(name)
            page.get_by_role("button", name=name).click()
            expect(page.locator("#site h2").first).to_have_text(f"The site {name}")
        assert (dialogs, errors) == ([], [])
        policy = urlopen(address).headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy


@pytest.fixture(scope="module")
def experiments(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three rules and three seeds with tests at the clients, and a second experiment with another setting."""
    runs = tmp_path_factory.mktemp("experiments")
    for name, alpha, cutoff in (("skewed", 0.1, 50), ("mild", 1.0, 10)):
        rules = ["fedavg", {"name": "fedau", "parameters": {"cutoff": cutoff}}, "local"]
        experiment = Experiment(
            name=name, rounds=12, rules=rules, seeds=3, evaluate={"clients": True, "drift": True},
            partition={"clients": 8, "alpha": alpha}, participation={"kind": "bernoulli", "probability": 0.6},
        )  # fmt: skip
        run(experiment, folder=runs / name, progress=False)
    return runs


def check_research(page: Page, errors: list[str]) -> None:
    expect(page.locator("#groups label")).to_have_count(6)
    expect(page.locator("#summary tbody tr")).to_have_count(3)
    for chart in ("curves", "scores", "raster", "weights", "drift", "bars", "labels"):
        expect(page.locator(f"#{chart} canvas").first).to_be_visible()
        assert page.evaluate(f"charts.{chart}.getOption().series.some((each) => each.data.length)"), chart
    expect(page.locator("#differences")).to_contain_text("partition.alpha")
    page.locator("#filter").fill("mild")
    expect(page.locator("#groups label")).to_have_count(3)
    page.locator("#filter").fill("")
    page.locator("#group").select_option("partition.alpha")
    expect(page.locator("#groups")).to_contain_text("fedavg, partition.alpha = 0.1 (3)")
    page.locator("#group").select_option("rules.cutoff")
    expect(page.locator("#groups")).to_contain_text("fedau, rules.cutoff = 10 (3)")
    page.locator("#setting").select_option("rules.cutoff")
    assert page.evaluate("charts.scores.getOption().series[0].data.map(([x]) => x)") == [10, 50]  # of fedau only
    page.locator("#group").select_option("partition.alpha")
    page.locator("#axis").select_option("megabytes")
    page.locator("#replay").fill("6")
    assert page.evaluate("Math.max(...charts.raster.getOption().series[0].data.map((cell) => cell[0]))") == 5
    page.locator("#drift").scroll_into_view_if_needed()
    box = page.locator("#drift").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 62, box["y"] + 32)  # a rectangle around all points chooses the clients of the round
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] - 32, box["y"] + box["height"] - 47, steps=5)
    page.mouse.up()
    expect(page.locator("#picked")).to_contain_text("clients are chosen")
    some = page.evaluate(
        "[picked.size, charts.raster.getOption().yAxis[0].data.length, data.experiments[0].runs[0].clients.length]"
    )
    assert 0 < some[0] == some[1] < some[2]  # those who took part
    page.get_by_role("button", name="All clients").click()
    assert page.evaluate("charts.raster.getOption().yAxis[0].data.length") == some[2]
    page.get_by_role("button", name="LaTeX").click()
    assert page.locator("#text").input_value().startswith("\\begin{tabular}")
    for kind, beginning in (("svg", "<svg"), ("csv", "group,megabytes,mean"), ("png", "\ufffdPNG")):
        with page.expect_download() as download:
            page.locator(f'[data-save="{kind}"]').click()
        assert Path(download.value.path()).read_text(errors="replace").startswith(beginning)
    assert errors == []


def test_the_page_of_researchers(browser: Browser, experiments: Path) -> None:
    with command("dashboard", str(experiments), port=free_port()) as address:
        for scheme in ("light", "dark"):
            with opened(browser, f"{address}research", scheme) as (page, errors):
                expect(page.locator("#summary tbody tr")).to_have_count(3)
                assert serious(page) == []
                picture(page, f"research-{scheme}.png")
                check_research(page, errors)


def test_the_report_is_one_file_that_opens_offline(browser: Browser, experiments: Path, tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    subprocess.run([sys.executable, "-m", "corymb.cli", "report", str(experiments), "--out", str(file)], check=True)
    assert file.stat().st_size < 5e6
    context = browser.new_context(offline=True)
    page = context.new_page()
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.goto(file.as_uri())
    check_research(page, errors)
    assert [url for url in requests if not url.startswith(("file:", "data:", "blob:"))] == []
    context.close()


def test_the_page_of_a_site(browser: Browser, tmp_path: Path) -> None:
    kit = tmp_path / "north"
    kit.mkdir()
    app, day = "ab" * 32, datetime.now(UTC)
    approval = f'[[approved]]\napp = "{app}"\npurpose = "Study 17 <b>"\nexpires = 2099-01-01\n'
    (kit / "policy.toml").write_text(f"{template(signed_tasks=True)}\n{approval}")
    ledger = Ledger(kit / "ledger.jsonl")
    ledger.add("refused", day, app="cd" * 32, reason="the app is not approved at this site")
    left = {"arrays": 2, "bytes": 8_000_000, "metrics": {"loss": 0.5}, "withheld": ["name"]}
    ledger.add("ran", day, app=app, kind="train", run=7, round=3, purpose="Study 17 <b>")
    ledger.add("left", day, app=app, kind="train", run=7, round=3, purpose="Study 17 <b>", **left)
    with command("site", str(kit), port=free_port()) as address:
        for scheme in ("light", "dark"):
            with opened(browser, address, scheme) as (page, errors):
                expect(page.locator("#sentence")).to_contain_text("1 of 1 approvals hold")
                expect(page.locator("#cards")).to_contain_text("8.0 MB")
                expect(page.locator("#cards")).to_contain_text("1trainings in the last 24 hours")
                expect(page.locator("main")).to_contain_text("Study 17 <b>")
                expect(page.locator("main")).to_contain_text("1 times: the app is not approved")
                expect(page.locator("#events")).to_contain_text("withheld: name")
                assert serious(page) == []
                assert errors == []
                if scheme == "light":
                    picture(page, "site.png")
