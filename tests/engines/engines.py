"""Wraps models with the engines' own APIs, runs backward passes, and reads unsharded gradients."""

from collections.abc import Callable

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer
from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer

_LAYERS = (Qwen3DecoderLayer, SiglipEncoderLayer)

# DeepSpeed's shared-memory reduction for CPUs is compiled on first use, which takes minutes. Without it, DeepSpeed
# reduces through torch.distributed, as on GPUs.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


class Engine:
    """Wraps a model, which ``forward`` runs, and accumulates the gradients of ``n_micro`` backward passes."""

    model: nn.Module
    forward: Callable[..., object]

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def gradients(self) -> dict[str, Tensor]:
        """Returns unsharded gradients of the trainable parameters by the model's names; every rank must call it."""
        raise NotImplementedError

    def clear(self) -> None:
        """Clears the gradients and keeps the weights."""
        self.model.zero_grad(set_to_none=True)


class DDP(Engine):
    static_graph = False

    def __init__(self, model: nn.Module, n_micro: int) -> None:
        self.model = model
        self.forward = DistributedDataParallel(model, static_graph=self.static_graph)

    def gradients(self) -> dict[str, Tensor]:
        return {name: p.grad.clone() for name, p in self.model.named_parameters() if p.requires_grad}


class StaticDDP(DDP):
    static_graph = True


class FSDP1(Engine):
    def __init__(self, model: nn.Module, n_micro: int) -> None:
        self.forward = self.model = FullyShardedDataParallel(
            model, auto_wrap_policy=ModuleWrapPolicy(_LAYERS), use_orig_params=True, device_id=torch.device("cpu")
        )

    def gradients(self) -> dict[str, Tensor]:
        with FullyShardedDataParallel.summon_full_params(self.model, with_grads=True):
            return {
                name.replace("_fsdp_wrapped_module.", ""): p.grad.clone()
                for name, p in self.model.named_parameters()
                if p.requires_grad
            }


class FSDP2(Engine):
    def __init__(self, model: nn.Module, n_micro: int) -> None:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for module in model.modules():
            if isinstance(module, _LAYERS):
                fully_shard(module, mesh=mesh)
        self.forward = self.model = fully_shard(model, mesh=mesh)

    def gradients(self) -> dict[str, Tensor]:
        return {name: p.grad.full_tensor() for name, p in self.model.named_parameters() if p.requires_grad}


class ZeRO(Engine):
    stage: int

    def __init__(self, model: nn.Module, n_micro: int) -> None:
        trainable = [p for p in model.parameters() if p.requires_grad]
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": n_micro,
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": trainable[0].dtype == torch.bfloat16},
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": {
                "stage": self.stage,
                "reduce_bucket_size": 4096,
                "stage3_param_persistence_threshold": 0,
                "stage3_prefetch_bucket_size": 4096,
            },
        }
        optimizer = torch.optim.SGD(trainable, lr=0.0)
        self.model = model
        self.forward, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)

    def backward(self, loss: Tensor) -> None:
        self.forward.backward(loss, scale_wrt_gas=False)
        if not self.forward.is_gradient_accumulation_boundary():
            self.forward.step()  # counts the micro-batch

    def gradients(self) -> dict[str, Tensor]:
        return {name: safe_get_full_grad(p).clone() for name, p in self.model.named_parameters() if p.requires_grad}

    def clear(self) -> None:
        self.forward.step()  # the learning rate is 0


class ZeRO2(ZeRO):
    stage = 2


class ZeRO3(ZeRO):
    stage = 3


ENGINES: dict[str, type[Engine]] = {
    "DDP": DDP,
    "DDP, static": StaticDDP,
    "ZeRO-2": ZeRO2,
    "ZeRO-3": ZeRO3,
    "FSDP1": FSDP1,
    "FSDP2": FSDP2,
}
