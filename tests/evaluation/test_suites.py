"""Every task, asked and judged by lmms-eval on local rows with the real columns, a model giving known answers."""

import json
from argparse import Namespace
from pathlib import Path

import pytest

pytest.importorskip("lmms_eval")
import datasets
from lmms_eval import tasks
from lmms_eval.api.model import lmms
from lmms_eval.api.task import ConfigurableMessagesTask
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager
from lmms_eval.tasks.cv_bench.utils import cv_bench_default_aggregate_results
from lmms_eval.utils import load_yaml_config

from llamafactory_hera.evaluation.suites import SUITES, aggregate, definition, tally

from .benchmarks import CASES

TASKS = {task.data: task for suite in SUITES.values() for task in suite}


class Answers(lmms):
    """Gives the answers of the cases, in their order, and keeps what it was asked."""

    is_simple = False

    def __init__(self, answers: dict[str, list[str]]) -> None:
        super().__init__()
        self.answers, self.asked = answers, {}

    def generate_until(self, requests):
        given = []
        for request in requests:
            _, messages, settings, place, task, split = request.args
            self.asked[task, place] = (messages(self.task_dict[task][split][place]), settings)
            given.append(self.answers[task][place])
        return given

    def loglikelihood(self, requests):
        raise NotImplementedError

    def generate_until_multi_round(self, requests):
        raise NotImplementedError


def evaluate(folder: Path, configs: dict[str, dict], answers: dict[str, list[str]]):
    model = Answers(answers)
    asked = [ConfigurableMessagesTask(config=config | {"task": name}) for name, config in configs.items()]
    manager = TaskManager(include_defaults=False)
    how = {"bootstrap_iters": 0, "cli_args": Namespace(output_path=str(folder), process_with_media=False)}
    return simple_evaluate(model=model, tasks=asked, task_manager=manager, **how), model


def on_disk(name: str, folder: Path, split: str) -> dict:
    """What makes a definition read the rows of a case."""
    path = folder / name
    if not path.exists():
        datasets.DatasetDict({split: datasets.Dataset.from_list(CASES[name].rows)}).save_to_disk(path)
    return {"dataset_path": str(path), "dataset_name": None, "dataset_kwargs": {"load_from_disk": True}}


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory):
    """All cases in one pass of the harness."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "metadata").mkdir()
    truth = [{"id": 1005 + i, "truth": said} for i, said in enumerate(["no", "no", "no", "yes", "yes"])]
    (folder / "metadata/annotations.json").write_text(json.dumps(truth))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AMBER_BASE_DIR", str(folder))
        configs = {}
        for name in CASES:
            config = definition(TASKS[name])
            configs[f"hera_{name}"] = config | on_disk(name, folder, config["test_split"])
        return evaluate(folder, configs, {f"hera_{name}": case.answers for name, case in CASES.items()})


@pytest.mark.parametrize("name", CASES)
def test_the_suites_prompt_is_asked_of_the_image(evaluated, name: str) -> None:
    [turn], settings = evaluated[1].asked[f"hera_{name}", 0]
    picture, text = turn["content"]
    assert (picture["type"], text["text"]) == ("image", CASES[name].prompt)
    assert settings["until"] == []


@pytest.mark.parametrize("name", CASES)
def test_answers_get_the_suites_score(evaluated, name: str) -> None:
    found, case = evaluated[0], CASES[name]
    samples = found["samples"][f"hera_{name}"]
    records = json.loads(json.dumps([sample["hera"] for sample in sorted(samples, key=lambda one: one["doc_id"])]))
    assert len(records) == len(case.answers)
    assert aggregate(f"hera_{name}", records) == pytest.approx(case.scores, abs=0.01)
    assert found["results"][f"hera_{name}"]["hera,none"] == pytest.approx(next(iter(case.scores.values())), abs=0.01)


def test_every_task_is_defined_and_has_a_case() -> None:
    named = {task.data for suite in ("paper", "hallucination") for task in SUITES[suite]}
    assert named - {"chair", "amber_g"} == set(CASES)
    assert [len(SUITES["paper"]), len(SUITES["hallucination"])] == [18, 4]
    for task in TASKS.values():
        config = definition(task)
        assert config["test_split"], task.name
        assert bool((config.get("dataset_kwargs") or {}).get("token")) == ("token" in task.needs), task.name
    assert definition(TASKS["mathvista"])["dataset_path"] == "AI4Math/MathVista"


#: Tasks that lmms-eval scores as the suite does: its definition, its score, answers that both read alike.
ALIKE = {
    "pope": ("pope/pope.yaml", "pope_accuracy", ["yes", "yes", "yes", "no"]),
    "gqa": ("gqa/gqa.yaml", "exact_match", ["red", "blue", "Red", "sky"]),
    "mmmu": ("mmmu/mmmu_val.yaml", "mmmu_acc", ["B", "100", "7"]),
    "cv_bench": ("cv_bench/cv_bench.yaml", "cv_bench_acc", ["(B)", "A", "B", "A"]),
}


def test_scores_agree_with_those_of_lmms_evals_own_definitions(tmp_path: Path) -> None:
    """CV-Bench's by the sources' formula, which lmms-eval has and does not use."""
    configs, answers = {}, {}
    for name, (source, _, given) in ALIKE.items():
        whole = load_yaml_config(str(Path(tasks.__file__).parent / source)) | {"process_docs": None}
        if name == "cv_bench":
            whole["metric_list"][0]["aggregation"] = cv_bench_default_aggregate_results
        for kind, config in (("theirs", whole), ("hera", definition(TASKS[name]))):
            configs[f"{kind}_{name}"] = config | on_disk(name, tmp_path, config["test_split"])
            answers[f"{kind}_{name}"] = given
    found = evaluate(tmp_path, configs, answers)[0]["results"]
    theirs = {name: 100 * found[f"theirs_{name}"][f"{score},none"] for name, (_, score, _) in ALIKE.items()}
    assert {name: found[f"hera_{name}"]["hera,none"] for name in ALIKE} == pytest.approx(theirs, abs=0.001)
    assert len(set(theirs.values())) == 4  # neither all right nor all wrong


def test_captions_are_counted_as_their_authors_do() -> None:
    """CHAIR: 1 of 4, 0 of 1, 0 of no objects are not there. AMBER: two descriptions."""
    counts = [(4, 1, 1), (1, 0, 0), (0, 0, 0)]
    chair = [dict(zip(("mentioned", "wrong", "with_wrong"), each, strict=True)) for each in counts]
    assert aggregate("hera_chair", chair) == pytest.approx({"CHAIRs ↓": 100 / 3, "CHAIRi ↓": 20})
    names = [f"{kind}_{what}" for kind in ("chair", "safe_cover", "hallu_cover") for what in ("score", "num")]
    names += ["hallu_score", "non_hallu_num"]
    amber = [dict(zip(names, counts, strict=True)) for counts in [(1, 4, 2, 7, 1, 3, 1, 1), (0, 1, 3, 3, 0, 2, 0, 1)]]
    assert aggregate("hera_amber_g", amber) == pytest.approx({"CHAIR ↓": 20, "Cover": 50, "Hal ↓": 50, "Cog ↓": 20})


def test_nothing_said_is_a_score_of_zero() -> None:
    said = [{"right": 0, "no": 1, "said_no": 0, "both_no": 0}]
    assert set(aggregate("hera_amber_d", said).values()) == {0.0}


def test_samples_without_a_group_are_groups_of_their_own() -> None:
    records = [{"right": 1}, {"right": 0, "group": 0}, {"right": 1, "group": 0}]
    assert [sums["n"] for sums in tally("hera_gqa", records).values()] == [1, 2]
