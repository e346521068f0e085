"""The host's train tab with the HeRA accordion in it: a field for each key, and what selects and compares heads."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import gradio as gr
from gradio.components import Component
from gradio.context import get_blocks_context
from llamafactory.extras.constants import TRAINING_STAGES

from .fields import FIELDS, GROUPS, default, options
from .job import CALIBRATE, COMPARE, SELECT
from .names import STAGE
from .panel import Panel

if TYPE_CHECKING:
    from llamafactory.webui.engine import Engine

#: Elements of the page by name; Gradio gives them their events, such as ``click``, at run time.
Elements = dict[str, Any]


def create_train_tab(host: Callable[["Engine"], Elements], engine: "Engine") -> Elements:
    """The host's function of the same name; the buttons of its tab then know HeRA's fields."""
    elements = _create_accordion()
    # the host's tab takes what its buttons send from here
    known = engine.manager.get_base_elems() | {elements[name] for name in (*FIELDS, "hera_compare")}
    engine.manager.get_base_elems = lambda: set(known)
    theirs = host(engine)
    del engine.manager.get_base_elems
    siblings = theirs["mm_tab"].parent.children
    siblings.remove(elements["hera_tab"])
    siblings.insert(siblings.index(theirs["mm_tab"]) + 1, elements["hera_tab"])
    engine.runner.hera = panel = Panel(engine, elements)
    _connect(engine, panel, elements, theirs)
    return theirs | elements


def change_stage(host: Callable[[str], tuple[Any, Any]], training_stage: str) -> tuple[Any, Any]:
    """The host's function of the same name, which empties the list of datasets; HeRA trains on those of SFT."""
    datasets, packing = host(training_stage)
    return (gr.skip() if TRAINING_STAGES[training_stage] == STAGE else datasets), packing


def _create_accordion() -> Elements:
    elements: Elements = {}
    with gr.Accordion(open=False) as tab:
        for title, rows in GROUPS.items():
            elements[title] = gr.Markdown()
            for row in rows:
                with gr.Row():
                    for key in row:
                        elements[key] = _widget(key)
                        if key == "hera_heads":
                            elements["hera_heads_file"] = gr.Dropdown(allow_custom_value=True, value=None)
                        if key == "hera_eval":
                            elements["hera_compare"] = gr.Checkbox(value=True)
        with gr.Row():
            with gr.Column():
                with gr.Row():
                    elements["hera_select_btn"] = gr.Button(variant="primary")
                    elements["hera_compare_btn"] = gr.Button()
                    elements["hera_calibrate_btn"] = gr.Button()
                    elements["hera_stop_btn"] = gr.Button(variant="stop")
                elements["hera_progress"] = gr.Slider(visible=False, interactive=False, elem_id="hera_progress")
                elements["hera_status"] = gr.Markdown(elem_id="hera_status")
                elements["hera_report"] = gr.File(visible=False, interactive=False, elem_id="hera_report")
            with gr.Column():
                look: dict[str, Any] = {"format": "png", "object_fit": "contain", "preview": True}
                elements["hera_gallery"] = gr.Gallery(visible=False, interactive=False, elem_id="hera_gallery", **look)
    return {"hera_tab": tab, **elements}


def _widget(key: str) -> Component:
    if options(key):
        return gr.Dropdown(choices=options(key), value=default(key))
    kind = FIELDS[key].type
    if kind is bool:
        return gr.Checkbox(value=default(key))
    if kind in (int, float):
        whole = kind is int
        return gr.Number(value=default(key), precision=0 if whole else None, step=1 if whole else 0.01)
    return gr.Textbox(value=default(key), max_lines=1)


def _connect(engine: "Engine", panel: Panel, elements: Elements, theirs: Elements) -> None:
    # what the click of the host's button sends
    start = theirs["start_btn"]._id, "click"
    page: Any = get_blocks_context()
    (event,) = (event for event in page.fns.values() if start in event.targets)
    inputs, outputs = set(event.inputs), panel.outputs
    quiet = {"show_progress": "hidden", "concurrency_limit": None}
    lang, model_name = engine.manager.get_elem_by_id("top.lang"), engine.manager.get_elem_by_id("top.model_name")

    # "multiple": else a press is lost, silently, on a page that still follows a job
    for kind in (SELECT, COMPARE, CALIBRATE):
        begin = partial(panel.begin, kind)
        elements[f"hera_{kind}_btn"].click(begin, inputs, outputs, trigger_mode="multiple", **quiet)
    elements["hera_stop_btn"].click(panel.abort, queue=False)
    heads_file = elements["hera_heads_file"]
    heads_file.focus(panel.list_files, [model_name], [heads_file], queue=False)
    heads_file.input(panel.load_file, [lang, heads_file], outputs, **quiet)
    theirs["training_stage"].change(_open, [theirs["training_stage"]], [elements["hera_tab"]], queue=False)
    # a run that has ended well may have started a comparison
    theirs["output_box"].change(panel.follow, outputs=outputs, trigger_mode="always_last", **quiet)
    gr.on(fn=panel.after_reload, outputs=outputs, **quiet)


def _open(training_stage: str) -> Any:
    return gr.Accordion(open=TRAINING_STAGES[training_stage] == STAGE)
