"""The command line: a table of verbs. A verb is a function with a dataclass of settings, imported when used."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from cyclopts import App, CycloptsError
from cyclopts.config import Yaml

import histosynth
from histosynth.core.errors import HistosynthError, SettingError, did_you_mean

VERBS = {
    "demo": (
        "histosynth.study.demo:demo",
        "The main job on built-in data: GAN against diffusion, with a report.",
    ),
    "compare": ("histosynth.study.compare:compare", "The main job on your tiles: do synthetic tiles help?"),
    "tiles import": (
        "histosynth.study.verbs.tiles:import_",
        "Import class folders, a table, or an archive of them as a tile set.",
    ),
    "tiles download": ("histosynth.study.verbs.download:download", "Download public tiles; lists them without a name."),
    "tiles prepare": (
        "histosynth.study.verbs.prepare:prepare_",
        "Filter, split, normalise and resize tiles for training.",
    ),
    "tiles cut": ("histosynth.study.verbs.cut:cut_", "Cut whole-slide images into a tile set."),
    "tiles quality": ("histosynth.study.verbs.quality:quality", "What the quality filter would reject, and why."),
    "tiles overview": ("histosynth.study.verbs.overview:overview", "One page about a tile set, with leakage probes."),
    "tiles export": ("histosynth.study.verbs.export:export", "Write a tile set as a dataset_tool zip for StyleGAN."),
    "tiles phantom": ("histosynth.study.verbs.tiles:phantom", "Simulate the tiles of a hospital."),
    "train gan": ("histosynth.study.verbs.train:train_gan", "Train or fine-tune the GAN on a tile set."),
    "train diffusion": (
        "histosynth.study.verbs.train:train_diffusion",
        "Train or fine-tune the diffusion model.",
    ),
    "train classifier": (
        "histosynth.study.verbs.train_classifier:train_classifier",
        "Train and calibrate a classifier.",
    ),
    "train base": ("histosynth.study.base:train_base", "Train the shipped base weights on simulated tissue."),
    "generate": (
        "histosynth.study.verbs.generate:generate",
        "Make synthetic tiles with a trained generator.",
    ),
    "restain": (
        "histosynth.study.verbs.restain:restain",
        "Stain real tiles anew with a diffusion model; the layout stays.",
    ),
    "pixcell": (
        "histosynth.study.verbs.pixcell:pixcell",
        "Draw tiles from real training tiles with PixCell, without training.",
    ),
    "evaluate": (
        "histosynth.study.verbs.evaluate:evaluate",
        "Fidelity, diversity and copies of synthetic tiles.",
    ),
    "utility": (
        "histosynth.study.verbs.utility:utility",
        "Do synthetic tiles help a classifier? The whole experiment, with its page.",
    ),
    "calibrate": (
        "histosynth.study.verbs.calibrate:calibrate",
        "Calibrate a classifier's predictions; sets with a stated coverage.",
    ),
    "explore": ("histosynth.study.verbs.explore:explore", "Draw what a GAN has learnt: sheets and films."),
    "denoising": (
        "histosynth.study.verbs.denoising:denoising",
        "Draw how a diffusion model makes tiles: a timeline and a film.",
    ),
    "project": ("histosynth.study.verbs.project:project", "Find the latent codes of tiles (GAN inversion)."),
    "convert": (
        "histosynth.study.verbs.convert:convert",
        "Read or write a network of NVIDIA's StyleGAN; export a classifier.",
    ),
    "app": ("histosynth.app.launch:app", "Look at reports and tile sets in the browser."),
    "encoders": ("histosynth.study.verbs.lists:encoders", "List the encoders, or fetch weights."),
    "generators": ("histosynth.study.verbs.lists:generators", "List the generator families."),
    "doctor": ("histosynth.study.verbs.doctor:doctor", "Say what works on this machine and what is missing."),
}
GROUPS = {
    "tiles": "Tile sets: download, import, cut, check, prepare, export, simulate.",
    "train": "Train generators and classifiers.",
}


def build_app() -> App:
    """The command-line application; nothing behind a verb is imported."""
    app = App(
        name="histosynth",
        help="Synthetic histology tiles from a GAN and a diffusion model, and whether they help.",
        version=histosynth.__version__,
        help_format="plaintext",
        result_action="return_value",
        suppress_keyboard_interrupt=False,
    )
    groups = {name: App(name=name, help=text) for name, text in GROUPS.items()}
    for group in groups.values():
        app.command(group)
    for verb, (target, text) in VERBS.items():
        *parent, name = verb.split()
        (groups[parent[0]] if parent else app).command(target, name=name, help=text)
    return app


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one verb; exit code 2 for what the user can mend, 130 after Ctrl-C."""
    tokens = list(sys.argv[1:] if arguments is None else arguments)
    app = build_app()
    try:
        tokens = _take_config(app, tokens)
        app(tokens, exit_on_error=False, print_error=True)
    except CycloptsError:
        sys.exit(2)  # cyclopts has printed what is wrong and the nearest name
    except HistosynthError as error:
        print(f"histosynth: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nhistosynth: stopped. Repeat the same command to go on from here.", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        from histosynth.core.files import explain_os_error

        print(
            f"histosynth: {explain_os_error(error, error.filename or 'A file operation failed')}",
            file=sys.stderr,
        )
        sys.exit(2)


def _take_config(app: App, tokens: list[str]) -> list[str]:
    """Take `--config FILE` (or the name of a preset) out of the tokens and make it the defaults."""
    for position, token in enumerate(tokens):
        name, equals, value = token.partition("=")
        if name != "--config":
            continue
        length = 1 if equals else 2
        if not equals:
            if position + 1 == len(tokens):
                raise SettingError("--config has no value.", "Give a YAML file or the name of a preset.")
            value = tokens[position + 1]
        app.config = (Yaml(_config_path(value), must_exist=True, use_commands_as_keys=False),)
        return tokens[:position] + tokens[position + length :]
    return tokens


def _config_path(value: str) -> Path:
    if Path(value).is_file():
        return Path(value)
    folder = Path(__file__).parent / "presets"
    presets = {str(p.relative_to(folder).with_suffix("")): p for p in folder.rglob("*.yaml")}
    if value not in presets:
        raise SettingError(f"--config is {value!r}, neither a file nor a preset.", did_you_mean(value, presets))
    return presets[value]
