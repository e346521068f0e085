"""What the buttons of the HeRA accordion do, and how the page shows a scoring job and its result."""

import glob
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
from gradio.components import Component
from llamafactory.extras.constants import LLAMABOARD_CONFIG, TRAINER_LOG, TRAINING_STAGES
from llamafactory.webui.common import DEFAULT_SAVE_DIR, get_save_dir, save_args
from llamafactory.webui.locales import ALERTS

from llamafactory_hera.calibration.settings import RahConfig
from llamafactory_hera.config import HeraConfig

from .fields import problem_with, with_fields
from .job import CALIBRATE, COMPARE, SELECT, Job, compare_job, heads_file, recipe_job
from .names import STAGE, message
from .pictures import evaluations, report_files, report_pictures, report_table, show_calibration, show_heads

if TYPE_CHECKING:
    from llamafactory.webui.engine import Engine

#: What the page sends, or what is shown in it, by element.
Data = dict[Component, Any]

#: What a job changes in the page.
_CHANGED = ("hera_tab", "hera_status", "hera_progress", "hera_gallery", "hera_report", "hera_heads")
_RUNNING = {SELECT: "selecting", COMPARE: "comparing", CALIBRATE: "calibrating"}  # what is said meanwhile
_INTERVAL = 0.7  # seconds between two looks at a job
# the last lines of a traceback; torchrun puts the rank in front
_ERROR = re.compile(r"^(?:\[rank\d+\]:\s?)?(\w*Error: .+)$", re.MULTILINE)


class Panel:
    """The job of a board: one at a time, and none beside a training run."""

    def __init__(self, engine: "Engine", elements: dict[str, Component]) -> None:
        self._engine = engine
        self._elements = elements
        #: Everything that an update may change.
        self.outputs = [elements[name] for name in _CHANGED]
        self._job: Job | None = None  # the last one
        self._data: Data = {}  # of the page that started it

    def abort(self) -> None:
        """Stops the job."""
        if self._job is not None:
            self._job.abort()

    def list_files(self, model_name: str | None) -> Any:
        """Heads files of earlier runs of a model, newest first, as choices."""
        model = (model_name or "*").replace(" ", "")
        found = glob.glob(str(heads_file(Path(DEFAULT_SAVE_DIR, model, "*", "*"))))
        newest_first = sorted(found, key=os.path.getmtime, reverse=True)
        # named by what comes in front of hera/heads.json: finetuning method and run
        return gr.Dropdown(choices=[(os.path.join(*Path(path).parts[-4:-2]), path) for path in newest_first])

    def load_file(self, lang: str, path: str | None) -> Data:
        """Puts a heads file into the heads field and shows it."""
        if not path:
            return self._update(hera_status=gr.skip())
        try:
            return self._show_heads(Path(path), lang, "loaded")
        except ValueError as error:
            gr.Warning(str(error))
            return self._show_text(str(error))

    def begin(self, kind: str, data: Data) -> Iterator[Data]:
        """Starts a job of a kind for what the page describes, whatever its stage, and follows it."""
        lang, runner = self._value(data, "top.lang"), self._engine.runner
        error = runner._initialize(data, do_train=True, from_preview=True)
        if self._engine.demo_mode:
            error = ALERTS["err_demo"][lang]
        elif self._busy:
            error = ALERTS["err_conflict"][lang]
        args = {} if error else self.with_hera(runner._parse_train_args(data), data) | {"stage": STAGE}
        if not error and kind == SELECT:  # before anything of an earlier run in the folder is written anew
            error = problem_with(args, lang, selecting=True)
        if not error and kind == CALIBRATE:
            plain = {key: value for key, value in args.items() if not key.startswith(HeraConfig.PREFIX)}
            args = with_fields(plain, RahConfig.PREFIX, lambda id_: self._value(data, id_))
            args |= {"stage": "sft", "output_dir": self._adapter_folder(data)}
        if error:
            gr.Warning(error)
            yield self._show_text(error)
            return
        folder = Path(args["output_dir"])
        try:
            job = compare_job(folder, lang) if kind == COMPARE else recipe_job(kind, args, lang)
            if job is None:
                yield self._show_text(message("not_trained", lang, folder=f"`{folder}`"))
                return
            if kind == SELECT:
                # the host looks for it when this output folder is chosen again
                save_args(str(folder / LLAMABOARD_CONFIG), runner._build_config_dict(data))
            job.start()
        except (OSError, ValueError) as problem:
            yield self._show_text(str(problem))
            return
        self._job, self._data = job, data
        yield from self.follow()

    def _adapter_folder(self, data: Data) -> str:
        """Where the host looks for adapters of the model."""
        return str(get_save_dir(self._value(data, "top.model_name"), "lora", self._value(data, "train.output_dir")))

    @property
    def _busy(self) -> bool:
        return self._job is not None and self._job.running

    def follow(self) -> Iterator[Data]:
        """Shows the job until it has ended, if one runs."""
        job = self._job
        if job is None or not job.running:
            yield self._update(hera_status=gr.skip())
            return
        while job.running:
            yield self._show_progress(job)
            time.sleep(_INTERVAL)
        yield self._show_result(job)

    def after_reload(self) -> Iterator[Data]:
        """What a freshly loaded page shows: the job that runs, if one does."""
        if self._busy:
            yield self._update(hera_tab=gr.Accordion(open=True))
        yield from self.follow()

    def settings_after_reload(self) -> Iterator[Data]:
        """The fields of a freshly loaded page, as they were when the job that runs was started."""
        if self._busy:
            yield {element: type(element)(value=value) for element, value in self._data.items()}

    def with_hera(self, args: dict[str, Any], data: Data) -> dict[str, Any]:
        """The arguments of a run with what the page's HeRA fields say."""
        return with_fields(args, HeraConfig.PREFIX, lambda id_: self._value(data, id_))

    def refusal(self, data: Data, do_train: bool) -> str:
        """Why a run must not start now; empty if it may."""
        lang = self._value(data, "top.lang")
        if self._busy:
            return ALERTS["err_conflict"][lang]
        if do_train and self._is_hera(data):
            return problem_with(self._engine.runner._parse_train_args(data), lang)
        return ""

    def trained(self, data: Data) -> None:
        """A run of the page's settings has ended well: compares it with before, if the page asks for that."""
        if self._busy or not self._is_hera(data) or not self._value(data, "train.hera_compare"):
            return
        folder = Path(self._engine.runner._parse_train_args(data)["output_dir"])
        job = compare_job(folder, self._value(data, "top.lang"))
        if job is not None:
            job.start()
            self._job, self._data = job, data

    def with_reason(self, update: Data, data: Data) -> Data:
        """What the host shows of a run, with the reason first where it has failed, and else its evaluation.

        Curves and progress of an earlier run are not shown until this one has logged a step.
        """
        if not self._is_hera(data):
            return update
        shown = {key: self._first(text, data) if isinstance(text, str) else text for key, text in update.items()}
        folder = Path(self._engine.runner._parse_train_args(data)["output_dir"])
        log, started = folder / TRAINER_LOG, folder / LLAMABOARD_CONFIG  # which is written at each start
        if not log.is_file() or log.stat().st_mtime < started.stat().st_mtime:
            element = self._engine.manager.get_elem_by_id
            shown |= {element("train.loss_viewer"): gr.Plot(value=None)}
            shown |= {element("train.progress_bar"): gr.Slider(visible=False)}
        return shown

    def _first(self, text: str, data: Data) -> str:
        lang = self._value(data, "top.lang")
        done, ended, rest = text.partition(ALERTS["info_finished"][lang])
        if done or not ended:
            return reason_first(text, lang)
        return f"{ended}\n\n{evaluations(Path(self._engine.runner._parse_train_args(data)['output_dir']))}{rest}"

    def _is_hera(self, data: Data) -> bool:
        # the host's evaluation tab sends no stage
        stage = data.get(self._engine.manager.get_elem_by_id("train.training_stage"))
        return TRAINING_STAGES.get(stage) == STAGE

    def _value(self, data: Data, id_: str) -> Any:
        return data[self._engine.manager.get_elem_by_id(id_)]

    def _update(self, **values: Any) -> Data:
        return {self._elements[name]: value for name, value in values.items()}

    def _show_text(self, text: str, **further: Any) -> Data:
        return self._update(hera_status=text, **{"hera_progress": gr.Slider(visible=False), **further})

    def _show_progress(self, job: Job) -> Data:
        text, progress = message(_RUNNING[job.kind], job.lang), job.progress()
        if progress is None:
            return self._show_text(text)
        phase, done, total = progress
        label, percent = f"{message(phase, job.lang)} {done}/{total}", round(100 * done / max(1, total), 1)
        return self._show_text(text, hera_progress=gr.Slider(label=label, value=percent, visible=True))

    def _show_result(self, job: Job) -> Data:
        if job.aborted:
            return self._show_text(message("aborted", job.lang))
        if job.code != 0:
            output = job.output()
            # as text, too: a long line is cut off in a block
            reason = (_ERROR.findall(output) or output.splitlines() or [""])[-1]
            failed = message("failed", job.lang, code=job.code)
            return self._show_text(f"**{failed}** {reason}\n\n```\n{output}\n```")
        if job.kind == SELECT:
            return self._show_heads(heads_file(job.folder), job.lang, "selected")
        if job.kind == CALIBRATE:
            table, pictures = show_calibration(job.folder)
            return self._show_text(
                f"{message('calibrated', job.lang, folder=f'`{job.folder}`')}\n\n{table}",
                hera_gallery=gr.Gallery(value=pictures, visible=True),
                hera_report=gr.File(visible=False),
            )
        return self._show_text(
            f"{message('compared', job.lang)}\n\n{report_table(job.folder)}\n\n{evaluations(job.folder)}",
            hera_gallery=gr.Gallery(value=report_pictures(job.folder, job.lang), visible=True),
            hera_report=gr.File(value=report_files(job.folder), visible=True),
        )

    def _show_heads(self, path: Path, lang: str, how: str) -> Data:
        """A heads file: its heads, their scores as a table and as a picture; ``how`` names the message."""
        names, table, pictures = show_heads(path, lang)
        # the path, not the names: training then checks what the heads were selected for, and keeps their scores
        return self._show_text(
            f"{message(how, lang, heads=names, path=f'`{path}`')}\n\n{table}",
            hera_gallery=gr.Gallery(value=pictures, visible=bool(pictures)),
            hera_report=gr.File(visible=False),
            hera_heads=str(path),
        )


def reason_first(text: str, lang: str) -> str:
    """What the host shows of a run with the error put first where it has failed: a line and all of its stderr."""
    head, gap, rest = text.partition("\n\n")
    errors = _ERROR.findall(rest)
    if not head.startswith(ALERTS["err_failed"][lang]) or not errors:
        return text
    return f"{head}\n\n**{errors[-1]}**{gap}{rest}"
