"""The run-time changes: there from the start, applied to the real host, refused with a reason where it has changed."""

import importlib
import inspect
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from hera_patches import (
    constants,
    engine,
    finetuning_args,
    locales,
    log_callback,
    loss_plot,
    registry,
    runner,
    saved_settings,
    sft_workflow,
    templates,
    train_tab,
    tuner,
)
from llamafactory_hera.integrations.llamaboard import names

PATCHES = Path(registry.__file__).parents[1]


def _python(code: str, *options: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *options, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )


def _start(hook: Path, code: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs ``code`` after Python has read the start-up line beside ``hook``, a file or folder named hera_patches."""
    folder = hook.parent
    prefix = f"import site, sys; sys.path.insert(0, {str(folder)!r}); before = set(sys.modules); "
    return _python(f"{prefix}site.addsitedir({str(folder)!r})\n{textwrap.dedent(code)}", "-I", "-S", **environment)


def test_the_hook_is_there_from_the_start() -> None:
    code = """
        import sys
        names = [type(finder).__name__ for finder in sys.meta_path if not isinstance(finder, type)]
        print(names.count("HeraStart"))
    """
    for options in ((), ("-I",)):
        assert _python(code, *options).stdout.split() == ["1"]


def test_the_start_imports_nothing_before_the_host_and_the_hook_then() -> None:
    code = """
        print(*set(sys.modules) - before)
        from importlib.util import find_spec
        print("hera_patches" in sys.modules)
        find_spec("llamafactory")
        import hera_patches
        names = [type(finder).__name__ for finder in sys.meta_path]
        print(names.count("HeraStart"), names.count("PatchFinder"), hera_patches.installed())
    """
    hook = PATCHES / "hera_patches"
    assert _start(hook, code).stdout.splitlines() == ["", "False", "0 1 True"]
    assert _start(hook, code, HERA_DISABLE="0").stdout.splitlines() == ["", "False", "0 1 True"]
    assert _start(hook, code, HERA_DISABLE="1").stdout.splitlines() == ["", "False", "0 0 False"]


@pytest.mark.slow
def test_a_start_that_fails_says_so_in_one_line_and_lets_the_interpreter_go_on(tmp_path: Path) -> None:
    shutil.copy(PATCHES / "llamafactory_hera.pth", tmp_path)
    (tmp_path / "hera_patches.py").write_text("raise ValueError('two\\nlines')")
    (tmp_path / "llamafactory.py").write_text("")
    done = _start(tmp_path / "hera_patches.py", "import llamafactory; print(1)")
    assert done.stdout == "1\n"
    (line,) = done.stderr.splitlines()
    assert line.startswith("llamafactory-hera could not start")
    assert "ValueError" in line
    assert "llamafactory-hera doctor" in line


def test_spawned_children_are_patched() -> None:
    code = """
        import multiprocessing
        if __name__ == "__main__":
            context = multiprocessing.get_context("spawn")
            with context.Pool(1) as pool:
                print(pool.apply(eval, ("__import__('llamafactory.hparams', fromlist=['x'])"
                                        ".FinetuningArguments.__dataclass_fields__.keys() >= {'hera_heads'}",)))
    """
    assert _python(code).stdout.split() == ["True"]


@pytest.mark.slow
def test_every_patch_fits_the_real_host() -> None:
    for target, _ in registry.PATCHES:
        importlib.import_module(target)
    assert [status.name for status in registry.statuses()] == [name for _, name in registry.PATCHES]
    assert {status.misfit for status in registry.statuses()} == {None}
    registry.require()


def test_the_templates_fit_whatever_is_imported_first() -> None:
    code = """
        import llamafactory_hera.integrations.llamaboard.saved
        from llamafactory.data.template import TEMPLATES
        from llamafactory_hera.backbones import table
        print(set(table.TEMPLATES) <= set(TEMPLATES))
    """
    assert _python(code).stdout.splitlines()[-1:] == ["True"]


def test_source_and_signatures_of_patched_modules_stay_readable() -> None:
    from llamafactory.extras import ploting
    from llamafactory.train.sft import workflow
    from llamafactory.webui import common
    from llamafactory.webui import runner as host_runner
    from llamafactory.webui.components import train

    assert "def run_sft(" in inspect.getsource(workflow)
    wrapped = (workflow.run_sft, ploting.gen_loss_plot, common.save_args, train.create_train_tab)
    for function in (*wrapped, host_runner.Runner._initialize):
        assert inspect.signature(function) == inspect.signature(function.__wrapped__)


def _uses_nothing(model_args, data_args, training_args, finetuning_args, generating_args, callbacks=None):
    pass


@pytest.mark.parametrize(
    ("patch", "host", "reason"),
    [
        (finetuning_args, {"FinetuningArguments": object}, "no function FinetuningArguments.__post_init__"),
        (sft_workflow, {}, "no function run_sft"),
        (sft_workflow, {"run_sft": lambda model_args: None}, "run_sft takes ['model_args']"),
        (sft_workflow, {"run_sft": _uses_nothing}, "run_sft does not use get_dataset"),
        (tuner, {"get_train_args": lambda args: None}, "no function get_infer_args"),
        (log_callback, {"LogCallback": object}, "no function LogCallback.on_log"),
        (templates, {}, "no attribute 'EmptyFormatter'"),
        (constants, {}, "no function register_model_group"),
        (loss_plot, {"gen_loss_plot": lambda log: None}, "gen_loss_plot takes ['log']"),
        (saved_settings, {"save_args": lambda path: None}, "save_args takes ['path']"),
        (locales, {}, "no attribute 'LOCALES'"),
        (
            train_tab,
            {"create_train_tab": lambda engine: None, "change_stage": lambda training_stage: None},
            "does not use get_base_elems",
        ),
        (runner, {"Runner": object}, "no function Runner._parse_train_args"),
        (engine, {"Engine": object}, "no function Engine.resume"),
    ],
)
def test_another_host_is_named(patch: ModuleType, host: dict, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_statuses", {})
    module = ModuleType(next(target for target, name in registry.PATCHES if patch.__name__.endswith(f".{name}")))
    vars(module).update(host)
    registry.apply_to(module)
    (status,) = registry.statuses()
    assert reason in status.misfit


def _read(model_args, data_args, training_args, *rest):
    from llamafactory.data.loader import _get_merged_dataset

    _get_merged_dataset(data_args.dataset, model_args, data_args, training_args, "sft")


def _read_tokenized(model_args, data_args, training_args, *rest):
    from llamafactory.data import get_dataset

    data_args.tokenized_path = "tokenized"
    get_dataset(None, model_args, data_args, training_args, "sft", None)


@pytest.mark.parametrize(
    ("route", "what"),
    [(_read, "was about to train"), (_read_tokenized, "was about to train"), (lambda *arguments: None, "has trained")],
)
def test_another_workflow_than_ours_stops_a_hera_run(
    route: Callable[..., None], what: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from llamafactory.train import tuner as host

    monkeypatch.setattr(host, "is_hyper_parallel_available", lambda: True)
    monkeypatch.setitem(sys.modules, "llamafactory.train.hyper_parallel", SimpleNamespace(run_sft=route))
    run = {"model_name_or_path": "none", "dataset": "none", "dataset_dir": "none", "output_dir": str(tmp_path)}
    run |= {"do_train": True, "template": "llava", "use_hyper_parallel": True, "use_cpu": True, "report_to": "none"}
    with pytest.raises(RuntimeError, match=f"stage: hera: LLaMA-Factory {what} without HeRA"):
        host._training_function({"args": {**run, "stage": "hera", "hera_heads": "L0H1"}, "callbacks": []})
    if route is not _read:
        return
    with pytest.raises(ValueError, match="none"):  # the stages of the host are left alone
        host._training_function({"args": {**run, "stage": "sft"}, "callbacks": []})


def test_a_stage_that_the_host_has_is_not_added_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from llamafactory.extras import constants as host

    monkeypatch.setattr(names, "MODELS", [])
    changed = SimpleNamespace(**{**vars(host), "TRAINING_STAGES": {"SFT": "sft", "Heads": "hera"}})
    changed.register_model_group = lambda models, template, multimodal: None
    constants.apply(changed)
    assert changed.TRAINING_STAGES == {"SFT": "sft", "Heads": "hera"}


@pytest.mark.parametrize(
    ("target", "name", "lost"),
    [
        ("llamafactory.train.sft.workflow", "sft_workflow", "`stage: hera` may be unavailable"),
        ("llamafactory.extras.ploting", "loss_plot", "HeRA in the web UI may be unavailable"),
    ],
)
def test_a_patch_that_does_not_fit_warns_and_leaves_the_host_alone(
    target: str, name: str, lost: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(registry, "_statuses", {})
    module = ModuleType(target)
    module.run_sft = original = lambda: None
    registry.apply_to(module)
    assert module.run_sft is original
    warning = capsys.readouterr().err
    assert f"{name!r} does not fit" in warning
    assert lost in warning
    assert [status.name for status in registry.statuses()] == [name]


def test_training_needs_the_patches_of_training_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_statuses", {})
    registry.apply_to(ModuleType("llamafactory.extras.ploting"))
    registry.require()
    registry.apply_to(ModuleType("llamafactory.train.sft.workflow"))
    with pytest.raises(RuntimeError, match="sft_workflow"):
        registry.require()
