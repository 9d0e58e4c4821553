"""Whatever stands in an override, a settings file or a profile: it is taken, or refused in one line, soon.

HPC_DDPM_MUTATIONS=20000 tries that many of each; HPC_DDPM_MUTATION_SEED=N other ones. A failure names its input.
"""

from __future__ import annotations

import os
import random
import resource
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from hpc_ddpm.config import config_from_dict, load_config, presets_dir
from hpc_ddpm.errors import ConfigError
from hpc_ddpm.text import LONGEST, has_control
from launch.executor import Request, batch_script
from launch.profiles import load_profile

TRIES = int(os.environ.get("HPC_DDPM_MUTATIONS", "100"))
SEED = int(os.environ.get("HPC_DDPM_MUTATION_SEED", "0"))
LONGEST_S, MOST_MIB = 20.0, 512
"""Processor time in seconds for one input, and memory in MiB for all; honest inputs take milliseconds."""

PIECES = [
    *(
        "[",
        "]",
        "{",
        "}",
        ":",
        ": ",
        ",",
        "#",
        "&a ",
        "*a",
        "<<: ",
        "- ",
        "? ",
        "|\n",
        ">",
        "'",
        '"',
        "`",
        "@",
        "%",
        "!",
        "=",
    ),
    *(
        "!!int ''",
        "!!float x",
        "!!binary x",
        "!!python/name:os.system",
        "!!set",
        "---\n",
        "...\n",
        "\n",
        "\t",
        "\r",
        " ",
        ".",
    ),
    *(
        "null",
        "~",
        "true",
        "yes",
        ".inf",
        "-.nan",
        "1e400",
        "1e-400",
        "0x" + "f" * 30,
        "9" * 19,
        "9" * 5000,
        "-1",
        "0",
        "0o7",
    ),
    *(
        "2020-01-01",
        "1:30:00",
        "é",
        "日",
        "\x00",
        "\x1b[2J",
        "\u2028",
        "\ufeff",
        "\ud800",
        "$(x)",
        ";",
        "../",
        "x" * 300,
    ),
    *(
        "&a [*a]",
        "{<<: *a}",
        "[" * 40,
        "{a: " * 40,
        "name",
        "data",
        "size",
        "labels.names.1",
        "covariates.a.mean",
        "0",
        "extends: ",
    ),
]
OVERRIDES = [
    *("data.labels.names.1=brain", "data.size.0=64", "data.size=32,32,48", "data.covariates.age.mean=50", "seed=3"),
    *("data.covariates={age: {mean: 50, std: 15}}", "data.modalities=[t1, t2]", "model.channel_multipliers=1,2,4"),
    *("training.learning_rate=1e-4", "data.hooks=[[n4, '{image}', '{output}']]", "data.path=/data/a, b", "name=x"),
    *("training.profile_steps.1=4", "sampling.guidance_interval=0.1,0.9", "sampling.output.formats=nifti,bids"),
    *(
        "data.labels.remap={4: 3}",
        "data.voxel_size_mm=1,1,1",
        "model.head_channels=null",
        "augment.flip_probability.0=1",
    ),
]
PROFILE = """\
executor: slurm
partition: gpu  # of the site
time: 1-00:00:00
memory_per_gpu: 60G
setup: ["source venv/bin/activate"]
environment: &a {NCCL_SOCKET_IFNAME: ib0, N: 1}
sbatch: {reservation: course, exclusive: true}
"""


def mutants(originals: Sequence[str], count: int) -> list[str]:
    chance = random.Random(SEED)
    return [_mutant(chance, originals) for _ in range(count)]


def _mutant(chance: random.Random, originals: Sequence[str]) -> str:
    text = chance.choice(originals)
    for _ in range(chance.choice((1, 1, 2, 3, 8))):
        begin = chance.randrange(len(text) + 1)
        end = min(len(text), begin + chance.choice((0, 0, 1, 4, 30)))
        other = chance.choice(originals)
        middle = chance.choice(
            (chance.choice(PIECES), chance.choice(PIECES), text[begin:end] * 3, other[begin:end], "")
        )
        text = text[:begin] + middle + text[end:]
    return text


def refusals(take: Callable[[str], object], texts: Sequence[str]) -> int:
    """How many were refused, each as it should be."""
    refused, before = 0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for text in texts:
        began = time.process_time()
        try:
            take(text)
        except ConfigError as error:
            message = str(error)
            assert not has_control(message), f"{text!r}: {message!r}"
            assert 10 < len(message) <= LONGEST + 200, f"{text!r}: {len(message)} long"
            refused += 1
        except BaseException:
            print(f"the input was {text!r}")
            raise
        assert time.process_time() - began < LONGEST_S, repr(text)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + MOST_MIB * 1024
    return refused


def take_override(text: str) -> None:
    config = load_config("brats_192", [text]).config
    assert config_from_dict(config.dump(), "stored") == config


@pytest.mark.timeout(600 + TRIES)
def test_overrides() -> None:
    texts = mutants(OVERRIDES, 3 * TRIES)
    assert refusals(take_override, OVERRIDES) == 2  # age without its std, and a part of null
    assert 0 < refusals(take_override, texts) < len(texts)


@pytest.mark.timeout(600 + TRIES)
def test_settings_files(tmp_path: Path) -> None:
    originals = [path.read_text(encoding="utf-8") for path in sorted(presets_dir().glob("*.yaml"))]
    file = tmp_path / "mine.yaml"

    def take(text: str) -> None:
        file.write_text(text, encoding="utf-8", errors="surrogatepass")
        config = load_config(file).config
        assert config_from_dict(config.dump(), "stored") == config

    texts = mutants(originals, TRIES)
    assert refusals(take, originals) == 0
    assert 0 < refusals(take, texts) < len(texts)


@pytest.mark.timeout(600 + TRIES)
def test_profiles(tmp_path: Path) -> None:
    """What is taken becomes a batch script of as many lines as before."""
    file = tmp_path / "mine.yaml"
    lines = batch_script(Request("train", (), tmp_path, load_profile("devcluster"))).count("\n")

    def take(text: str) -> None:
        file.write_text(text, encoding="utf-8", errors="surrogatepass")
        profile = load_profile(str(file))
        if profile.executor == "slurm":
            script = batch_script(Request("train", (), tmp_path, profile))
            assert abs(script.count("\n") - lines) < 20 + sum(line.count("\n") for line in profile.setup)

    texts = mutants([PROFILE], TRIES)
    assert refusals(take, [PROFILE]) == 0
    assert 0 < refusals(take, texts) < len(texts)
