"""The web UI's page by the words that a user reads on it."""

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from playwright.sync_api import Locator, Page, TimeoutError, expect

ARTIFACTS = Path(__file__).parents[2] / "artifacts" / "board"

#: Milliseconds in which the page must answer, and in which a process must start and get somewhere; on idle cores
#: these take less than one second and about ten.
QUICK, SLOW = 90_000, 240_000  # on a machine that does much else
expect.set_options(timeout=QUICK)

EXTRA = {
    "use_cpu": True,
    "logging_steps": 1,
    "overwrite_cache": True,
    "preprocessing_num_workers": 1,
    "dataloader_num_workers": 0,
    "seed": 0,
}


class BoardPage:
    """A loaded page.

    Attributes:
        page: Playwright's.
        hosts: Every host that it asked for something.
        errors: Uncaught errors of its scripts.
    """

    def __init__(self, page: Page, address: str) -> None:
        self.page = page
        self.hosts: set[str] = set()
        self.errors: list[str] = []
        page.set_default_timeout(QUICK)
        page.on("request", lambda request: self.hosts.add(request.url.split("/")[2]))
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        self._url = f"http://{address}/"
        self.open()

    def open(self) -> None:
        """Loads or reloads the page, until the host has filled it."""
        self.page.goto(self._url)
        expect(self.field("Output dir")).not_to_have_value("")

    def block(self, label: str) -> Locator:
        """The innermost block that has a label."""
        has_class = "contains(concat(' ', @class, ' '), ' block ')"
        return self.page.locator(f'xpath=//span[normalize-space()="{label}"]/ancestor::div[{has_class}][1]').first

    def field(self, label: str) -> Locator:
        """The input of a block."""
        return self.block(label).locator("input, textarea").first

    def fill(self, label: str, value: Any) -> None:
        """Types a value and leaves the field."""
        field = self.field(label)
        field.fill(str(value))
        field.press("Tab")

    def choose(self, label: str, option: str) -> None:
        """Picks an entry of a list."""
        field = self.field(label)
        for timeout in (5_000, 5_000, QUICK):
            field.click()
            field.fill(option)
            with suppress(TimeoutError):  # an answer of the server may close the list just now
                return self.page.get_by_role("option", name=option, exact=True).first.click(timeout=timeout)
        raise AssertionError(f"{label} does not offer {option}")

    def name(self, label: str, value: str) -> None:
        """Types a new entry into a list."""
        field = self.field(label)
        field.fill(value)
        field.press("Enter")
        field.press("Escape")

    def button(self, name: str) -> Locator:
        """A button of the train tab."""
        return self.page.get_by_role("button", name=name, exact=True).first

    def press(self, button: str) -> None:
        """Presses a button."""
        self.button(button).click()

    def unfold(self, accordion: str) -> None:
        """Opens an accordion."""
        self.page.get_by_role("button", name=re.compile(f"^{accordion}")).click()

    @property
    def status(self) -> Locator:
        """What the HeRA accordion says."""
        return self.page.locator("#hera_status")

    @property
    def picture(self) -> Locator:
        """The picture that its gallery shows."""
        return self.page.locator("#hera_gallery img").first

    @property
    def plot(self) -> Locator:
        """The loss plot."""
        return self.page.locator("[data-testid=matplotlib] img")

    def command(self, **expected: str) -> dict[str, str]:
        """The previewed command, as keys and values, once it shows the expected ones."""
        self.press("Preview command")
        box = self.page.locator("code").filter(has_text="llamafactory-cli train").last
        for key, value in expected.items():
            expect(box).to_contain_text(f"--{key} {value} ")
        lines = box.inner_text().splitlines()
        pairs = [line.strip().rstrip("\\").strip().removeprefix("--").partition(" ") for line in lines[1:]]
        return {key: value.strip() for key, _, value in pairs if key}

    def describe_run(self, output_dir: str, **fields: Any) -> None:
        """Fills the page for a short HeRA run on the demo model.

        Args:
            output_dir: Of the run.
            **fields: Further fields by label, with ``_`` for spaces.
        """
        self.choose("Model name", "LLaVA-Qwen3-4B-HeRA")
        # the list's path at first, the one that the host remembers later
        expect(self.field("Model path")).to_have_value(re.compile("models/qwen3_4b|hera_demo/model"))
        self.fill("Model path", "hera_demo/model")
        self.fill("Data dir", "hera_demo/data")
        self.choose("Dataset", "hera_demo")
        self.page.keyboard.press("Escape")
        self.choose("Stage", "HeRA")
        self.choose("Finetuning method", "full")
        self.choose("Compute type", "fp32")
        self.unfold("Extra configurations")
        self.fill("Extra arguments", json.dumps(EXTRA | fields.pop("extra", {})))
        values = {"Teacher": "hera_demo/teacher", "Teacher cache": "hera_demo/cache", "Selection samples": 96}
        values |= {"Cutoff length": 256, "Batch size": 12, "Gradient accumulation": 1, "Learning rate": "1e-3"}
        for label, value in (values | {key.replace("_", " "): value for key, value in fields.items()}).items():
            self.fill(label, value)
        self.name("Output dir", output_dir)

    def shot(self, name: str, top: Locator | None = None) -> None:
        """Keeps a picture for people to look at: of the whole page, or of what can be seen from an element on."""
        ARTIFACTS.mkdir(parents=True, exist_ok=True)
        if top is not None:
            top.evaluate("element => element.scrollIntoView()")
        self.page.screenshot(path=ARTIFACTS / f"{name}.png", full_page=top is None)
