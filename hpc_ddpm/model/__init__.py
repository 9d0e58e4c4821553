"""The 3-D U-Net: plain modules that know nothing of ranks."""

from hpc_ddpm.model.unet3d import UNet3d, build_unet

__all__ = ["UNet3d", "build_unet"]
