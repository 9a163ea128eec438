"""Compiling functions with `torch.compile`, and how often that happened.

What is compiled serves all modules of one structure: their parameters are inputs of the graph. A graph is compiled for a
shape, and when a second one comes for any size in what differs; and anew for what changes its code, such as whether its
input wants a gradient.
"""

import os
import shutil
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from utils.errors import UserError

# torch goes on without compiling, with a warning alone, once a function has this many variants. Adapted or not, with and
# without gradients, one sample and several, a timestep per sample and one per frame, a first and any other shape: more than its 8.
_MAX_VARIANTS = 64
_CPP_COMPILERS = ("g++", "clang++", "c++")
_C_COMPILERS = ("gcc", "clang", "cc")

Function = TypeVar("Function", bound=Callable[..., Any])
_num_graphs = 0


def graphs_compiled() -> int:
    """How many graphs this process has compiled so far."""
    return _num_graphs


def compiled(function: Function) -> Function:
    """`function`, compiled by TorchInductor when it is called. Its tensors and modules are to be its arguments.

    The first call of each variant takes seconds to minutes. Numbers differ from those of the function itself in their
    rounding: operations are fused, and what is fused stays in float32.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MAX_VARIANTS)
    return torch.compile(function, backend=_compile)  # type: ignore[return-value]


def _compile(graph: torch.fx.GraphModule, inputs: Sequence[torch.Tensor]) -> Callable[..., Any]:
    global _num_graphs
    from torch._inductor.compile_fx import compile_fx

    _num_graphs += 1
    made: Any = compile_fx(graph, inputs)
    return made


def check_compiler(device: torch.device, key: str) -> None:
    """TorchInductor writes C++ for a CPU; for a GPU Triton, which needs a C compiler once for each machine.

    Raises:
        UserError: what it needs is not there; `key` is the option that asked for it.
    """
    on_gpu = device.type == "cuda"
    candidates, variable = (_C_COMPILERS, "CC") if on_gpu else (_CPP_COMPILERS, "CXX")
    chosen = os.environ.get(variable)
    if not any(shutil.which(name) for name in ((chosen,) if chosen else candidates)):
        language = "C" if on_gpu else "C++"
        given = (
            f"{variable} = {chosen} is none" if chosen else f"none of {', '.join(candidates)} is on the PATH"
        )
        raise UserError(
            f"{key}: is true, which needs a {language} compiler on this {'GPU' if on_gpu else 'CPU'}, and {given}. "
            f"Install one, or write {key} = false"
        )
    if on_gpu:
        from torch.utils._triton import has_triton

        if not has_triton():
            raise UserError(
                f"{key}: is true, which needs the package triton for this GPU, and it cannot be imported or does not know "
                f"the GPU. Install the CUDA build of torch, which brings it along, or write {key} = false"
            )
