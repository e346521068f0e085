"""The patches: active from the start, applied to the real host, and skipped with a reason if the host differs."""

import importlib
import inspect
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from hera_patches import patches, registry, training
from llamafactory_hera import keys
from tests.e2e.runner import run_command, write_recipe

PATCHES = Path(registry.__file__).parents[1]


def _python(code: str, *options: str, **variables: str) -> subprocess.CompletedProcess:
    command = [sys.executable, *options, "-c", textwrap.dedent(code)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **variables}, check=False)


def _start(hook: Path, code: str, **variables: str) -> subprocess.CompletedProcess:
    """Runs code after Python has read the ``.pth`` file next to ``hook``, a file or folder named hera_patches."""
    folder = hook.parent
    prefix = f"import site, sys; sys.path.insert(0, {str(folder)!r}); before = set(sys.modules); "
    return _python(f"{prefix}site.addsitedir({str(folder)!r})\n{textwrap.dedent(code)}", "-I", "-S", **variables)


def test_the_hook_is_installed_at_startup_even_under_accelerate(tmp_path):
    code = "import sys; print([type(finder).__name__ for finder in sys.meta_path].count('HeraStart'))"
    for options in ((), ("-I",)):
        assert _python(code, *options).stdout.split() == ["1"]
    (tmp_path / "script.py").write_text(code)
    # accelerate needs MPI to start several CPU processes, so this starts only one
    launch = "accelerate launch --cpu --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no"
    code, output = run_command([*launch.split(), "script.py"], tmp_path)
    assert (code, output.splitlines()[-1]) == (0, "1"), output


def test_startup_imports_nothing_and_finding_the_host_imports_the_hook():
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
    assert _start(hook, code, HERA_DISABLE="0").stdout.splitlines() == ["", "False", "0 1 True"]
    assert _start(hook, code, HERA_DISABLE="1").stdout.splitlines() == ["", "False", "0 0 False"]


@pytest.mark.slow
def test_a_failed_start_prints_one_line_and_python_continues(tmp_path):
    shutil.copy(PATCHES / "llamafactory_hera_patches.pth", tmp_path)
    (tmp_path / "hera_patches.py").write_text("raise ValueError('two\\nlines')")
    (tmp_path / "llamafactory.py").write_text("")
    done = _start(tmp_path / "hera_patches.py", "import llamafactory; print(1)")
    assert done.stdout == "1\n"
    (line,) = done.stderr.splitlines()
    assert line.startswith("llamafactory-hera could not start")
    assert "ValueError" in line


def test_spawned_children_are_patched():
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
def test_every_patch_fits_the_real_host_and_keeps_its_source_and_signatures_readable():
    for host in patches():
        importlib.import_module(host)
    assert dict.fromkeys(patch.name for patch in patches().values()) == registry.MISFITS
    registry.require()

    from llamafactory.train.sft import workflow

    assert "def run_sft(" in inspect.getsource(workflow)
    assert inspect.signature(workflow.run_sft) == inspect.signature(workflow.run_sft.__wrapped__)


def _uses_nothing(model_args, data_args, training_args, finetuning_args, generating_args, callbacks=None):
    pass


@pytest.mark.parametrize(
    ("host", "content", "reason", "lost"),
    [
        ("llamafactory.train.sft.workflow", {}, "no attribute 'run_sft'", "`stage: hera`"),
        ("llamafactory.train.sft.workflow", {"run_sft": lambda data: 0}, "run_sft takes ['data']", "`stage: hera`"),
        ("llamafactory.train.sft.workflow", {"run_sft": _uses_nothing}, "not use get_dataset", "`stage: hera`"),
        ("llamafactory.data.template", {}, "no attribute 'EmptyFormatter'", "`stage: hera`"),
        ("llamafactory.webui.runner", {"Runner": object}, "no attribute '_parse_train_args'", "HeRA in the web UI"),
    ],
)
def test_a_patch_that_does_not_fit_says_why_and_leaves_the_host_alone(
    host, content, reason, lost, monkeypatch, capsys
):
    monkeypatch.setattr(registry, "MISFITS", {})
    patch = patches()[host]
    module = ModuleType(host)
    vars(module).update(content)
    before = dict(vars(module))
    registry.apply_to(module)
    assert vars(module) == before
    assert reason in registry.MISFITS[patch.name]
    warning = capsys.readouterr().err
    assert f"{patch.name!r} does not fit" in warning
    assert f"{lost} may not work" in warning
    if patch.for_training:
        with pytest.raises(ValueError, match=f"stage: patches do not fit this LLaMA-Factory: {patch.name}"):
            registry.require()
    else:
        registry.require()


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
def test_a_hera_run_stops_if_it_takes_another_workflow(route, what, monkeypatch, tmp_path):
    from llamafactory.train import tuner as host

    monkeypatch.setattr(host, "is_hyper_parallel_available", lambda: True)
    monkeypatch.setitem(sys.modules, "llamafactory.train.hyper_parallel", SimpleNamespace(run_sft=route))
    run = {"model_name_or_path": "none", "dataset": "none", "dataset_dir": "none", "output_dir": str(tmp_path)}
    run |= {"do_train": True, "template": "llava", "use_hyper_parallel": True, "use_cpu": True, "report_to": "none"}
    with pytest.raises(ValueError, match=f"stage: hera: LLaMA-Factory {what} without it"):
        host._training_function({"args": {**run, "stage": "hera", "hera_heads": "L0H1"}, "callbacks": []})
    if route is _read:
        with pytest.raises(ValueError, match="none"):  # the host's own stages run as before
            host._training_function({"args": {**run, "stage": "sft"}, "callbacks": []})


@pytest.mark.parametrize(
    ("call", "refusal"),
    [(lambda: keys.typed("hera_k", "ten", int), True), (lambda: keys._converted("ten", int), False)],
)
def test_only_an_error_that_the_plugin_raises_is_a_refusal(call, refusal):
    with pytest.raises(ValueError) as caught:
        call()
    assert training._is_refusal(caught.value) == refusal


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "debug", "last"),
    [
        ({"hera_wieght": 1}, "", "llamafactory-hera: hera_wieght: no such key; did you mean hera_weight?"),
        ({"use_unsloth_gc": True}, "1", "ValueError: use_unsloth_gc: True does not work with stage: hera"),
        ({"stage": "sft", "wieght": 1}, "", "ValueError: Some keys are not used by the HfArgumentParser: "),
    ],
    ids=["an unknown key", "HERA_DEBUG", "another stage"],
)
def test_a_refused_run_ends_with_one_line(change, debug, last, tmp_path, server):
    run = {"stage": "hera", "do_train": True, "hera_heads": "L0H1", "model_name_or_path": "none", "template": "llava"}
    run |= {"dataset": "none", "output_dir": str(tmp_path / "run"), "report_to": "none", "use_cpu": True}
    recipe = write_recipe(tmp_path / "recipe.yaml", run | change)
    command = Path(sys.executable).with_name("llamafactory-cli")
    code, output = server.script(command, "train", recipe, cwd=tmp_path, HERA_DEBUG=debug)
    assert code == 1
    assert output.splitlines()[-1].startswith(last)
    assert ("Traceback" in output) == last.startswith("ValueError")
