"""Runs several calibrations in one process, which imports the host once.

Reads a JSON list of ``[recipe, overrides]`` from standard input. For each, prints a JSON line with the report, or with
the message of a ``ValueError``.
"""

import json
import os
import sys

import torch

from llamafactory_hera.calibration.run import calibrate_heads
from llamafactory_hera.integrations.llamafactory.calibration import read_calibration


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(1)
    for recipe, overrides in json.load(sys.stdin):
        try:
            answer = {"report": calibrate_heads(*read_calibration(recipe, overrides))}
        except ValueError as error:
            answer = {"error": str(error)}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
