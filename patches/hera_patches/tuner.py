"""Stops a HeRA run that the host sends to another workflow than the one with HeRA's trainer.

Why: the host chooses among workflows by arguments and environment variables, more of them in each release, and one
that knows nothing of HeRA would train plain SFT in silence. Which routes there are is not asked: before any data is
read, and once more when the run has ended, HeRA's workflow must have been entered. Can go when the host lets plugins
add stages.
"""

from importlib import import_module
from pathlib import Path
from typing import Any

from .registry import around, misfit_of

FUNCTIONS = {"get_train_args": "args", "get_infer_args": "args", "_training_function": "config"}
USED = {"_training_function": "get_train_args", "export_model": "get_infer_args"}
# what every workflow reads its data with, raw or tokenized, before it loads weights
_DATA = "llamafactory.data.loader"
_READS = {"get_dataset_list": "dataset_names dataset_dir", "has_tokenized_data": "path"}
_READERS = {"_get_merged_dataset": "get_dataset_list", "get_dataset": "_get_merged_dataset has_tokenized_data"}

_missing = False  # a HeRA run has begun, and HeRA's workflow has not


def arrived() -> None:
    """Called by the workflow that uses HeRA's trainer."""
    global _missing
    _missing = False


def apply(module: Any) -> None:
    """Wraps the tuner's parsing and its choice of a workflow, and what finds the data."""
    data = import_module(_DATA)
    if misfit := misfit_of(data, _READS, _READERS):
        raise RuntimeError(f"{_DATA}: {misfit}")

    @around(module)
    def get_train_args(host: Any, args: Any = None) -> Any:
        global _missing
        parsed = host(args)
        model_args, _, training_args, finetuning_args, _ = parsed
        use_hera = getattr(finetuning_args, "use_hera", False)
        if not (use_hera and finetuning_args.hera_visual_attention == "two_way"):
            _refuse_two_way(model_args)
        _missing = use_hera and training_args.do_train
        return parsed

    @around(module)
    def get_infer_args(host: Any, args: Any = None) -> Any:
        parsed = host(args)
        _refuse_two_way(parsed[0])  # parsed here for an export alone
        return parsed

    @around(module)
    def _training_function(host: Any, config: dict[str, Any]) -> None:
        host(config)
        _refuse("has trained")

    @around(data)
    def get_dataset_list(host: Any, dataset_names: Any, dataset_dir: Any) -> Any:
        _refuse("was about to train")
        return host(dataset_names, dataset_dir)

    @around(data)
    def has_tokenized_data(host: Any, path: Any) -> Any:
        _refuse("was about to train")
        return host(path)


def _refuse_two_way(model_args: Any) -> None:
    """A model trained with two_way must neither be exported nor trained on with the causal attention."""
    from llamafactory_hera.files import RUN_FOLDER, read_json

    for folder in (model_args.model_name_or_path, *(model_args.adapter_name_or_path or [])):
        run = Path(folder) / RUN_FOLDER / "run.json"
        if run.is_file() and read_json(run).get("hera_visual_attention") == "two_way":
            raise ValueError(
                f"hera_visual_attention: {folder} was trained with two_way, which no model file says: what loads it "
                "otherwise attends causally, and that is another model. Train on with two_way (hera_weight: 0 for "
                "plain fine-tuning), evaluate inside llamafactory_hera.heads.hooks.DecoderInputs(model, two_way=True)."
            )


def _refuse(what: str) -> None:
    if _missing:
        arrived()
        raise RuntimeError(
            f"stage: hera: LLaMA-Factory {what} without HeRA, in a workflow of another backend. Remove what chose "
            "that backend (such as use_hyper_parallel: true, USE_MCA=1 or USE_MEGATRON_BRIDGE=1), or use stage: sft."
        )
