from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
import pytest
from baton_runtime.config import CommonConfig, ConfigError, config_file, effective, load


@dataclass(frozen=True)
class DecodeConfig(CommonConfig):
    max_tickets: Annotated[int, msgspec.Meta(ge=1, le=100)] = 10
    transports: tuple[str, ...] = ("shm", "tcp")
    model: Path = Path("model")
    is_prefilling: bool = True
    pair_secret: str = ""
    limit: Annotated[int, msgspec.Meta(ge=1)] | None = None

    def __post_init__(self) -> None:
        if self.max_tickets == 99:
            raise ValueError("max_tickets and limit do not go together")


def decode(file: Path | None = None, **environ: str) -> DecodeConfig:
    return load(DecodeConfig, "decode", file, {f"BATON_DECODE_{name}": text for name, text in environ.items()})


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "decode.toml"


def refused(file: Path | None = None, **environ: str) -> str:
    with pytest.raises(ConfigError) as error:
        decode(file, **environ)
    return error.value.message


def test_environment_wins_over_file_wins_over_defaults(file: Path) -> None:
    file.write_text('max_tickets = 20\nzone = "a"\n')
    config = decode(file, ZONE="b")
    assert (config.max_tickets, config.zone, config.log_level) == (20, "b", "info")


def test_text_of_the_environment_becomes_the_fields_type() -> None:
    config = decode(MAX_TICKETS="7", TRANSPORTS="tcp, nixl,", MODEL="/m", IS_PREFILLING="false", TRACE_SAMPLE_RATIO="0.5", LIMIT="3")
    assert config == DecodeConfig(
        max_tickets=7, transports=("tcp", "nixl"), model=Path("/m"), is_prefilling=False, trace_sample_ratio=0.5, limit=3
    )


def test_services_table_is_used_and_others_left_alone(file: Path) -> None:
    file.write_text("[decode]\nmax_tickets = 20\n[router]\nanything = 1\n")
    assert decode(file).max_tickets == 20


def test_file_without_our_table_gives_defaults(file: Path) -> None:
    file.write_text("[router]\nanything = 1\n")
    assert decode(file) == DecodeConfig()


def test_setting_outside_of_the_tables_is_refused(file: Path) -> None:
    file.write_text('zone = "a"\n[decode]\nmax_tickets = 20\n')
    assert "decode.zone: stands outside" in refused(file)


def test_value_out_of_range_names_field_value_origin_and_range(file: Path) -> None:
    message = refused(MAX_TICKETS="0")
    assert "decode.max_tickets: '0' (from environment BATON_DECODE_MAX_TICKETS) is refused: expected `int` >= 1" in message
    file.write_text("max_tickets = 101\n")
    assert f"101 (from file {file})" in refused(file)


def test_wrong_type_is_refused(file: Path) -> None:
    file.write_text('max_tickets = "7"\n')
    assert "decode.max_tickets" in refused(file)
    assert "decode.is_prefilling" in refused(IS_PREFILLING="maybe")
    assert "decode.log_level" in refused(LOG_LEVEL="loud")


def test_unknown_names_are_refused_with_a_hint(file: Path) -> None:
    assert "decode.max_tickts: is not a setting (environment BATON_DECODE_MAX_TICKTS); did you mean max_tickets?" in refused(MAX_TICKTS="1")
    file.write_text("qqqq = 1\n")
    assert "known are" in refused(file)


def test_other_services_environment_is_not_ours() -> None:
    assert load(DecodeConfig, "decode", None, {"BATON_ROUTER_ANYTHING": "1", "PATH": "x"}) == DecodeConfig()


def test_bad_default_is_refused() -> None:
    @dataclass(frozen=True)
    class Bad(CommonConfig):
        depth: Annotated[int, msgspec.Meta(ge=1)] = 0

    with pytest.raises(ConfigError, match=r"router\.depth: 0 \(from default\)"):
        load(Bad, "router", None, {})


def test_missing_required_field_is_named() -> None:
    @dataclass(frozen=True)
    class Required:
        model: str

    with pytest.raises(ConfigError, match=r"decode\.model: is required.*BATON_DECODE_MODEL"):
        load(Required, "decode", None, {})


def test_rule_over_several_fields_stops_the_start() -> None:
    assert refused(MAX_TICKETS="99") == "decode: max_tickets and limit do not go together"


def test_unreadable_files_are_named(file: Path) -> None:
    assert str(file) in refused(file)
    file.write_text("= broken")
    assert "is not TOML" in refused(file)
    file.write_bytes(b"\xff\xfe")
    assert "cannot read" in refused(file)


def test_secrets_are_masked_in_log_and_errors(file: Path) -> None:
    assert effective(decode(PAIR_SECRET="hush"))["pair_secret"] == "***"
    assert effective(decode())["pair_secret"] == ""
    file.write_text("pair_secret = 12345\n")
    assert "12345" not in refused(file)


def test_effective_config_can_be_logged() -> None:
    assert effective(decode())["model"] == "model"


def test_command_line_has_one_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert config_file("decode", []) is None
    assert config_file("decode", ["--config", str(tmp_path)]) == tmp_path
    with pytest.raises(SystemExit) as stop:
        config_file("decode", ["--nothing"])
    assert stop.value.code == 2
    with pytest.raises(SystemExit):
        config_file("decode", ["--version"], version="1.2.3")
    assert "baton-decode 1.2.3" in capsys.readouterr().out
