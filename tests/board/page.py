"""Operates the page of the web UI by its visible text."""

import json
import re
from contextlib import suppress
from typing import Any

from playwright.sync_api import Locator, Page, TimeoutError, expect

#: Timeouts in milliseconds: for a response of the page, which takes less than one second on an idle machine, and for a
#: complete process, which takes about ten seconds.
QUICK, SLOW = 90_000, 240_000
expect.set_options(timeout=QUICK)

_EXTRA = {"use_cpu": True, "logging_steps": 1, "overwrite_cache": True, "preprocessing_num_workers": 1, "seed": 0}


class BoardPage:
    """A loaded Playwright page, and the uncaught errors of its scripts."""

    def __init__(self, page: Page, address: str) -> None:
        self.page = page
        self.errors: list[str] = []
        page.set_default_timeout(QUICK)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        self._url = f"http://{address}/"
        self.open()

    def open(self) -> None:
        """Loads or reloads the page and waits until the host has filled it."""
        self.page.goto(self._url)
        expect(self.field("Output dir")).not_to_have_value("")

    def field(self, label: str) -> Locator:
        """Returns the input that belongs to a label."""
        block = "div[contains(concat(' ', @class, ' '), ' block ')]"
        found = self.page.locator(f'xpath=//span[normalize-space()="{label}"]/ancestor::{block}[1]')
        return found.first.locator("input, textarea").first

    def fill(self, label: str, value: Any) -> None:
        """Types a value and leaves the field."""
        self.field(label).fill(str(value))
        self.field(label).press("Tab")

    def choose(self, label: str, option: str) -> None:
        """Picks an entry of a list."""
        for timeout in (5_000, 5_000, QUICK):
            self.field(label).click()
            self.field(label).fill(option)
            with suppress(TimeoutError):  # a response of the server may close the list at this moment
                return self.page.get_by_role("option", name=option, exact=True).first.click(timeout=timeout)
        raise AssertionError(f"{label} does not offer {option}")

    def name(self, label: str, value: str) -> None:
        """Types a new entry into a list."""
        self.field(label).fill(value)
        self.field(label).press("Enter")
        self.field(label).press("Escape")

    def press(self, button: str) -> None:
        """Presses a button."""
        self.page.get_by_role("button", name=button, exact=True).first.click()

    def see(self, text: str, timeout: float = QUICK) -> None:
        """Waits until the page shows a text."""
        expect(self.page.get_by_text(text).first).to_be_visible(timeout=timeout)

    def command(self, **expected: str) -> dict[str, str]:
        """Returns the previewed command as keys and values, after it contains the expected values."""
        self.press("Preview command")
        box = self.page.locator("code").filter(has_text="llamafactory-cli train").last
        for key, value in expected.items():
            expect(box).to_contain_text(f"--{key} {value} ")
        lines = box.inner_text().splitlines()
        pairs = [line.strip().rstrip("\\").strip().removeprefix("--").partition(" ") for line in lines[1:]]
        return {key: value.strip() for key, _, value in pairs if key}

    def describe_run(self, output_dir: str, extra: dict[str, Any] | None = None, **fields: Any) -> None:
        """Fills the page for a short HeRA run on the demo model; ``fields`` are labels with ``_`` for spaces."""
        path = re.compile("models/qwen3_4b|hera_demo/model")  # the host remembers the second path
        for timeout in (20_000, 20_000, QUICK):
            self.choose("Model name", "LLaVA-Qwen3-4B-HeRA")
            try:
                expect(self.field("Model path")).to_have_value(path, timeout=timeout)
                break
            except AssertionError:  # on busy cores, a page may miss the first choice
                self.open()
        self.fill("Model path", "hera_demo/model")
        self.fill("Data dir", "hera_demo/data")
        self.choose("Dataset", "hera_demo")
        self.page.keyboard.press("Escape")
        self.choose("Stage", "HeRA")
        self.choose("Finetuning method", "full")
        self.choose("Compute type", "fp32")
        self.page.get_by_role("button", name=re.compile("^Extra configurations")).click()
        values = {"Extra arguments": json.dumps(_EXTRA | (extra or {})), "Teacher": "hera_demo/teacher"}
        values |= {"Cutoff length": 256, "Batch size": 12, "Gradient accumulation": 1, "Learning rate": "1e-3"}
        for label, value in (values | {key.replace("_", " "): value for key, value in fields.items()}).items():
            self.fill(label, value)
        self.name("Output dir", output_dir)
