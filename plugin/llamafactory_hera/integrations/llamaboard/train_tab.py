"""The host's train tab with the HeRA accordion in it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import gradio as gr
from gradio.components import Component
from gradio.context import get_blocks_context
from llamafactory.extras.constants import TRAINING_STAGES

from .accordion import create_accordion
from .display import Display
from .names import STAGE
from .panel import Panel

if TYPE_CHECKING:
    from llamafactory.webui.engine import Engine
    from llamafactory.webui.manager import Manager

#: The host's element behind which the accordion is put.
NEIGHBOR = "mm_tab"


def create_train_tab(engine: "Engine", host: Callable[["Engine"], dict[str, Component]]) -> dict[str, Component]:
    """Builds the host's tab, whose buttons then know HeRA's fields.

    Args:
        engine: The host's.
        host: The host's function of the same name.

    Returns:
        The elements of both by name.
    """
    elements, described = create_accordion()
    with _known(engine.manager, described):
        theirs = host(engine)
    _move_behind(elements["hera_tab"], theirs[NEIGHBOR])
    panel = Panel(engine, Display(elements))
    engine.runner.hera = panel
    _connect(engine, panel, elements, theirs)
    return theirs | elements


def change_stage(training_stage: str, host: Callable[[str], tuple[Any, Any]]) -> tuple[Any, Any]:
    """The host's function of the same name, which empties the list of datasets; HeRA trains on those of SFT."""
    datasets, packing = host(training_stage)
    return (gr.skip() if TRAINING_STAGES[training_stage] == STAGE else datasets), packing


@contextmanager
def _known(manager: "Manager", described: set[Component]) -> Iterator[None]:
    # the host's tab takes what its buttons send from here
    base = manager.get_base_elems()
    manager.get_base_elems = lambda: base | described
    try:
        yield
    finally:
        del manager.get_base_elems


def _move_behind(block: Any, neighbor: Any) -> None:
    siblings = neighbor.parent.children
    siblings.remove(block)
    siblings.insert(siblings.index(neighbor) + 1, block)


def _connect(
    engine: "Engine",
    panel: Panel,
    elements: dict[str, Component],
    theirs: dict[str, Component],
) -> None:
    manager = engine.manager
    inputs, outputs = _sent_by(theirs["start_btn"]), panel.outputs
    quiet = {"show_progress": "hidden", "concurrency_limit": None}
    lang, model_name = manager.get_elem_by_id("top.lang"), manager.get_elem_by_id("top.model_name")

    elements["hera_select_btn"].click(panel.select, inputs, outputs, **quiet)
    elements["hera_compare_btn"].click(panel.compare, inputs, outputs, **quiet)
    elements["hera_stop_btn"].click(panel.abort, queue=False)
    heads_file = elements["hera_heads_file"]
    heads_file.focus(panel.list_files, [model_name], [heads_file], queue=False)
    heads_file.input(panel.load_file, [lang, heads_file], outputs, **quiet)
    theirs["training_stage"].change(_open, [theirs["training_stage"]], [elements["hera_tab"]], queue=False)
    # a run that has ended well may have started a comparison
    theirs["output_box"].change(panel.follow, outputs=outputs, trigger_mode="always_last", **quiet)
    gr.on(fn=panel.after_reload, outputs=outputs, **quiet)


def _sent_by(button: Component) -> set[Component]:
    """The elements whose values a button's click sends."""
    (event,) = (event for event in get_blocks_context().fns.values() if (button._id, "click") in event.targets)
    return set(event.inputs)


def _open(training_stage: str) -> Any:
    return gr.Accordion(open=True) if TRAINING_STAGES[training_stage] == STAGE else gr.skip()
