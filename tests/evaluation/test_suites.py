"""Every task in lmms-eval, on local rows with the columns of the real data and with given answers."""

import json
from argparse import Namespace
from pathlib import Path

import datasets
import pytest
from lmms_eval import tasks
from lmms_eval.api.model import lmms
from lmms_eval.api.task import ConfigurableMessagesTask
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager
from lmms_eval.tasks.cv_bench.utils import cv_bench_default_aggregate_results
from lmms_eval.utils import load_yaml_config

from llamafactory_hera.evaluation.suites import SUITES

from .benchmarks import CASES

TASKS = {task.name: task for suite in SUITES.values() for task in suite}


class Answers(lmms):
    """Gives the same answers to each task, in order, and stores what it was asked."""

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

    generate_until_multi_round = loglikelihood


def evaluate(configs: dict[str, dict], answers: dict[str, list[str]]):
    model = Answers(answers)
    asked = [ConfigurableMessagesTask(config=config | {"task": name}) for name, config in configs.items()]
    manager, arguments = TaskManager(include_defaults=False), Namespace(process_with_media=False, output_path=".")
    return simple_evaluate(model=model, tasks=asked, task_manager=manager, bootstrap_iters=0, cli_args=arguments), model


def save_rows(name: str, folder: Path) -> None:
    rows = datasets.Dataset.from_list(CASES[name].rows)
    datasets.DatasetDict({TASKS[name].definition()["test_split"]: rows}).save_to_disk(folder / name)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory):
    """All cases in one pass of the harness."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "metadata").mkdir()
    truth = [{"id": 1005 + i, "truth": said} for i, said in enumerate(["no", "no", "no", "yes", "yes"])]
    (folder / "metadata/annotations.json").write_text(json.dumps(truth))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AMBER_BASE_DIR", str(folder))
        for name in CASES:
            save_rows(name, folder)
        return evaluate(
            {name: TASKS[name].definition(folder) for name in CASES},
            {name: case.answers for name, case in CASES.items()},
        )


@pytest.mark.parametrize("name", CASES)
def test_the_suites_prompt_is_asked_about_the_image(evaluated, name: str) -> None:
    [turn], settings = evaluated[1].asked[name, 0]
    picture, text = turn["content"]
    assert (picture["type"], text["text"]) == ("image", CASES[name].prompt)
    assert settings["until"] == []


@pytest.mark.parametrize("name", CASES)
def test_answers_get_the_suites_score(evaluated, name: str) -> None:
    samples = sorted(evaluated[0]["samples"][name], key=lambda sample: sample["doc_id"])
    records = json.loads(json.dumps([sample["hera"] for sample in samples]))
    assert len(records) == len(CASES[name].answers)
    assert TASKS[name].aggregate(records) == pytest.approx(CASES[name].scores, abs=0.01)


def test_every_task_is_defined_and_has_a_case() -> None:
    assert set(TASKS) - {"chair", "amber_g"} == set(CASES)
    assert [len(SUITES["paper"]), len(SUITES["hallucination"])] == [18, 4]
    for task in TASKS.values():
        config = task.definition()
        assert config["test_split"], task.name
        assert bool((config.get("dataset_kwargs") or {}).get("token")) == ("token" in task.needs), task.name


#: Tasks that lmms-eval scores like the suite: its definition, its score, and answers that both read in the same way.
ALIKE = {
    "pope": ("pope/pope.yaml", "pope_accuracy", ["yes", "yes", "yes", "no"]),
    "gqa": ("gqa/gqa.yaml", "exact_match", ["red", "blue", "Red", "sky"]),
    "mmmu": ("mmmu/mmmu_val.yaml", "mmmu_acc", ["B", "100", "7"]),
    "cv_bench": ("cv_bench/cv_bench.yaml", "cv_bench_acc", ["(B)", "A", "B", "A"]),
}


def test_scores_agree_with_those_of_lmms_eval(tmp_path: Path) -> None:
    """Compares with the formula of CV-Bench's authors, which lmms-eval contains but does not use."""
    configs, answers = {}, {}
    for name, (source, _, given) in ALIKE.items():
        save_rows(name, tmp_path)
        theirs = load_yaml_config(str(Path(tasks.__file__).parent / source)) | {"process_docs": None}
        if name == "cv_bench":
            theirs["metric_list"][0]["aggregation"] = cv_bench_default_aggregate_results
        disk = {"dataset_path": str(tmp_path / name), "dataset_name": None, "dataset_kwargs": {"load_from_disk": True}}
        configs |= {f"their_{name}": theirs | disk, name: TASKS[name].definition(tmp_path)}
        answers |= {f"their_{name}": given, name: given}
    found = evaluate(configs, answers)[0]
    theirs = {name: 100 * found["results"][f"their_{name}"][f"{score},none"] for name, (_, score, _) in ALIKE.items()}
    ours = {name: TASKS[name].aggregate([sample["hera"] for sample in found["samples"][name]]) for name in ALIKE}
    assert {name: scores["accuracy"] for name, scores in ours.items()} == pytest.approx(theirs, abs=0.001)
    assert len(set(theirs.values())) == 4


def test_captions_are_scored_as_their_authors_do() -> None:
    """CHAIR: 1 of 4, 0 of 1 and 0 of 0 objects are not in the image. AMBER: two descriptions."""
    counts = [(4, 1, 1), (1, 0, 0), (0, 0, 0)]
    chair = [dict(zip(("mentioned", "wrong", "with_wrong"), each, strict=True)) for each in counts]
    assert TASKS["chair"].aggregate(chair) == pytest.approx({"CHAIRs ↓": 100 / 3, "CHAIRi ↓": 20})
    names = [f"{kind}_{what}" for kind in ("chair", "safe_cover", "hallu_cover") for what in ("score", "num")]
    names += ["hallu_score", "non_hallu_num"]
    amber = [dict(zip(names, counts, strict=True)) for counts in [(1, 4, 2, 7, 1, 3, 1, 1), (0, 1, 3, 3, 0, 2, 0, 1)]]
    scores = {"CHAIR ↓": 20, "Cover": 50, "Hal ↓": 50, "Cog ↓": 20}
    assert TASKS["amber_g"].aggregate(amber) == pytest.approx(scores)


def test_no_positive_answer_is_a_score_of_zero() -> None:
    records = [{"right": 0, "no": 1, "said_no": 0, "both_no": 0}]
    assert set(TASKS["amber_d"].aggregate(records).values()) == {0.0}


def test_samples_without_a_group_are_groups_of_their_own() -> None:
    records = [{"right": 1}, {"right": 0, "group": 0}, {"right": 1, "group": 0}]
    assert [sums["n"] for sums in TASKS["gqa"].tally(records).values()] == [1, 2]
