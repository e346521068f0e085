"""The HeRA accordion: a field for each key, and the place where heads are selected and looked at."""

import gradio as gr
from gradio.components import Component

from .fields import FIELDS, ROWS, Field

_HEADS_FILE = "hera_heads_file"


def _widget(field: Field) -> Component:
    if field.kind == "text":
        return gr.Textbox(value=field.default, max_lines=1)
    if field.kind == "switch":
        return gr.Checkbox(value=field.default)
    if field.kind == "choice":
        return gr.Dropdown(choices=list(field.choices), value=field.default)
    precision = 0 if field.kind == "integer" else None
    return gr.Number(value=field.default, precision=precision, step=1 if precision == 0 else 0.01)


def create_accordion() -> tuple[dict[str, Component], set[Component]]:
    """Builds the accordion at the current place of the page.

    Returns:
        All its elements by name, and those whose values describe a run.
    """
    elements: dict[str, Component] = {}
    with gr.Accordion(open=False) as tab:
        for row in ROWS:
            with gr.Row():
                for key in row:
                    elements[key] = _widget(FIELDS[key])
                    if key == "hera_heads":
                        elements[_HEADS_FILE] = gr.Dropdown(allow_custom_value=True, value=None)
        with gr.Row():
            with gr.Column():
                with gr.Row():
                    elements["hera_select_btn"] = gr.Button(variant="primary")
                    elements["hera_compare_btn"] = gr.Button()
                    elements["hera_stop_btn"] = gr.Button(variant="stop")
                elements["hera_compare"] = gr.Checkbox(value=True)
                elements["hera_progress"] = gr.Slider(visible=False, interactive=False, elem_id="hera_progress")
                elements["hera_status"] = gr.Markdown(elem_id="hera_status")
                elements["hera_report"] = gr.File(visible=False, interactive=False, elem_id="hera_report")
            with gr.Column():
                elements["hera_gallery"] = gr.Gallery(
                    visible=False,
                    interactive=False,
                    format="png",
                    object_fit="contain",
                    preview=True,
                    elem_id="hera_gallery",
                )
    described = {elements[name] for name in (*FIELDS, "hera_compare")}
    return {"hera_tab": tab, **elements}, described
