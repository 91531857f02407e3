"""Makes the pictures of docs/page.md: a server over the tiny Kimi, and a headless Chromium.

python tests/serve/page/screenshots.py docs/images
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

import exo_kimi

TINY = Path(exo_kimi.__file__).parent / "data" / "tiny-kimi-k2"
PORT = 52499
QUESTIONS = ("What is the capital of Norway?", "Sort these numbers: 7, 2, 9, 4", "What is 3 + 4?")


def main(folder: Path) -> None:
    """Write one PNG a view."""
    with tempfile.TemporaryDirectory() as place:
        plan = Path(place) / "plan.json"
        run = [sys.executable, "-m", "exo_kimi"]
        options = ["--cluster", "2x m4-pro-64", "--split", "4,2", "--context", "8192", "-o", str(plan)]
        subprocess.run([*run, "plan", str(TINY), *options], check=True, stdout=subprocess.DEVNULL)
        server = subprocess.Popen(
            [*run, "serve", str(TINY), "--plan", str(plan), "--port", str(PORT)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        try:
            assert server.stdout is not None
            server.stdout.readline()
            with sync_playwright() as playwright:
                found = shutil.which("chromium") or shutil.which("google-chrome")
                browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
                take(browser, folder)
                browser.close()
        finally:
            server.terminate()
            server.wait(20)


def take(browser: Any, folder: Path) -> None:
    """Every view, as a person would come to it."""
    desk = browser.new_context(viewport={"width": 1180, "height": 760}, color_scheme="light", locale="en-US")
    page = desk.new_page()
    page.goto(f"http://127.0.0.1:{PORT}")
    for count, question in enumerate(QUESTIONS, start=1):
        page.fill(".composer textarea", question)
        page.keyboard.press("Enter")
        page.locator("text=Again").nth(count - 1).wait_for(timeout=60_000)
    page.locator("summary:has-text('Thought for')").last.click()
    page.screenshot(path=folder / "page-chat.png")
    page.evaluate(
        """() => {
            const ask = async (seed) => {
                const body = JSON.stringify({ messages: [{ role: 'user', content: 'Tell me a story about a fox.' }], seed });
                const headers = { 'content-type': 'application/json' };
                for (let n = 0; n < 30; n += 1) await fetch('/v1/chat/completions', { method: 'POST', headers, body });
            };
            for (const seed of [1, 2, 3]) void ask(seed);
        }"""
    )
    page.click("nav >> text=Cluster")
    page.wait_for_selector(".badge.ready >> nth=1")
    time.sleep(4)
    page.screenshot(path=folder / "page-cluster.png")
    page.click("nav >> text=Planner")
    page.wait_for_selector("#plan-model")
    page.click("form .primary")
    page.wait_for_selector(".plan-picture")
    page.set_viewport_size({"width": 1180, "height": 1180})
    page.screenshot(path=folder / "page-planner.png")
    phone = browser.new_context(viewport={"width": 390, "height": 760}, color_scheme="dark", locale="ja-JP")
    page = phone.new_page()
    page.goto(f"http://127.0.0.1:{PORT}")
    page.wait_for_selector(".composer textarea")
    page.fill(".composer textarea", QUESTIONS[0])
    page.keyboard.press("Enter")
    page.wait_for_selector("text=再生成", timeout=60_000)
    page.screenshot(path=folder / "page-phone.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
