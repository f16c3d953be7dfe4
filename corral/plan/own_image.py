"""The image that a site builds itself (gpu-server/Dockerfile): llama.cpp where no stock image has the right code."""

from __future__ import annotations

# Of llama.cpp; marks the tags of upstream's images, too. components/llama/flags.yaml has its flags.
BUILD = "b11347"
NAME = "corral-llama"
# llama.cpp's commit of that build; the Dockerfile fetches it.
COMMIT = "5fc4f3c8c7103ffd0b7ff5ee4855bcc78a3ed5cd"
FOLDER = "gpu-server"
# CUDA 12 compiles for cards from Maxwell on, 11 for those of the later Kepler.
CUDA12_FLOOR, CUDA11_FLOOR = (5, 0), (3, 5)
# What cards before Maxwell take.
CUDA11 = ("CUDA_VERSION=11.8.0", "CUDA_UBUNTU=22.04")

# LocalAI with its backend in the image (gpu-server/image/Dockerfile).
PICTURES = "corral-localai"

Capability = tuple[int, int]


def tag(capability: Capability | None = None) -> str:
    """The image's name for a card of that compute capability, or for the processor."""
    return f"{NAME}:{'cpu' if capability is None else f'cuda-{_digits(capability)}'}-{BUILD}"


def build_command(capability: Capability | None = None) -> str:
    """What to type in the checkout to build it: for such a card, or for any x86-64 processor, AVX or not."""
    arguments: list[str] = []
    if capability is not None:
        arguments = ["BACKEND=cuda", f"CUDA_ARCH={_digits(capability)}"]
        arguments += CUDA11 if capability < CUDA12_FLOOR else ()
    words = [word for argument in arguments for word in ("--build-arg", argument)]
    return " ".join(["docker build -t", tag(capability), *words, FOLDER])


def has_backend(image: str) -> bool:
    """Whether an image of LocalAI brings its backend, so that nothing is fetched when it starts."""
    return image.partition("@")[0].rpartition("/")[2].partition(":")[0] == PICTURES


def pictures_command(image: str, name: str = "diffusers") -> str:
    """What to type in the checkout to put a backend into one of LocalAI's own images."""
    tag = image.partition("@")[0].rpartition(":")[2]
    kind = tag.replace("-gpu-hipblas", "-gpu-rocm-hipblas") if "-gpu-" in tag else f"{tag}-cpu"
    made = tag if name == "diffusers" else f"{tag}-{name}"
    kind = kind.replace("-gpu-intel", "-gpu-intel-sycl-f16") if name != "diffusers" else kind
    backend = f"quay.io/go-skynet/local-ai-backends:{kind}-{name}"
    words = f"--build-arg LOCALAI={image} --build-arg BACKEND={backend}"
    words += "" if name == "diffusers" else f" --build-arg NAME={name}"
    return f"docker build -t {PICTURES}:{made} {words} {FOLDER}/image"


def is_own(image: str) -> bool:
    """Whether an image is one of these, whose CUDA version and code only its builder knows."""
    return image.rpartition("/")[2].partition(":")[0] == NAME


def _digits(capability: Capability) -> str:
    return "".join(map(str, capability))
