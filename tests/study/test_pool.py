"""Units of work: order, side by side, stopped and gone on with. Their processes are real."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llamafactory_hera.files import read_json
from pool import Pool, Unit, UnitFailed, locked, mark_of

NOTE = (
    "import sys, time; open('order.txt', 'a').write(sys.argv[1] + '\\n'); time.sleep(float(sys.argv[2])); "
    "open(sys.argv[1] + '.out', 'w').close()"
)


def unit(name: str, *after: str, seconds: float = 0.0, code: str = NOTE) -> Unit:
    return Unit(name, "kind", ((sys.executable, "-c", code, name, str(seconds)),), (f"{name}.out",), after)


def run(root: Path, units: list[Unit], workers: int = 2) -> list[str]:
    shown: list[str] = []
    with locked(root) as lock:
        Pool(root, workers, lock, shown.append).run(units)
    return shown


def order(root: Path) -> list[str]:
    return (root / "order.txt").read_text().split()


def test_a_unit_waits_for_those_it_needs_and_is_not_repeated(tmp_path):
    units = [unit("c", "a", "b"), unit("a"), unit("b", "a")]
    shown = run(tmp_path, units)
    assert order(tmp_path) == ["a", "b", "c"]
    assert [line.split()[0] for line in shown] == ["1/3", "2/3", "3/3"]
    mark = read_json(mark_of(tmp_path, "a"))
    assert mark["processes"][0]["peak_mib"] > 1
    run(tmp_path, [*units, unit("d", "c")])
    assert order(tmp_path) == ["a", "b", "c", "d"]


@pytest.mark.parametrize("workers", [1, 2])
def test_so_many_run_side_by_side(tmp_path, workers):
    code = (
        "import os, sys, time; n = sys.argv[1]; open(n + '.on', 'w').close(); time.sleep(0.4); "
        "open('seen.txt', 'a').write(f\"{sum(f.endswith('.on') for f in os.listdir())}\\n\"); "
        "time.sleep(0.2); os.remove(n + '.on'); open(n + '.out', 'w').close()"
    )
    run(tmp_path, [unit(name, code=code) for name in "abcd"], workers)
    assert max(map(int, (tmp_path / "seen.txt").read_text().split())) == workers


def test_a_failed_unit_is_named_with_its_log_and_done_again(tmp_path):
    fails = unit("b", "a", code="import os, sys; open('b.out', 'x'); print('the reason'); sys.exit(3)")
    with pytest.raises(ValueError, match=r"(?s)b failed with status 3.*logs/b.log.*the reason"):
        run(tmp_path, [unit("a"), fails])
    assert not mark_of(tmp_path, "b").exists()
    # what it left behind is gone when it is tried again
    again = unit("b", "a", code="import os; assert not os.path.exists('b.out'); open('order.txt', 'a').write('b')")
    run(tmp_path, [unit("a"), again])
    assert order(tmp_path) == ["a", "b"]


@pytest.mark.parametrize("damage", ["empty mark", "other mark", "output gone"])
def test_a_damaged_unit_is_done_again(tmp_path, damage):
    run(tmp_path, [unit("a"), unit("b", "a")])
    if damage == "output gone":
        (tmp_path / "b.out").unlink()
    else:
        mark_of(tmp_path, "b").write_text("" if damage == "empty mark" else "[]")
    run(tmp_path, [unit("a"), unit("b", "a")])
    assert order(tmp_path) == ["a", "b", "b"]


def test_what_does_not_need_a_failed_unit_is_done_all_the_same(tmp_path):
    fails = unit("b", "a", code="raise SystemExit('the reason')")
    with pytest.raises(UnitFailed, match=r"(?s)b failed with status 1.*the reason.*2 units that need this"):
        run(tmp_path, [unit("d", "c"), unit("a"), fails, unit("c", "b"), unit("e", "a")], 1)
    assert order(tmp_path) == ["a", "e"]


DRIVER = """
import sys
from pathlib import Path
from pool import terminated_like_interrupted
from tests.study.test_pool import run, unit
with terminated_like_interrupted():
    run(Path(sys.argv[1]), [unit("a"), unit("b", "a", seconds=float(sys.argv[2])), unit("c", "b")], 1)
"""


def start_and_kill(root: Path, number: int, seconds: int = 6) -> None:
    """Sends a signal to a study while its second unit is under way for some seconds more."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])}
    process = subprocess.Popen([sys.executable, "-c", DRIVER, str(root), str(seconds)], env=environment)
    wait_for(lambda: (root / "order.txt").exists() and "b" in order(root))
    process.send_signal(number)
    process.wait(timeout=20)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_in_the_middle_it_stops_its_units_and_goes_on_there(tmp_path, number):
    start_and_kill(tmp_path, number, seconds=60)
    run(tmp_path, [unit("a"), unit("b", "a"), unit("c", "b")], 1)  # at once: nothing holds the folder
    assert order(tmp_path) == ["a", "b", "b", "c"]


@pytest.mark.slow
def test_killed_in_the_middle_it_goes_on_once_its_unit_has_ended(tmp_path):
    start_and_kill(tmp_path, signal.SIGKILL)
    # the unit that was under way still runs, and a second study must not write beside it
    with pytest.raises(ValueError, match="has not ended yet"):
        run(tmp_path, [])
    wait_for(lambda: not is_locked(tmp_path))
    run(tmp_path, [unit("a"), unit("b", "a"), unit("c", "b")], 1)
    assert order(tmp_path) == ["a", "b", "b", "c"]


def is_locked(root: Path) -> bool:
    try:
        with locked(root):
            return False
    except ValueError:
        return True


def wait_for(condition, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)
