"""The changes that show HeRA in the host's web UI; training works without them.

They are needed because the host hard-codes its lists, its labels and the values that it sends. Each patch imports the
plugin only when it is applied.
"""

from typing import Any

from .registry import around, patch


@patch("llamafactory.extras.constants", functions={"register_model_group": "models template multimodal"})
def constants(module: Any) -> None:
    """Adds HeRA to the list of stages and the plugin's models to the list of models."""
    from llamafactory_hera.integrations.llamaboard.fields import STAGE, STAGE_TITLE, register_models

    register_models(module)
    module.TRAINING_STAGES[STAGE_TITLE] = STAGE


@patch("llamafactory.extras.ploting", functions={"gen_loss_plot": "trainer_log", "smooth": "scalars"})
def loss_plot(module: Any) -> None:
    """Draws HeRA's curves in the loss plot; the host draws only the sum of both losses."""

    @around(module)
    def gen_loss_plot(host: Any, trainer_log: list[dict[str, Any]]) -> Any:
        if not any("lm_loss" in line for line in trainer_log):
            return host(trainer_log)
        from llamafactory_hera.integrations.llamaboard.plot import loss_figure

        return loss_figure(trainer_log, module.smooth)


@patch("llamafactory.webui.locales")
def locales(module: Any) -> None:
    """Adds the labels of HeRA's fields in every language of the web UI."""
    from llamafactory_hera.integrations.llamaboard.fields import labels

    module.LOCALES |= labels(module.LOCALES["training_stage"])


@patch(
    "llamafactory.webui.components.train",
    functions={"create_train_tab": "engine", "change_stage": "training_stage"},
    used={"create_train_tab": "get_base_elems mm_tab output_dir output_box training_stage"},
)
def train_tab(module: Any) -> None:
    """Adds the HeRA accordion to the train tab."""
    from llamafactory_hera.integrations.llamaboard import train_tab

    around(module)(train_tab.create_train_tab)
    around(module)(train_tab.change_stage)


@patch("llamafactory.webui.runner", functions={"Runner._parse_train_args": "self data"})
def runner(module: Any) -> None:
    """Adds the values of HeRA's fields to the settings of a run."""
    from llamafactory_hera.integrations.llamaboard.fields import with_fields

    @around(module.Runner)
    def _parse_train_args(host: Any, self: Any, data: dict[Any, Any]) -> dict[str, Any]:
        args = host(self, data)
        if args["stage"] != "hera":
            return args
        return with_fields(args, lambda element: data[self.manager.get_elem_by_id(element)])
