"""One process for each device, started as the host starts its training."""

import os
import subprocess
import sys


def relaunched() -> int | None:
    """Runs this command again under torchrun when several devices are there, or ``FORCE_TORCHRUN`` asks for it.

    The host's environment variables are read: ``FORCE_TORCHRUN``, ``NPROC_PER_NODE``, ``NNODES``, ``NODE_RANK``,
    ``MASTER_ADDR`` and ``MASTER_PORT``.

    Returns:
        The exit status of the launch; None when this process should go on itself.
    """
    import torch

    if "LOCAL_RANK" in os.environ:  # a launcher started this process
        return None
    n_devices = torch.accelerator.device_count()
    forced = os.environ.get("FORCE_TORCHRUN", "0").lower() in ("true", "y", "1")
    if not forced and n_devices <= 1:
        return None
    environment = os.environ
    options = [f"--nproc-per-node={environment.get('NPROC_PER_NODE', max(1, n_devices))}"]
    if "MASTER_ADDR" in environment or "NNODES" in environment:
        options += [
            f"--nnodes={environment.get('NNODES', 1)}",
            f"--node-rank={environment.get('NODE_RANK', 0)}",
            f"--master-addr={environment.get('MASTER_ADDR', '127.0.0.1')}",
            f"--master-port={environment.get('MASTER_PORT', 29500)}",
        ]
    else:
        options.append("--standalone")
    command = [sys.executable, "-m", "torch.distributed.run", *options, "-m", "llamafactory_hera.cli", *sys.argv[1:]]
    return subprocess.run(command, check=False).returncode
