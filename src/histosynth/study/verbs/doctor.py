"""The verb that says what works on this machine and what is missing."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from histosynth.core.types import EncoderCard
from histosynth.study.verbs.show import print_table

_LIBRARIES = {  # importable name: (package, what it is for)
    "timm": ("timm", "the encoders uni, uni2-h, virchow2, h-optimus-0, phikon-v2, dinov2, pathoduet"),
    "transformers": ("transformers", "the encoder clip"),
    "torchvision": ("torchvision", "the classifier, inception-v3, LPIPS"),
    "lpips": ("lpips", "LPIPS"),
    "diffusers": ("diffusers", "the diffusion model"),
    "openslide": ("openslide-python openslide-bin", "whole slides"),
    "tifffile": ("tifffile", "slides and tiles in TIFF"),
    "streamlit": ('"histosynth[app]"', "the browser pages (histosynth app)"),
}
_LITTLE_MEMORY = 4e9
_LITTLE_DISK = 5e9


@dataclass(frozen=True)
class Finding:
    """One line of the table."""

    what: str
    state: str
    """ok, missing, absent (needed for some jobs only), or look (it works, with a catch)."""
    detail: str
    remedy: str = ""


def doctor() -> None:
    """Say what works on this machine, what is missing, and what to do about it."""
    found = [*_system(), *_devices(), *_libraries(), _slides(), *_folders(), *_weights()]
    print_table(["what", "state", "detail"], [[f.what, f.state, f.detail] for f in found])
    remedies = [f"{f.what}: {f.remedy}" for f in found if f.remedy]
    if remedies:
        from rich.console import Console

        # not in the table, where commands would be broken into lines
        text = "\n".join(["What you can do (weights are only needed for the encoders that you use):", *remedies])
        Console().print(text, markup=False, highlight=False, soft_wrap=True)


def _system() -> list[Finding]:
    import histosynth

    found = [
        Finding("histosynth", "ok", f"{histosynth.__version__}, {Path(histosynth.__file__).parent}"),
        Finding("Python", "ok", f"{platform.python_version()} ({sys.executable}), {platform.platform(terse=True)}"),
    ]
    memory = _memory()
    if memory is not None:
        total, free = memory
        little = free < _LITTLE_MEMORY
        remedy = "Close other programs, or use smaller tiles and batches." if little else ""
        state = "look" if little else "ok"
        found.append(Finding("memory", state, f"{free / 1e9:.1f} GB free of {total / 1e9:.1f} GB", remedy))
    return found


def _memory() -> tuple[int, int] | None:
    """(total, free) bytes, or None where the system does not say."""
    if find_spec("psutil") is not None:
        import psutil

        memory = psutil.virtual_memory()
        return memory.total, memory.available
    try:
        page = os.sysconf("SC_PAGE_SIZE")
        return page * os.sysconf("SC_PHYS_PAGES"), page * os.sysconf("SC_AVPHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _devices() -> list[Finding]:
    if find_spec("torch") is None:
        return [Finding("torch", "missing", "nothing works without it", "pip install torch torchvision")]
    try:
        import torch
    except (ImportError, OSError) as error:
        remedy = "Install it again: https://pytorch.org/get-started/locally"
        return [Finding("torch", "missing", f"it does not load: {error}", remedy)]
    from histosynth.core.device import describe_device, pick_device

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = torch.get_num_threads()
    few = threads < cores
    found = [
        Finding("torch", "ok", torch.__version__),
        Finding(
            "threads",
            "look" if few else "ok",
            f"torch uses {threads} of {cores} cores",
            "Unset OMP_NUM_THREADS, or set it to the number of cores." if few else "",
        ),
    ]
    device = pick_device()
    detail = describe_device(device)
    if device.type == "cuda":
        detail += f", {torch.cuda.mem_get_info(device)[0] / 1e9:.1f} GB free"
    elif torch.version.cuda is None and _has_nvidia():
        remedy = "Install the CUDA build of torch: https://pytorch.org/get-started/locally"
        return [*found, Finding("device", "look", f"{detail}; this torch cannot use the NVIDIA card here", remedy)]
    return [*found, Finding("device", "ok", detail)]


def _has_nvidia() -> bool:
    return Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None


def _libraries() -> list[Finding]:
    found = []
    for module, (package, purpose) in _LIBRARIES.items():
        if find_spec(module) is None:
            found.append(Finding(module, "missing", f"for {purpose}", f"pip install {package}"))
        else:
            found.append(Finding(module, "ok", _version(package.split()[0])))
    return found


def _version(package: str) -> str:
    try:
        return version(package.strip('"'))
    except PackageNotFoundError:  # importable without being installed, from a folder on the path
        return "installed"


def _slides() -> Finding:
    """Whether the library behind openslide loads; the Python package alone says nothing."""
    remedy = "pip install openslide-bin (or the system's openslide); TIFF slides work without it."
    if find_spec("openslide") is None:
        return Finding("slide reading", "missing", "openslide is not installed", remedy)
    try:
        import openslide
    except (ImportError, OSError) as error:
        return Finding("slide reading", "missing", f"openslide does not load: {error}", remedy)
    return Finding("slide reading", "ok", f"OpenSlide {openslide.__library_version__}")


def _folders() -> list[Finding]:
    from histosynth.encoders.weights import folder, hub_folder, hugging_face_folder

    places = {
        "this folder": Path.cwd(),
        "weights folder": folder(),
        "torch hub cache": hub_folder(),
        "Hugging Face cache": hugging_face_folder(),
    }
    found = []
    for name, path in places.items():
        there = next(p for p in (path, *path.parents) if p.exists())
        writable = os.access(there, os.W_OK)
        free = shutil.disk_usage(there).free
        detail = f"{path}{'' if path.exists() else ' (not made yet)'}, {free / 1e9:.1f} GB free"
        remedy = ""
        if not writable:
            remedy = "You may not write there" + (
                "; set HISTOSYNTH_WEIGHTS to another folder." if name == "weights folder" else "."
            )
        elif free < _LITTLE_DISK:
            remedy = "That disk is nearly full."
        found.append(Finding(name, "look" if remedy else "ok", detail, remedy))
    return found


def _weights() -> list[Finding]:
    from histosynth.diffusion.pixcell import CARDS
    from histosynth.encoders import cards
    from histosynth.encoders.lpips import BACKBONES
    from histosynth.encoders.weights import find

    known = [*(card for card in cards() if card.weights and not card.shared_with), *BACKBONES.values(), *CARDS.values()]
    return [_weights_of(card, find(card)) for card in known]


def _weights_of(card: EncoderCard, path: Path | None) -> Finding:
    from histosynth.encoders.weights import find_named, folder, variable

    what = f"weights: {card.name}"
    if path is not None:
        return Finding(what, "ok", "shipped" if card.weights == "shipped" else str(path))
    how = card.how.format(folder=folder(), name=card.name)
    named = find_named(card)
    if named is not None:
        return Finding(what, "missing", f"{variable(card.name)} names {named}, which is not there", how)
    terms = card.licence + (", gated" if card.gated else "") + ("" if card.commercial else ", not commercial")
    return Finding(what, "absent" if card.optional else "missing", f"{card.weights} ({terms})", how)
