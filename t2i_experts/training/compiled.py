"""What compiled code remembers for its backward pass, computed without compiling it.

torch.compile traces forward and backward as one graph and cuts it where the fewest bytes must be kept (its min-cut partitioner); what else
the backward pass needs, it computes again inside fused kernels, and temporaries are fused away. Here the same partitioner cuts the same
graph, on fake tensors, and no code is generated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch._functorch.aot_autograd import aot_function
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.fx import GraphModule

from t2i_experts.training.allocations import Allocations
from t2i_experts.types import Conditioning, Embedding

Inputs = tuple[Tensor, Tensor, Conditioning]


def compiled_activations(network: nn.Module, inputs: Callable[[], Inputs], precision: torch.autocast) -> int:
    """Bytes that a compiled denoiser takes at the worst moment of a step, beside its weights: all that is alive when the forward pass
    ends, and the largest temporary of the backward pass.

    network: with fake weights, under `FakeTensorMode`. inputs: makes x, sigma and conditioning; they count, too. It takes tens of seconds.
    """
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.fx_passes.joint_graph import joint_graph_passes

    temporaries: list[int] = []

    def forward(weights: dict[str, Any], x: Tensor, sigma: Tensor, embeddings: dict[str, tuple[Tensor, ...]]) -> Tensor:
        conditioning = Conditioning({name: Embedding(*tensors) for name, tensors in embeddings.items()})
        output: Tensor = torch.func.functional_call(network, weights, (x, sigma, conditioning))
        return output

    def partition(graph: GraphModule, joint_inputs: Sequence[Any], **settings: Any) -> tuple[GraphModule, GraphModule]:
        joint_graph_passes(graph)
        return min_cut_rematerialization_partition(graph, joint_inputs, compiler="inductor", **settings)

    def keep(gm: GraphModule, example_inputs: Sequence[Any]) -> Any:
        return make_boxed_func(gm.forward)

    def keep_backward(gm: GraphModule, example_inputs: Sequence[Any]) -> Any:
        made = (node.meta.get("val") for node in gm.graph.nodes if node.op == "call_function")
        temporaries.append(max((value.nbytes for value in made if isinstance(value, Tensor)), default=0))
        return keep(gm, example_inputs)

    traced = aot_function(
        forward, fw_compiler=keep, bw_compiler=keep_backward, partition_fn=partition, decompositions=select_decomp_table()
    )
    weights: dict[str, Any] = dict(network.named_parameters())

    def run() -> Tensor:
        x, sigma, conditioning = inputs()
        embeddings: dict[str, tuple[Tensor, ...]] = {
            name: (e.tokens, e.mask) if e.pooled is None else (e.tokens, e.mask, e.pooled) for name, e in conditioning.embeddings.items()
        }
        with precision:
            output: Tensor = traced(weights, x, sigma, embeddings)
        return output

    run()  # traces
    with Allocations() as allocations:
        output = run()
        alive = allocations.current
        del output
    return alive + max(temporaries, default=0)
