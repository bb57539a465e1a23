"""Settings: precedence, origins, types, and errors that name key, value, place and the nearest valid key."""

from __future__ import annotations

from pathlib import Path

import pytest

from ragkit.config import Device, PipelineConfig, SearchMode
from ragkit.errors import ConfigError
from ragkit.setting_values import to_text
from ragkit.settings import Flag, Settings, forbid_network, load_settings, setting_keys, type_of, variable_of


class Places:
    """A working folder and a user folder, both empty at first."""

    def __init__(self, root: Path) -> None:
        self.folder, self.user_folder = root / "work", root / "user"
        self.folder.mkdir()
        self.user_folder.mkdir()

    def write(self, text: str) -> Path:
        path = self.folder / "ragkit.toml"
        path.write_text(text, encoding="utf-8")
        return path

    def load(self, environ: dict[str, str] | None = None, config_file: Path | None = None, **flags: Flag) -> Settings:
        by_key = {key.replace("__", "."): flag for key, flag in flags.items()}
        return load_settings(
            by_key,
            config_file=config_file,
            environ=environ or {},
            folder=self.folder,
            user_folder=self.user_folder,
        )


@pytest.fixture
def places(tmp_path: Path) -> Places:
    return Places(tmp_path)


def origin_of(settings: Settings, key: str) -> str:
    return next(item.origin for item in settings.values if item.key == key)


def test_without_any_source_everything_is_the_default(places: Places) -> None:
    settings = places.load()
    assert settings.config == PipelineConfig()
    assert settings.store == Path(".ragkit")
    assert {item.origin for item in settings.values} == {"default"}
    assert [item.key for item in settings.values] == list(setting_keys())


def test_each_source_overrides_the_one_before(places: Places) -> None:
    (places.user_folder / "ragkit.toml").write_text(
        "[retrieval]\nk = 1\ncandidates = 11\nrrf_k = 21\nflat_limit = 31\n"
    )
    places.write("[retrieval]\nk = 2\ncandidates = 12\nrrf_k = 22\n")
    environ = {"RAGKIT_RETRIEVAL_K": "3", "RAGKIT_RETRIEVAL_CANDIDATES": "13"}
    retrieval = places.load(environ, retrieval__k=Flag(4, "-k")).config.retrieval
    assert (retrieval.k, retrieval.candidates, retrieval.rrf_k, retrieval.flat_limit) == (4, 13, 22, 31)


def test_every_value_knows_where_it_came_from(places: Places) -> None:
    path = places.write("# a comment\n\n[generation]\nseed = 1\n")
    settings = places.load({"RAGKIT_OFFLINE": "yes"}, device=Flag("cpu", "--device"))
    assert origin_of(settings, "generation.seed") == f"{path} line 4"
    assert origin_of(settings, "offline") == "RAGKIT_OFFLINE"
    assert origin_of(settings, "device") == "--device"
    assert origin_of(settings, "retrieval.k") == "default"


def test_a_named_file_replaces_the_one_in_the_working_folder(places: Places, tmp_path: Path) -> None:
    places.write("[retrieval]\nk = 2\n")
    other = tmp_path / "other.toml"
    other.write_text("[retrieval]\ncandidates = 50\n")
    retrieval = places.load(config_file=other).config.retrieval
    assert (retrieval.k, retrieval.candidates) == (8, 50)


def test_a_ratio_of_a_file_is_a_number_or_auto_and_reads_back_as_written(places: Places) -> None:
    for written in ("0.25", '"auto"'):
        places.write(f"[blend]\nratio = {written}\n")
        assert to_text(places.load().config.blend.ratio) == written


def test_a_named_file_must_exist(places: Places) -> None:
    with pytest.raises(ConfigError, match=r"--config needs an existing TOML file, got 'gone\.toml'"):
        places.load(config_file=Path("gone.toml"))


def test_the_store_comes_from_the_environment_or_a_flag(places: Places) -> None:
    environ = {"RAGKIT_STORE": "here"}
    assert places.load(environ).store == Path("here")
    assert places.load(environ, store=Flag("there", "--store")).store == Path("there")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "[generation]\nmodle = 'x'\n",
            "unknown setting 'generation.modle' in {path} line 2; did you mean generation.model?",
        ),
        (
            "[generaton]\nmodel = 'x'\n",
            "unknown setting 'generaton.model' in {path} line 2; did you mean generation.model?",
        ),
        ("[generaton]\n", "unknown setting 'generaton' in {path}; did you mean generation.seed?"),
        ("generation = 3\n", "unknown setting 'generation' in {path} line 1; did you mean generation.seed?"),
        ("zzz = 3\n", "unknown setting 'zzz' in {path} line 1; `ragkit config show` lists them all"),
        ("[retrieval]\nk = 'many'\n", "retrieval.k must be a whole number, got 'many' (set by {path} line 2)"),
        ("[retrieval]\nk = true\n", "retrieval.k must be a whole number, got True (set by {path} line 2)"),
        ("[retrieval]\nk = 2.0\n", "retrieval.k must be a whole number, got 2.0 (set by {path} line 2)"),
        ("offline = 'yes'\n", "offline must be true or false, got 'yes' (set by {path} line 1)"),
        ("device = 'gpu'\n", "device must be one of auto, cpu, cuda, got 'gpu' (set by {path} line 1)"),
        (
            "[ingest]\ninclude = '*.md'\n",
            "ingest.include must be a list, each a text, got '*.md' (set by {path} line 2)",
        ),
        ("[ingest]\ninclude = [1]\n", "ingest.include must be a text, got 1 (set by {path} line 2)"),
        ("[blend]\nratio = 'most'\n", "blend.ratio must be a number, or auto, got 'most' (set by {path} line 2)"),
        ("[blend]\nratio = true\n", "blend.ratio must be a number, or auto, got True (set by {path} line 2)"),
        ("[blend]\nratio = 2\n", "blend.ratio must lie in [0, 1] or be auto, got 2.0 (set by {path} line 2)"),
        (
            "[blend]\nratio = 'auto'\nauto_coverage = 1.5\n",
            "blend.auto_coverage must lie in [0, 1], got 1.5 (set by {path} line 3)",
        ),
        (
            "[blend]\nauto_least = 0.4\n",
            "blend.auto_least must lie in [0, blend.auto_most = 0.3], got 0.4 (set by {path} line 2)",
        ),
        (
            "[blend]\nratio = 'auto'\nselector = 'first'\n",
            "blend.ratio can be auto where blend.selector asks what the question looks at (question or two-rounds), "
            "got 'first': take one of these, or a number (set by {path} line 2 and {path} line 3)",
        ),
        ("[retrieval]\nk = 0\n", "retrieval.k must be a whole number >= 1, got 0 (set by {path} line 2)"),
    ],
)
def test_a_bad_file_is_one_line_that_names_key_value_and_place(places: Places, text: str, message: str) -> None:
    path = places.write(text)
    with pytest.raises(ConfigError) as caught:
        places.load()
    got = str(caught.value)
    # Which of several equally near keys is offered does not matter for a section's bare name.
    assert got.split("did you mean generation.")[0] == message.format(path=path).split("did you mean generation.")[0]
    assert "\n" not in got


def test_broken_toml_names_the_file_and_the_line(places: Places) -> None:
    path = places.write("[generation]\nmodel = \n")
    with pytest.raises(ConfigError, match=r"ragkit\.toml cannot be read as TOML: .*line 2") as caught:
        places.load()
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text", "key", "value"),
    [
        ("RAGKIT_GENERATION_MODEL", "some/model", "generation.model", "some/model"),
        ("RAGKIT_GENERATION_TEMPERATURE", "0.5", "generation.temperature", 0.5),
        ("RAGKIT_RETRIEVAL_MODE", "bm25", "retrieval.mode", SearchMode.BM25),
        ("RAGKIT_DEVICE", "cpu", "device", Device.CPU),
        ("RAGKIT_OFFLINE", "1", "offline", True),
        ("RAGKIT_OFFLINE", "Off", "offline", False),
        ("RAGKIT_BLEND_RATIO", "0.2", "blend.ratio", 0.2),
        ("RAGKIT_BLEND_RATIO", "auto", "blend.ratio", "auto"),
        ("RAGKIT_INGEST_EXCLUDE", "*.tmp, build/**", "ingest.exclude", ("*.tmp", "build/**")),
        ("RAGKIT_INGEST_EXCLUDE", "", "ingest.exclude", ()),
    ],
)
def test_an_environment_variable_sets_its_key(places: Places, name: str, text: str, key: str, value: object) -> None:
    settings = places.load({name: text})
    assert next(item.value for item in settings.values if item.key == key) == value


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("RAGKIT_RETRIEVAL_K", "many", "retrieval.k must be a whole number, got 'many' (set by RAGKIT_RETRIEVAL_K)"),
        ("RAGKIT_BLEND_RATIO", "", "blend.ratio must be a number, or auto, got '' (set by RAGKIT_BLEND_RATIO)"),
        ("RAGKIT_OFFLINE", "maybe", "offline must be true or false, got 'maybe' (set by RAGKIT_OFFLINE)"),
        (
            "RAGKIT_GENERATION_MODLE",
            "x",
            "unknown setting in the environment: RAGKIT_GENERATION_MODLE; did you mean RAGKIT_GENERATION_MODEL?",
        ),
        ("RAGKIT_DEVICES", "x", "unknown setting in the environment: RAGKIT_DEVICES; did you mean RAGKIT_DEVICE?"),
    ],
)
def test_a_bad_variable_is_one_line_that_names_it(places: Places, name: str, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        places.load({name: text})
    assert str(caught.value) == message


def test_reserved_variables_are_no_settings(places: Places) -> None:
    environ = {
        "RAGKIT_DATA": "/d",
        "RAGKIT_DEBUG": "1",
        "RAGKIT_CRASH_AT": "3",
        "RAGKIT_ENOSPC_AT": "3",
        "RAGKIT_VENV": "v",
    }
    assert places.load(environ).warnings == ()


def test_a_variable_that_resembles_no_setting_is_reported_not_refused(places: Places) -> None:
    assert places.load({"RAGKIT_PARTY": "1"}).warnings == ("RAGKIT_PARTY is set but means nothing to ragkit",)


def test_the_home_variable_moves_the_users_file(tmp_path: Path) -> None:
    (tmp_path / "ragkit.toml").write_text("[retrieval]\nk = 9\n")
    folder = tmp_path / "empty"
    folder.mkdir()
    assert load_settings(environ={"RAGKIT_HOME": str(tmp_path)}, folder=folder).config.retrieval.k == 9


def test_an_impossible_flag_names_the_flag(places: Places) -> None:
    with pytest.raises(ConfigError, match=r"generation\.top_p must lie in \(0, 1\], got 2\.0 \(set by --top-p\)"):
        places.load(generation__top_p=Flag(2.0, "--top-p"))


@pytest.mark.parametrize("key", setting_keys())
def test_every_key_has_a_variable_a_type_in_words_and_a_default_that_toml_can_write(places: Places, key: str) -> None:
    default = next(item.value for item in places.load().values if item.key == key)
    assert variable_of(key) == "RAGKIT_" + key.upper().replace(".", "_")
    assert type_of(key)
    written = to_text(str(default) if key == "store" else default)
    section, _, name = key.rpartition(".")
    places.write(f"[{section}]\n{name} = {written}\n" if section else f"{name} = {written}\n")
    again = next(item.value for item in places.load().values if item.key == key)
    assert str(again) == str(default)


def test_forbidding_the_network_sets_what_hugging_face_reads() -> None:
    environ: dict[str, str] = {}
    forbid_network(environ)
    assert environ["HF_HUB_OFFLINE"] == "1"
    assert environ["TRANSFORMERS_OFFLINE"] == "1"
