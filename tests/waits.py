"""Counts, on a CPU, the calls that would make the program wait for a GPU, and finds their callers."""

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import llamafactory_hera
from llamafactory_hera.integrations.transformers import HeraTrainer
from llamafactory_hera.rivals import jarvis
from llamafactory_hera.teachers.cache import FeatureCache
from llamafactory_hera.training.collator import HeraCollator

_OURS = str(Path(llamafactory_hera.__file__).parent)
_HOSTS = ("/transformers/trainer.py", "/accelerate/", "/trl/")
_READS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique_dim", "_unique2", "bincount")
_BY_INDEX = ("index", "index_put", "index_put_")
_COPIES = (Tensor.tolist, Tensor.cpu, Tensor.numpy)
# The tensors of these functions are on the CPU even in a run on a GPU.
_ON_CPU = {f.__code__ for f in (HeraCollator.__call__, FeatureCache.put, jarvis.draw_blocks)}
_DRAWS = jarvis.Jarvis.prepare.__code__


class Waits(TorchDispatchMode):
    """While ``on``, counts calls that would wait for the device: ``ours`` by the package, ``host`` by the trainer."""

    def __init__(self) -> None:
        super().__init__()
        self.on = True
        self.ours: Counter[str] = Counter()
        self.host: Counter[str] = Counter()
        self._copies = _Copies(self._note)

    def __enter__(self) -> "Waits":
        self._copies.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._copies.__exit__(*error)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        masked = name in _BY_INDEX and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        if self.on and (name in _READS or masked):
            self._note(name)
        return function(*args, **(kwargs or {}))

    def _note(self, what: str) -> None:
        frame: Any = sys._getframe(2)
        places = []
        while frame is not None:
            code = frame.f_code
            if code in _ON_CPU or (not places and code is _DRAWS) or not self.on:
                return
            if code.co_filename.startswith(_OURS) or any(host in code.co_filename for host in _HOSTS):
                places.append((code.co_filename, frame.f_lineno, code.co_name))
            frame = frame.f_back
        file, line, name = places[0] if places else ("?", 0, "?")
        # the first pass of gradient caching runs the model, whose waits do not count as ours
        found = self.ours if file.startswith(_OURS) and name != HeraTrainer._collect.__name__ else self.host
        found[f"{file.removeprefix(_OURS + '/')}:{line} {name}: {what}"] += 1


class _Copies(TorchFunctionMode):
    """Counts copies to the CPU, which the dispatcher does not see if the tensor is already there."""

    def __init__(self, note: Callable[[str], None]) -> None:
        super().__init__()
        self._note = note

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # compared as a string, because here the model's device is also the CPU
        to_cpu = function is Tensor.to and any(isinstance(each, str) and each == "cpu" for each in args[1:])
        if function in _COPIES or (to_cpu and not kwargs.get("non_blocking")):
            self._note(getattr(function, "__name__", "to"))
        return function(*args, **kwargs)
