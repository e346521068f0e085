"""Runs calibrations one after the other in one process, so that no case pays for the imports.

Reads a JSON list of ``[recipe, overrides, control]`` from standard input; prints for each a JSON line: the reports, or
the message of its ``ValueError``.
"""

import json
import os
import sys

import torch

from llamafactory_hera.integrations.llamafactory.commands import calibrate


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(1)
    for recipe, overrides, control in json.load(sys.stdin):
        try:
            answer = {"reports": calibrate(recipe, overrides, control)}
        except ValueError as error:
            answer = {"error": str(error)}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
