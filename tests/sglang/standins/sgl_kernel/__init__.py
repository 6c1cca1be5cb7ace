"""Stands for the package sgl_kernel, of which there are wheels with CUDA only, in an SGLang server on a CPU.

Dense Llama and Qwen models with `--attention-backend torch_native` call none of its kernels: every name is there, and fails when called.
And SGLang 0.5.23 tells NIXL that its KV lies on a GPU; here it must hear that it does not.
"""

import functools
from collections.abc import Callable

__version__ = "0.4.10"


def __getattr__(name: str) -> Callable[..., None]:
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*args: object, **kwargs: object) -> None:
        raise NotImplementedError(f"sgl_kernel.{name} is a stand-in without a kernel")

    return missing


def _nixl_reads_host_memory() -> None:
    try:
        from nixl._api import nixl_agent
    except ImportError:
        return

    def on_host(value: object) -> object:
        return "DRAM" if isinstance(value, str) and value == "VRAM" else value

    def wrapped(method: Callable[..., object]) -> Callable[..., object]:
        @functools.wraps(method)
        def call(*args: object, **kwargs: object) -> object:
            return method(*map(on_host, args), **{name: on_host(value) for name, value in kwargs.items()})

        return call

    for name in ("register_memory", "get_reg_descs", "get_xfer_descs", "prep_xfer_dlist", "make_connection"):
        setattr(nixl_agent, name, wrapped(getattr(nixl_agent, name)))


_nixl_reads_host_memory()
