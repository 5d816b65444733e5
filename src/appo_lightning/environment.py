"""What is installed beside us and would break imports with a message that nobody understands."""

from __future__ import annotations

from importlib import metadata

from appo_lightning.errors import ConfigurationError

_CUDA_COMPANIONS = ("torchvision", "torchaudio", "torchcodec")


def check_environment() -> None:
    """Refuse CUDA builds of torch's companions beside a CPU build of torch: transformers would not import.

    Raises:
        ConfigurationError: names what to uninstall.
    """
    torch_version = _version("torch")
    if torch_version is None or not torch_version.endswith("+cpu"):
        return
    broken = [name for name in _CUDA_COMPANIONS if not (_version(name) or "+cpu").endswith("+cpu")]
    if broken:
        raise ConfigurationError(
            f"{', '.join(broken)} beside torch {torch_version} are CUDA builds and break transformers' imports: "
            f"pip uninstall {' '.join(broken)}"
        )


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
