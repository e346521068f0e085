"""What happens when the buttons of the HeRA accordion are pressed."""

import glob
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
from gradio.components import Component
from llamafactory.extras.constants import LLAMABOARD_CONFIG, TRAINING_STAGES
from llamafactory.webui.common import DEFAULT_SAVE_DIR, save_args
from llamafactory.webui.locales import ALERTS

from llamafactory_hera.selection.run import FOLDER, HEADS_FILE

from .arguments import lacking, with_hera
from .display import Display, Update
from .failures import with_reason
from .job import Job
from .names import STAGE, elem_id
from .tasks import SELECT, compare_job, select_job
from .texts import message

if TYPE_CHECKING:
    from llamafactory.webui.engine import Engine

Data = dict[Component, Any]
MakeJob = Callable[[dict[str, Any], str], Job | None]

_INTERVAL = 0.7  # seconds between two looks at a job


class Panel:
    """The scoring job of a board: one at a time, and none beside a training run.

    Args:
        engine: The host's.
        display: The page.
    """

    def __init__(self, engine: "Engine", display: Display) -> None:
        self._runner = engine.runner
        self._manager = engine.manager
        self._demo_mode = engine.demo_mode
        self._display = display
        self.outputs = display.outputs
        self.job: Job | None = None
        self._data: Data = {}

    # -- buttons ---------------------------------------------------------------------------------------------------

    def select(self, data: Data) -> Iterator[Update]:
        """Selects heads for the run that the page describes, and follows the selection."""
        yield from self._begin(data, select_job, selecting=True)

    def compare(self, data: Data) -> Iterator[Update]:
        """Compares the finished run in the output folder with before."""
        yield from self._begin(data, lambda args, lang: compare_job(Path(args["output_dir"]), lang))

    def abort(self) -> None:
        """Stops the job."""
        if self.job is not None:
            self.job.abort()

    def list_files(self, model_name: str | None) -> Any:
        """Heads files of earlier runs of a model, newest first, as choices."""
        model = (model_name or "*").replace(" ", "")
        found = glob.glob(os.path.join(DEFAULT_SAVE_DIR, model, "*", "*", FOLDER, HEADS_FILE))
        newest_first = sorted(found, key=os.path.getmtime, reverse=True)
        # named by what comes in front of hera/heads.json: finetuning method and run
        return gr.Dropdown(choices=[(os.path.join(*Path(path).parts[-4:-2]), path) for path in newest_first])

    def load_file(self, lang: str, path: str | None) -> Update:
        """Puts a heads file into the heads field and shows it."""
        if not path:
            return self._display.nothing()
        try:
            return self._display.heads(Path(path), lang, "loaded", fill=True)
        except ValueError as error:
            gr.Warning(str(error))
            return self._display.said(str(error))

    # -- following a job -------------------------------------------------------------------------------------------

    def follow(self) -> Iterator[Update]:
        """Shows the job until it has ended, if one runs."""
        job = self.job
        if job is None or not job.running:
            yield self._display.nothing()
            return
        while job.running:
            yield self._display.running(job)
            time.sleep(_INTERVAL)
        yield self._display.finished(job, fill=True)

    def after_reload(self) -> Iterator[Update]:
        """What a freshly loaded page shows: the job that runs, or the result of the last one."""
        job = self.job
        if job is not None and not job.running:
            yield self._display.finished(job, fill=False)
            return
        if job is not None:
            yield self._display.opened()
        yield from self.follow()

    def settings_after_reload(self) -> Iterator[Update]:
        """The fields of a freshly loaded page, as they were when the job that runs was started."""
        if self.busy:
            yield {element: type(element)(value=value) for element, value in self._data.items()}

    def _begin(self, data: Data, make: MakeJob, selecting: bool = False) -> Iterator[Update]:
        lang = self._value(data, "top.lang")
        error = self._runner._initialize(data, do_train=True, from_preview=True)
        if self._demo_mode:
            error = ALERTS["err_demo"][lang]
        elif self.busy:
            error = ALERTS["err_conflict"][lang]
        if not error:
            args = with_hera(self._runner._parse_train_args(data), lambda id_: self._value(data, id_))
            if selecting:  # before anything of an earlier run in the folder is written anew
                error = lacking(args, lang, selecting=True)
        if error:
            gr.Warning(error)
            yield self._display.said(error)
            return
        try:
            job = make(args, lang)
            if job is None:
                yield self._display.said(message("not_trained", lang, folder=f"`{args['output_dir']}`"))
                return
            if job.kind == SELECT:
                # the host looks for it when this output folder is chosen again
                config = os.path.join(args["output_dir"], LLAMABOARD_CONFIG)
                save_args(config, self._runner._build_config_dict(data))
            job.start()
        except (OSError, ValueError) as problem:
            yield self._display.said(str(problem))
            return
        self.job, self._data = job, data
        yield from self.follow()

    # -- what the host's runner asks -------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Whether a job runs."""
        return self.job is not None and self.job.running

    def refusal(self, data: Data, do_train: bool) -> str:
        """Why a run must not start now; empty if it may."""
        lang = self._value(data, "top.lang")
        if self.busy:
            return ALERTS["err_conflict"][lang]
        if do_train and self._is_hera(data):
            return lacking(self._runner._parse_train_args(data), lang)
        return ""

    def trained(self, data: Data) -> None:
        """A run of the page's settings has ended well: compares it with before, if the page asks for that."""
        if self.busy or not self._is_hera(data) or not self._value(data, elem_id("hera_compare")):
            return
        folder = Path(self._runner._parse_train_args(data)["output_dir"])
        job = compare_job(folder, self._value(data, "top.lang"))
        if job is not None:
            job.start()
            self.job, self._data = job, data

    def explained(self, update: Update, data: Data) -> Update:
        """What the host shows of a run, with the reason first where it has failed."""
        if not self._is_hera(data):
            return update
        lang = self._value(data, "top.lang")
        return {
            element: with_reason(shown, lang) if isinstance(shown, str) else shown for element, shown in update.items()
        }

    def _is_hera(self, data: Data) -> bool:
        return TRAINING_STAGES[self._value(data, "train.training_stage")] == STAGE

    def _value(self, data: Data, id_: str) -> Any:
        return data[self._manager.get_elem_by_id(id_)]
