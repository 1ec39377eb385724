"""Made tests/golden/megatron: tiny jobs of megatron-core 0.16.1, each saved in the legacy layout and as torch_dist.

    torchrun --nproc-per-node RANKS make_megatron.py OUT TP PP EP bf16|fp32 swiglu|gelu

    4 ranks: tp2_pp2_bf16_swiglu 2 2 1 bf16 swiglu      2 ranks: tp2_fp32_gelu 2 1 1 fp32 gelu, ep2_bf16 1 1 2 bf16 gelu

Then OUT and OUT_dist go into OUT.tar.xz. megatron-core wants a GPU: what it puts on one is kept on the CPU here, and
its check of parameters' types in `core/optimizer/optimizer.py` ('torch.cuda.BFloat16Tensor') has to be told of the
CPU's. Nothing of this is needed to run the tests.
"""

import argparse
import os
import random
import sys
from importlib import import_module
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

LAYERS, HIDDEN, VOCABULARY, PADDED = 2, 8, 21, 24


class OnCpu(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        more = dict(kwargs or {})
        if str(more.get("device", "")).startswith("cuda"):
            more["device"] = "cpu"
        return func(*args, **more)


def core(module: str) -> Any:
    return import_module(f"megatron.core.{module}")


def main(out: str, tp: int, pp: int, ep: int, dtype: torch.dtype, gated: bool) -> None:
    torch.cuda.synchronize = lambda *_: None
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]
    dist.init_process_group("gloo")
    state = core("parallel_state")
    state.initialize_model_parallel(tp, pp, expert_model_parallel_size=ep)
    random.seed(3)
    np.random.seed(3)
    model, optimizer = made(state, tp, pp, ep, dtype, gated)
    args = argparse.Namespace(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        expert_model_parallel_size=ep,
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        padded_vocab_size=PADDED,
        vocab_size=VOCABULARY,
        swiglu=gated,
        params_dtype=dtype,
        world_size=dist.get_world_size(),
        iteration=10,
        use_distributed_optimizer=False,
    )
    common = {"args": args, "checkpoint_version": 3.0, "iteration": 10}
    save_ranks(f"{out}/iter_0000010", state, pp, ep, common, model, optimizer)
    sharded = model.sharded_state_dict()
    os.makedirs(f"{out}_dist/iter_0000010", exist_ok=True)
    dist.barrier()
    whole = {**common, "model": sharded, "optimizer": optimizer.sharded_state_dict({"model": sharded})}
    core("dist_checkpointing").save(whole, f"{out}_dist/iter_0000010")
    if dist.get_rank() == 0:
        for folder in (out, f"{out}_dist"):
            with open(f"{folder}/latest_checkpointed_iteration.txt", "w") as file:
                file.write("10")
    dist.barrier()


def made(state: Any, tp: int, pp: int, ep: int, dtype: torch.dtype, gated: bool) -> tuple[Any, Any]:
    """A model after one step. What ranks share they have the same of."""
    experts = {"num_moe_experts": 2 * ep, "expert_model_parallel_size": ep, "moe_token_dispatcher_type": "allgather"}
    config = core("transformer.transformer_config").TransformerConfig(
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        num_attention_heads=4,
        num_query_groups=2,
        ffn_hidden_size=12,
        use_cpu_initialization=True,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        pipeline_dtype=dtype,
        gated_linear_unit=gated,
        activation_func=torch.nn.functional.silu if gated else torch.nn.functional.gelu,
        add_bias_linear=not gated,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        **(experts if ep > 1 else {}),
    )
    layers = core("models.gpt.gpt_layer_specs").get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts, moe_grouped_gemm=False, normalization=None
    )
    model = (
        core("models.gpt.gpt_model")
        .GPTModel(
            config,
            layers,
            vocab_size=PADDED,
            max_sequence_length=4,
            pre_process=state.is_pipeline_first_stage(),
            post_process=state.is_pipeline_last_stage(),
            share_embeddings_and_output_weights=False,
        )
        .to(dtype)
    )
    stage, rank = state.get_pipeline_model_parallel_rank(), state.get_tensor_model_parallel_rank()
    shared, sliced, own = (
        torch.Generator().manual_seed(s) for s in (stage, 100 + 10 * stage + rank, 200 + dist.get_rank())
    )

    def drawn(name: str, parameter: Any) -> torch.Tensor:
        cut = getattr(parameter, "tensor_model_parallel", False)
        return torch.randn(parameter.shape, generator=own if ".experts." in name else sliced if cut else shared)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(drawn(name, parameter))
    parallel, settings = core("distributed"), core("optimizer")
    wrapped = parallel.DistributedDataParallel(
        config, parallel.DistributedDataParallelConfig(overlap_grad_reduce=False), model
    )
    chosen = settings.OptimizerConfig(
        optimizer="adam", lr=1e-3, weight_decay=0.1, bf16=config.bf16, params_dtype=dtype, clip_grad=0.0
    )
    optimizer = settings.get_megatron_optimizer(chosen, [wrapped])
    for name, parameter in model.named_parameters():
        parameter.main_grad.copy_(drawn(name, parameter))
    optimizer.step()
    return model, optimizer


def save_ranks(folder: str, state: Any, pp: int, ep: int, common: dict[str, Any], model: Any, optimizer: Any) -> None:
    """As megatron/training/checkpointing.py does with --ckpt-format torch."""
    place = f"{folder}/mp_rank_{state.get_tensor_model_parallel_rank():02d}"
    place += f"_{state.get_pipeline_model_parallel_rank():03d}" if pp > 1 else ""
    place += f"_{state.get_expert_model_parallel_rank():03d}" if ep > 1 else ""
    os.makedirs(place, exist_ok=True)
    random_state = {
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "rng_tracker_states": {},
    }
    tree = {
        **common,
        "model": model.state_dict_for_save_checkpoint(),
        "optimizer": optimizer.state_dict(),
        "opt_param_scheduler": {"max_lr": 1e-3, "num_steps": 10},
        "rng_state": [random_state],
        "num_floating_point_operations_so_far": 5,
    }
    torch.save(tree, f"{place}/model_optim_rng.pt")


if __name__ == "__main__":
    out, tp, pp, ep, precision, unit = sys.argv[1:]
    with OnCpu():
        main(out, int(tp), int(pp), int(ep), torch.bfloat16 if precision == "bf16" else torch.float32, unit == "swiglu")
