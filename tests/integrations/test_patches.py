"""The run-time changes: applied to the real host, refused with a reason where the host has changed."""

import inspect
import subprocess
import sys
import textwrap
from types import ModuleType, SimpleNamespace

import pytest

from hera_patches import finetuning_args, log_callback, registry, sft_workflow, templates


def _python(code: str, *options: str, **environment: str) -> subprocess.CompletedProcess:
    import os

    return subprocess.run(
        [sys.executable, *options, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )


def test_every_patch_fits_the_real_host() -> None:
    import importlib

    for target, _ in registry.PATCHES:
        importlib.import_module(target)
    assert [status.name for status in registry.statuses()] == [name for _, name in registry.PATCHES]
    assert {status.state for status in registry.statuses()} <= {"applied", registry.NOT_NEEDED}
    registry.require()


def test_source_of_patched_modules_stays_readable() -> None:
    import llamafactory.train.sft.workflow as workflow

    assert "def run_sft(" in inspect.getsource(workflow)
    assert inspect.signature(workflow.run_sft) == inspect.signature(workflow.run_sft.__wrapped__)


def test_the_hook_is_there_from_the_start_and_loads_nothing() -> None:
    code = """
        import sys
        names = [type(finder).__name__ for finder in sys.meta_path if not isinstance(finder, type)]
        print(names.count("PatchFinder"), "llamafactory" in sys.modules, "torch" in sys.modules)
    """
    for options in ((), ("-I",)):
        assert _python(code, *options).stdout.split() == ["1", "False", "False"]
    assert _python(code, HERA_DISABLE="1").stdout.split() == ["0", "False", "False"]
    assert _python(code, HERA_DISABLE="0").stdout.split() == ["1", "False", "False"]


def test_spawned_children_are_patched() -> None:
    code = """
        import multiprocessing
        def names(queue):
            from llamafactory.hparams import FinetuningArguments
            queue.put("hera_heads" in FinetuningArguments.__dataclass_fields__)
        if __name__ == "__main__":
            context = multiprocessing.get_context("spawn")
            with context.Pool(1) as pool:
                from llamafactory_hera.cli import main
                print(pool.apply(eval, ("__import__('llamafactory.hparams', fromlist=['x'])"
                                        ".FinetuningArguments.__dataclass_fields__.keys() >= {'hera_heads'}",)))
    """
    assert _python(code).stdout.split() == ["True"]


@pytest.mark.parametrize(
    ("patch", "host", "reason"),
    [
        (finetuning_args, SimpleNamespace(FinetuningArguments=object), "not a dataclass"),
        (sft_workflow, SimpleNamespace(), "no function run_sft"),
        (sft_workflow, SimpleNamespace(run_sft=lambda model_args: None), "run_sft takes"),
        (log_callback, SimpleNamespace(LogCallback=object), "no on_log"),
        (templates, SimpleNamespace(), "register_template"),
    ],
)
def test_another_host_is_named(patch: ModuleType, host: SimpleNamespace, reason: str) -> None:
    assert reason in patch.check(host)


def test_a_patch_that_does_not_fit_warns_and_leaves_the_host_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(registry, "_statuses", {})
    module = ModuleType("llamafactory.train.sft.workflow")
    module.run_sft = original = lambda: None
    registry.apply_to(module)
    assert module.run_sft is original
    assert "'sft_workflow' does not fit" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="sft_workflow"):
        registry.require()


def test_run_sft_that_no_longer_uses_a_replaced_name_does_not_fit() -> None:
    import llamafactory.train.sft.workflow as workflow

    def run_sft(model_args, data_args, training_args, finetuning_args, generating_args, callbacks=None):
        return None

    host = SimpleNamespace(**{**vars(workflow), "run_sft": run_sft})
    assert "run_sft does not use get_dataset" in sft_workflow.check(host)
