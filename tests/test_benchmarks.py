"""Every benchmark runs at its smallest size."""

import pytest

from tests.e2e.runner import ROOT

BENCHES = {
    "overhead": "overhead.py {root}/recipes/demo/hera.yaml hera_heads=L1H0,L0H2 --rounds 1",
    "cache": "cache.py --images 20000 --dim 8 --seconds 0.2 --readers 1",
    "mknn": "mknn.py --rounds 1 --layers 2 --heads 4 --samples 32 --dim 64 --head-dim 16",
    "selection": "selection.py --rounds 1 --samples 16 --dim 128 --threads 1",
    "start": "start.py --rounds 1",
}


@pytest.mark.slow
@pytest.mark.parametrize("bench", BENCHES)
def test_the_benchmark_runs(server, world, bench):
    script, *options = BENCHES[bench].format(root=ROOT).split()
    code, output = server.script(ROOT / "benchmarks" / script, *options, cwd=world)
    assert code == 0, output
