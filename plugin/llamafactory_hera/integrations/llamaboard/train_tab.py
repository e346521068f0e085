"""The train tab with the HeRA accordion: fields for the keys, and the results of the run in the output folder."""

import shlex
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
from gradio.components import Component
from llamafactory.extras.constants import TRAINING_ARGS, TRAINING_STAGES
from llamafactory.webui.common import get_save_dir
from PIL import Image

from llamafactory_hera.files import RUN_FOLDER
from llamafactory_hera.keys import choices
from llamafactory_hera.objectives import names

from .fields import FIELDS, ROWS, STAGE

if TYPE_CHECKING:
    from llamafactory.webui.engine import Engine

#: Elements of the page by name. Gradio adds their events, such as ``change``, at run time, so the values are untyped.
Elements = dict[str, Any]


def create_train_tab(host: Callable[["Engine"], Elements], engine: "Engine") -> Elements:
    """Builds the train tab; replaces the host's function of the same name."""
    elements = _create_accordion()
    # the host sends these elements with every button of the tab
    sent = engine.manager.get_base_elems() | {elements[key] for key in FIELDS}
    engine.manager.get_base_elems = lambda: set(sent)
    created = host(engine)
    del engine.manager.get_base_elems
    siblings = created["mm_tab"].parent.children
    stage, tab = created["training_stage"], elements["hera_tab"]
    siblings.remove(tab)
    siblings.insert(siblings.index(created["mm_tab"]) + 1, tab)
    stage.change(lambda title: gr.Accordion(open=TRAINING_STAGES[title] == STAGE), stage, tab, queue=False)
    top = [engine.manager.get_elem_by_id(f"top.{name}") for name in ("model_name", "model_path", "finetuning_type")]
    results = [elements[name] for name in ("hera_commands", "hera_picture", "hera_report")]
    # the text of the output box changes during a run, at its end, and when an earlier output folder is chosen
    events = [created["output_box"].change, created["output_dir"].change]
    gr.on(events, show_run, [*top, created["output_dir"]], results, show_progress="hidden", trigger_mode="always_last")
    return created | elements


def change_stage(host: Callable[[str], tuple[Any, Any]], training_stage: str) -> tuple[Any, Any]:
    """Keeps the chosen datasets when the stage becomes HeRA; replaces the host's function, which empties the list.

    Saved settings would otherwise lose their datasets, because loading the settings also sets the stage.
    """
    datasets, packing = host(training_stage)
    return (gr.skip() if TRAINING_STAGES[training_stage] == STAGE else datasets), packing


def show_run(model_name: str | None, model_path: str, method: str, output_dir: str | None) -> tuple[Any, Any, Any]:
    """Shows the results of the run in the output folder: terminal commands, the heads' picture, and the report."""
    folder = Path(get_save_dir(model_name, method, output_dir)) if model_name and output_dir else None
    if folder is None or not (folder / TRAINING_ARGS).is_file():
        return gr.Code(visible=False), gr.Image(visible=False), gr.HTML(visible=False)
    pictures = [path for name in ("heads.png", "layers.png") if (path := folder / RUN_FOLDER / name).is_file()]
    # read here, because Gradio serves only files in its working directory
    picture = gr.Image(Image.open(pictures[0]), visible=True) if pictures else gr.Image(visible=False)
    report = folder / RUN_FOLDER / "report.html"
    page = escape(report.read_text(encoding="utf-8")) if report.is_file() else ""
    frame = f'<iframe sandbox srcdoc="{page}" style="width: 100%; height: 80vh; border: 0"></iframe>'
    return gr.Code(commands(folder, model_path), visible=True), picture, gr.HTML(frame, visible=bool(page))


def commands(folder: Path, model_path: str) -> str:
    """Returns the commands that select again, score, report, calibrate and evaluate, for the run in a folder."""
    run, model = shlex.quote(str(folder)), shlex.quote(model_path)
    recipe = f"{run}/{TRAINING_ARGS}"
    return f"""\
llamafactory-hera select {recipe} output_dir={run}_select
llamafactory-hera score {run} --recipe {recipe}
llamafactory-hera report {run} --output {run}/{RUN_FOLDER}/report
llamafactory-hera calibrate {recipe} output_dir={run}_calibrated
llamafactory-hera eval {model} {run} --suite paper"""


def _create_accordion() -> Elements:
    elements: Elements = {}
    with gr.Accordion(open=False) as tab:
        for row in ROWS:
            with gr.Row():
                elements |= {key: _field(key) for key in row}
        elements["hera_commands"] = gr.Code(language="shell", interactive=False, visible=False)
        # a label would cover the title in the picture
        elements["hera_picture"] = gr.Image(format="png", interactive=False, visible=False, show_label=False)
        elements["hera_report"] = gr.HTML(visible=False)
    return {"hera_tab": tab, **elements}


def _field(key: str) -> Component:
    declared = FIELDS[key]
    default: Any = declared.default
    if options := list(names() if key == "hera_objective" else choices(declared)):
        return gr.Dropdown(choices=options, value=default)
    if declared.type in (int, float):
        precision, step = (0, 1) if declared.type is int else (None, 0.01)
        return gr.Number(value=default, precision=precision, step=step)
    return gr.Textbox(value=default, max_lines=1)
