"""Every bench runs: two rounds of each, at the smallest size."""

import sys
from pathlib import Path

import pytest

from tests.e2e.runner import ROOT, run_command

BENCHES = {
    "overhead": "overhead.py {root}/recipes/demo/hera.yaml hera_heads=L1H0,L0H2 --rounds 2 --row",
    "overhead, a script": "overhead.py {root}/recipes/transformers/sft_vlm_hera.py --heads=L1H0,L0H2 --rounds 2",
    "cache": "cache.py --images 20000 --dim 8 --seconds 0.2 --readers 2",
    "calibrate": "calibrate.py --rounds 2 --samples 8 --held-out 4 --probes 1 --text-tokens 8 --threads 1",
    "flops": "flops.py qwen2_5_3b --text 8",
    "memory": "memory.py {root}/recipes/demo/hera.yaml --epochs 0.05",
    "mknn": "mknn.py --rounds 2 --layers 2 --heads 4 --samples 32 --dim 64 --head-dim 16 -k 3 --naive-heads 4",
    "selection": "selection.py --rounds 2 --samples 16 --dim 128 --head-dim 16 --layers 2 --threads 1",
    "start": "start.py --rounds 2",
}


@pytest.mark.slow
@pytest.mark.parametrize("bench", BENCHES)
def test_it_runs_two_rounds(world: Path, bench: str) -> None:
    script, *options = BENCHES[bench].format(root=ROOT).split()
    code, output = run_command([sys.executable, str(ROOT / "tests/bench" / script), *options], world, timeout=600)
    assert code == 0, output
