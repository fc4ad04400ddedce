"""What a computation is compiled for."""

import jax


def target_platform() -> str:
    """The platform that is compiled for: that of the abstract mesh in use, if it names one, else of JAX's default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:
        if device.device_kind.startswith("NVIDIA"):  # the platform of real GPUs is "gpu", whosever they are
            return "cuda"
        return getattr(device, "platform", device.device_kind)  # jax 0.9 has the kind alone, which is "cpu" for a CPU
    device = _default_device()
    is_cuda = device.platform == "gpu" and "cuda" in device.client.platform_version.lower()
    return "cuda" if is_cuda else device.platform


def target_device() -> str:
    """The kind of device that is compiled for, such as "NVIDIA H100 80GB HBM3"."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return (device or _default_device()).device_kind


def _default_device() -> jax.Device:
    device = jax.config.jax_default_device  # type: ignore[attr-defined]
    return device if isinstance(device, jax.Device) else jax.devices(device)[0]
