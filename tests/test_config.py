"""Settings: layers, origins, and one clear line for every mistake."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpc_ddpm.config import config_from_dict, flatten_config, list_presets, load_config
from hpc_ddpm.errors import ConfigError


@pytest.mark.parametrize("preset", list_presets())
def test_presets_load_and_survive_storage(preset: str) -> None:
    config = load_config(preset).config
    assert config.name == preset
    assert config_from_dict(config.dump(), "stored") == config


def test_required_presets_are_there() -> None:
    assert {"whole_head_128", "brats_192", "brats_192_large", "demo"} <= set(list_presets())


def test_later_layers_win_and_origins_say_which(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("extends: brats_192\ntraining:\n  num_steps: 7\n  zero_stage: 2\n")
    loaded = load_config(file, ["training.zero_stage=3"])
    assert loaded.config.name == "mine"
    assert loaded.config.data.modalities == ("t1", "t1ce", "t2", "flair")
    assert (loaded.config.training.num_steps, loaded.config.training.zero_stage) == (7, 3)
    assert loaded.origin("data.modalities") == "preset brats_192"
    assert loaded.origin("training.num_steps") == f"{file}:3"
    assert loaded.origin("training.zero_stage") == "command line"
    assert loaded.origin("seed") == "default"


def test_labels_are_replaced_not_merged() -> None:
    config = load_config("brats_192", ["data.labels.names={1: liver}"]).config
    assert config.data.labels.names == {1: "liver"}


def test_command_line_values() -> None:
    overrides = [
        "training.learning_rate=1e-4",
        "data.size=32,32,48",
        "data.modalities=ct",
        "data.labels.remap={4: 3}",
    ]
    config = load_config(None, [*overrides, "model.head_channels=null"]).config
    assert config.training.learning_rate == 1e-4
    assert config.data.size == (32, 32, 48)
    assert config.data.spatial_shape == (48, 32, 32)
    assert config.data.modalities == ("ct",)
    assert config.data.labels.remap == {4: 3}


def test_digest_changes_with_any_setting() -> None:
    base = load_config("demo").config
    assert base.digest() == load_config("demo").config.digest()
    assert base.digest() != load_config("demo", ["seed=1"]).config.digest()


def test_every_setting_is_flat_and_known() -> None:
    flat = flatten_config(load_config().config)
    assert flat["training.zero_stage"] == 1
    assert flat["data.labels.names"] == {"1": "head", "2": "tumour"}


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        (
            "training.zero_stag=2",
            ["unknown setting 'training.zero_stag'", "did you mean 'training.zero_stage'"],
        ),
        ("zero_stage=2", ["unknown setting 'zero_stage'", "did you mean 'training.zero_stage'"]),
        ("blah.blub=2", ["unknown setting 'blah'", "data, model"]),
        ("training.zero_stage=9", ["command line", "training.zero_stage=9", "0, 1, 2 or 3"]),
        (
            "model.base_channels=abc",
            ["model.base_channels='abc'", "valid integer", "example: model.base_channels=64"],
        ),
        ("model.base_channels=0", ["greater than 0"]),
        ("model=3", ["'model' is a section", "model.base_channels"]),
        ("foo", ["section.key=value"]),
        ("a=[1", ["not valid YAML"]),
        ("data.size=100,100,100", ["not divisible by 16", "[96, 96, 96]", "data.size from command line"]),
        ("data.modalities=[t1,t1]", ["distinct"]),
        ("data.high=120", ["0..100"]),
        ("data.labels.names={1: a, 300: b}", ["1..255", "300"]),
        ("data.labels.foreground_label=9", ["foreground_label 9"]),
        ("data.labels.off_value=1", ["invisible"]),
        ("data.orientation=XYZ", ["data.orientation='XYZ'"]),
        ("model.base_channels=40", ["does not divide 40", "8"]),
        ("model.attention_factors=[3]", ["attention_factors [3]", "[1, 2, 4, 8, 16]"]),
        ("sampling.num_steps=251", ["251", "250"]),
        ("sampling.guidance_scale=3", ["condition_dropout > 0"]),
        ("data.path=null", ["data.path=None", "valid string"]),
    ],
)
def test_mistakes_on_the_command_line(override: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, [override])
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("training:\n  steps: 3\n", ["mine.yaml:2", "unknown setting 'training.steps'"]),
        ("training: 3\n", ["mine.yaml:1", "'training' is a section"]),
        ("data:\n  size: [a, b, c]\n", ["mine.yaml:2", "data.size"]),
        ("data:\n  size: [1, 2\n", ["mine.yaml:", "not valid YAML"]),
        ("- 1\n", ["expected sections"]),
        ("seed: 1\nseed: 2\n", ["mine.yaml:2", "given twice"]),
        ("extends: mine.yaml\n", ["no configuration file"]),
        ("extends: demoo\n", ["did you mean 'demo'"]),
        ("x: !!python/object/apply:os.system ['true']\n", ["not valid YAML"]),
    ],
)
def test_mistakes_in_a_file(tmp_path: Path, text: str, parts: list[str]) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    for part in parts:
        assert part in str(caught.value)


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "empty.yaml"
    file.write_text("")
    assert load_config(file).config.name == "empty"


@pytest.mark.parametrize(
    ("source", "part"), [("demoo", "did you mean 'demo'"), ("no/such.yaml", "no configuration file")]
)
def test_a_configuration_that_is_not_there(source: str, part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        load_config(source)


def test_extends_in_a_circle(tmp_path: Path) -> None:
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    one.write_text(f"extends: {two}\n")
    two.write_text(f"extends: {one}\n")
    with pytest.raises(ConfigError, match="circle"):
        load_config(one)


def test_batch_arithmetic_is_in_the_message() -> None:
    training = load_config(None, ["training.global_batch=6"]).config.training
    assert training.accumulation(3) == 2
    with pytest.raises(ConfigError, match=r"6 is not a multiple of micro_batch x ranks = 1 x 4 = 4"):
        training.accumulation(4)
