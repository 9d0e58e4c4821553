"""Settings: layers, origins, and one clear line for every mistake."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpc_ddpm.config import config_from_dict, flatten_config, list_presets, load_config, with_overrides
from hpc_ddpm.errors import ConfigError
from hpc_ddpm.text import has_control


def bomb(level: str) -> str:
    """A few hundred bytes that stand for a few hundred million values."""
    lines = ["a: &a {x: 1}" if "<<" in level else "a: &a [x, x, x, x, x, x, x, x, x]"]
    for one, next_one in zip("abcdefgh", "bcdefghi", strict=True):
        lines.append(f"{next_one}: &{next_one} {level.format(', '.join([f'*{one}'] * 9))}")
    return "\n".join([*lines, ""])


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


@pytest.mark.parametrize(
    ("override", "setting", "value"),
    [
        ("data.labels.names.1=brain", "data.labels.names", {"1": "brain", "2": "tumour"}),
        ("data.labels.names.3=vessel", "data.labels.names", {"1": "head", "2": "tumour", "3": "vessel"}),
        ("data.size.0=64", "data.size", [64, 128, 128]),
        ("data.labels.remap.4=3", "data.labels.remap", {"4": 3}),
        ("augment.flip_probability.0=0.5", "augment.flip_probability", [0.5, 0.0, 0.0]),
        ("training.num_steps=1e5", "training.num_steps", 100000),
        ("data.path=/data/a, b #1: c", "data.path", "/data/a, b #1: c"),
        ("data.path='a'", "data.path", "a"),
        ("data.path=", "data.path", ""),
        ("name=2020-01-01", "name", "2020-01-01"),
        ("name=12", "name", "12"),
        ("data.modalities='a,b'", "data.modalities", ["a,b"]),
    ],
)
def test_what_users_type(override: str, setting: str, value: object) -> None:
    """Numbers and names lead into a value; a text is taken as it stands."""
    assert flatten_config(load_config(None, [override]).config)[setting] == value
    stored = config_from_dict(load_config(None).config.dump(), "stored")
    assert flatten_config(with_overrides(stored, [override]))[setting] == value


def test_parts_come_one_by_one(tmp_path: Path) -> None:
    """On top of a preset, of a file, and of each other."""
    age = ["data.covariates.age.mean=50", "data.covariates.age.std=15", "data.covariates.sex.values=[F, M]"]
    covariates = load_config(None, age).config.data.covariates
    assert (covariates["age"].std, covariates["sex"].values) == (15, ("F", "M"))
    loaded = load_config("brats_192", ["data.labels.names.1=core", "data.size.2=160"])
    assert list(loaded.config.data.labels.names.items())[:2] == [(1, "core"), (2, "edema")]
    assert loaded.config.data.size == (192, 192, 160)
    assert loaded.origin("data.labels.names") == "command line"
    file = tmp_path / "mine.yaml"
    file.write_text("data.size: [32, 32, 32]\ndata:\n  labels: {names: {3: vessel}}\n")
    config = load_config(file, ["data.labels.names.3=artery", "data.size.0=64"]).config
    assert (config.data.labels.names, config.data.size) == ({3: "artery"}, (64, 32, 32))


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
        ("seed=[1", ["'seed=[1': not valid YAML"]),
        ("a=[1", ["unknown setting 'a'"]),
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
        ("data.size.3=1", ["data.size has the parts 0 to 2, found '3'"]),
        ("data.size.x=1", ["data.size has the parts 0 to 2, found 'x'"]),
        ("data.path.x=1", ["data.path is '', and has no part 'x'; give it whole, data.path="]),
        ("data.voxel_size_mm.0=1", ["data.voxel_size_mm is not set", "give it whole, data.voxel_size_mm=..."]),
        ("data.hooks.0.command=x", ["data.hooks is empty; give it whole"]),
        ("data.covariates.age.mean=50", ["data.covariates: a covariate has either mean and std"]),
        ("data.modalities=t1,[t2", ["'data.modalities=t1,[t2': not valid YAML"]),
        ("data.modalities=`t1`", ["not valid YAML: found character '`'"]),
        ("seed=2020-01-01", ["seed='2020-01-01'", "valid integer"]),
        ("seed=!!int ''", ["not valid YAML"]),
        ("seed=0x" + "f" * 5000, ["is too large a number"]),
        ("training.learning_rate=.inf", ["finite number"]),
        ("data.modalities=" + "a," * 9000, ["distinct"]),
        ("x" * 100_000 + "=1", ["unknown setting 'xxx", "the top level has"]),
    ],
)
def test_mistakes_on_the_command_line(override: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, [override])
    message = str(caught.value)
    assert not has_control(message)
    assert len(message) < 2000
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
        ("extends: [a]\n", ["'extends' is one preset or file, found ['a']"]),
        ("extends: " + "a" * 300 + "\n", ["no preset or file called 'aaa"]),
        ("extends: " + "a" * 300 + ".yaml\n", ["no configuration file aaa"]),
        ("seed: !!int ''\n", ["not valid YAML"]),
        ("seed: !!binary x\n", ["mine.yaml:1", "tag", "is no plain value"]),
        ("data: &a {size: *a}\n", ["mine.yaml:1", "refers to itself by an alias"]),
        ("data:\n  size: &a [*a]\n", ["mine.yaml:2", "refers to itself by an alias"]),
        (bomb("[{}]"), ["too large once its aliases are filled in"]),
        (bomb("{{<<: [{}]}}"), ["too large once its aliases are filled in"]),
        ("a: " + "[" * 20_000 + "\n", ["mine.yaml:1", "nested more than 20 deep"]),
        ("- " * 20_000 + "\n", ["nested more than 20 deep"]),
        ("x" * 100_000 + "\n", ["larger than 64 KiB"]),
        ("seed: " + "9" * 5000 + "\n", ["is too large a number"]),
        ('name: "a\\0b"\n', ["has a control character"]),
        ("1: 2\n", ["mine.yaml:1: unknown setting '1'"]),
        ("? [a]\n: b\n", ["mine.yaml:1", "a key that is no word"]),
        ("<<: 3\n", ["mine.yaml:1", "expected a mapping"]),
    ],
)
def test_mistakes_in_a_file(tmp_path: Path, text: str, parts: list[str]) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    message = str(caught.value)
    assert not has_control(message)
    assert len(message) < 2000
    for part in parts:
        assert part in message


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
