"""How the page shows a scoring job and its result."""

from pathlib import Path
from typing import Any

import gradio as gr
from gradio.components import Component

from llamafactory_hera.heads.head_set import HeadSet

from .job import Job
from .pictures import heads_shown, report_files, report_pictures, report_table
from .tasks import SELECT, heads_file
from .texts import message

Update = dict[Component, Any]

#: What a job changes in the page.
SHOWN = ("hera_tab", "hera_status", "hera_progress", "hera_gallery", "hera_report", "hera_heads")


class Display:
    """Makes updates of the page.

    Args:
        elements: The accordion's, by name.
    """

    def __init__(self, elements: dict[str, Component]) -> None:
        self._elements = elements

    @property
    def outputs(self) -> list[Component]:
        """Everything that an update may change."""
        return [self._elements[name] for name in SHOWN]

    def nothing(self) -> Update:
        """Leaves the page as it is."""
        return {self._elements["hera_status"]: gr.skip()}

    def opened(self) -> Update:
        """Opens the accordion."""
        return self._update(hera_tab=gr.Accordion(open=True))

    def said(self, text: str) -> Update:
        """A message alone."""
        return self._update(hera_status=text, hera_progress=gr.Slider(visible=False))

    def running(self, job: Job) -> Update:
        """What a job is doing, with its progress bar."""
        text = message("selecting" if job.kind == SELECT else "comparing", job.lang)
        progress = job.progress()
        if progress is None:
            return self.said(text)
        bar = gr.Slider(
            label=f"{message(progress.phase, job.lang)} {progress.done}/{progress.total}",
            value=round(100 * progress.done / max(1, progress.total), 1),
            visible=True,
        )
        return self._update(hera_status=text, hera_progress=bar)

    def finished(self, job: Job, fill: bool) -> Update:
        """The result of a job.

        Args:
            job: Which has ended.
            fill: Put selected heads into the heads field.
        """
        if job.aborted:
            return self.said(message("aborted", job.lang))
        if job.code != 0:
            return self.said(f"**{message('failed', job.lang, code=job.code)}**\n\n```\n{job.said()}\n```")
        if job.kind == SELECT:
            return self.heads(heads_file(job.folder), job.lang, "selected", fill)
        return self._update(
            hera_status=f"{message('compared', job.lang)}\n\n{report_table(job.folder)}",
            hera_progress=gr.Slider(visible=False),
            hera_gallery=gr.Gallery(value=report_pictures(job.folder, job.lang), visible=True),
            hera_report=gr.File(value=report_files(job.folder), visible=True),
        )

    def heads(self, path: Path, lang: str, how: str, fill: bool) -> Update:
        """A heads file: its heads, their scores as a table and as a picture.

        Args:
            path: The file.
            lang: Language of the page.
            how: The message, ``selected`` or ``loaded``.
            fill: Put the path into the heads field.

        Raises:
            ValueError: The file cannot be read.
        """
        table, pictures = heads_shown(path, lang)
        names = str(HeadSet.load(path)).replace(",", " ")
        update = self._update(
            hera_status=f"{message(how, lang, heads=names, path=f'`{path}`')}\n\n{table}",
            hera_progress=gr.Slider(visible=False),
            hera_gallery=gr.Gallery(value=pictures, visible=bool(pictures)),
            hera_report=gr.File(visible=False),
        )
        # the path, not the names: training then checks what the heads were selected for, and keeps their scores
        return update | self._update(hera_heads=str(path)) if fill else update

    def _update(self, **values: Any) -> Update:
        return {self._elements[name]: value for name, value in values.items()}
