"""hpc_ddpm: Med-DDPM for clusters. Mask-conditioned 3-D brain MRI diffusion, trained and sampled at scale.

`load_model` and `generate` are the two functions a notebook needs; importing the package alone is light.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hpc_ddpm.sampling.generate import generate
    from hpc_ddpm.weights import load_model

__version__ = "0.1.0"
__all__ = ["__version__", "generate", "load_model"]

_LAZY = {"generate": "hpc_ddpm.sampling.generate", "load_model": "hpc_ddpm.weights"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'hpc_ddpm' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)
