"""A real JupyterLab in a real Chromium. Everything that either of them writes stays in a temporary folder."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
MISSING = [
    f"the package {name}" for name in ("jupyterlab", "playwright") if not importlib.util.find_spec(name)
]
MISSING += [] if CHROMIUM else ["a Chromium (apt-get install chromium, or name it in CHROMIUM)"]

PATIENCE_S = 180  # a start takes 10 s on an idle machine and has taken 60 s on a busy one

# Autosave would write outputs into the notebook, and Lab draws only the cells in view unless told otherwise.
SETTINGS = {
    "docmanager-extension/plugin": {"autosave": False},
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    "notebook-extension/tracker": {"windowingMode": "none"},
}
LISTEN = """() => {
  const panel = window.jupyterapp.shell.currentWidget;
  window.kernelErrors = [];
  panel.sessionContext.iopubMessage.connect((_, message) => {
    if (message.header.msg_type === 'error') window.kernelErrors.push(message.content.evalue);
  });
  window.ran = window.jupyterapp.commands.execute('notebook:run-all-cells').then(() => { window.ran = 'done'; });
}"""

CONTRAST = """element => {
  const rgb = colour => colour.match(/[\\d.]+/g).map(Number);
  const light = colour => rgb(colour).slice(0, 3).map(v => v / 255)
    .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  let under = element;
  while (under && rgb(getComputedStyle(under).backgroundColor)[3] === 0) under = under.parentElement;
  const [a, b] = [light(getComputedStyle(element).color), light(getComputedStyle(under).backgroundColor)];
  return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
}"""


@dataclass
class Lab:
    """JupyterLab on a free port of this machine, started in `folder`."""

    folder: Path
    port: int
    browser: Any

    def open(self, name: str, cells: list[str]) -> Notebook:
        """Write a notebook of these cells, open it, and run it all."""
        body = [
            {"cell_type": "code", "id": f"c{i}", "source": text, "metadata": {}}
            for i, text in enumerate(cells)
        ]
        for cell in body:
            cell |= {"outputs": [], "execution_count": None}
        kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
        notebook = {"cells": body, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}
        (self.folder / name).write_text(json.dumps(notebook))
        page = self.browser.new_context(viewport={"width": 1280, "height": 1180}).new_page()
        page.set_default_timeout(PATIENCE_S * 1000)
        opened = Notebook(page)
        page.route("**/*", opened.gate)
        page.on("console", lambda message: message.type == "error" and opened.errors.append(message.text))
        page.on("pageerror", lambda error: opened.errors.append(str(error)))
        page.goto(f"http://127.0.0.1:{self.port}/lab/workspaces/{Path(name).stem}/tree/{name}?reset")
        page.wait_for_function(
            "() => window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'"
        )
        page.evaluate(LISTEN)
        page.wait_for_function("() => window.ran === 'done'")
        return opened


@dataclass
class Notebook:
    """One open notebook: the page, what went wrong in it, and what it asked of other machines."""

    page: Any
    errors: list[str] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)

    def gate(self, route: Any) -> None:
        url = route.request.url
        if url.startswith(("data:", "blob:")) or urlsplit(url).hostname == "127.0.0.1":
            route.continue_()
        else:
            self.outside.append(url)
            route.abort()

    def problems(self) -> list[str]:
        return self.errors + self.outside + self.page.evaluate("() => window.kernelErrors")

    def switch_to(self, theme: str) -> None:
        self.page.evaluate(
            "theme => window.jupyterapp.commands.execute('apputils:change-theme', { theme })", theme
        )
        self.page.wait_for_function("theme => document.body.dataset.jpThemeName === theme", arg=theme)
        self.page.wait_for_timeout(500)  # the theme's style sheet arrives after its name

    def contrast(self, selector: str) -> float:
        """Between the first such element's text and what is under it, as WCAG 2 counts it: 1 to 21."""
        return float(self.page.locator(selector).first.evaluate(CONTRAST))

    def shot(self, name: str) -> None:
        """Keep a screenshot of the last output where PEFTTUTOR_SHOTS says, for a person to look at."""
        if folder := os.environ.get("PEFTTUTOR_SHOTS"):
            self.page.locator(".jp-OutputArea-output").last.screenshot(path=Path(folder) / f"{name}.png")


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    if MISSING:
        pytest.skip(f"needs {' and '.join(MISSING)}")
    from playwright.sync_api import sync_playwright

    private, folder = tmp_path_factory.mktemp("jupyter"), tmp_path_factory.mktemp("notebooks")
    for name, setting in SETTINGS.items():
        path = private / "JUPYTERLAB_SETTINGS_DIR" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(setting))
    kinds = ("CONFIG", "RUNTIME", "DATA")
    names = [f"JUPYTER_{kind}_DIR" for kind in kinds] + [
        "JUPYTERLAB_WORKSPACES_DIR",
        "JUPYTERLAB_SETTINGS_DIR",
        "IPYTHONDIR",
    ]
    own = {name: str(private / name) for name in names}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        "--no-browser",
        "--allow-root",
        "--ip=127.0.0.1",
        f"--port={port}",
    ]
    command += [
        "--ServerApp.port_retries=0",
        "--IdentityProvider.token=",
        "--LabApp.expose_app_in_browser=True",
    ]
    command += ["--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    with open(private / "log", "w+") as log:
        server = subprocess.Popen(
            command, cwd=folder, env=os.environ | own | {"PYTHONPATH": path}, stdout=log, stderr=log
        )
        try:
            _wait_for(f"http://127.0.0.1:{port}/api/status", server, private / "log")
            with sync_playwright() as playwright:
                flags = [
                    "--no-sandbox",
                    "--disable-gpu",
                    "--disable-dev-shm-usage",
                    "--disable-background-networking",
                ]
                browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
                yield Lab(folder, port, browser)
                browser.close()
        finally:
            server.terminate()  # which ends its kernels too
            server.wait(30)


def _wait_for(url: str, server: subprocess.Popen, log: Path, seconds: int = PATIENCE_S) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and server.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise RuntimeError(f"JupyterLab did not start:\n{log.read_text()[-2000:]}")
