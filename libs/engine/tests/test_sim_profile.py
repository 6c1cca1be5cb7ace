import pytest
from baton_engine.errors import ProfileError
from baton_engine.runner import StepLoad
from baton_engine.sim_profile import load_profile, profile_names

GOOD = "[prefill_ms]\nconstant = 1\n"


def test_shipped_profiles():
    assert profile_names() == ["instant", "polynomial"]


@pytest.mark.parametrize(("tokens", "milliseconds"), [(64, 17.5), (1024, 32.5), (4096, 85.8), (8192, 169.1)])
def test_polynomial_prefill_times_are_the_measured_ones(tokens, milliseconds):
    assert load_profile("polynomial").step_s(StepLoad(prefill_tokens=tokens), 1000) * 1000 == pytest.approx(milliseconds, abs=0.1)


@pytest.mark.parametrize(("usage", "milliseconds"), [(0.0, 5.74), (0.21, 15.95), (0.64, 29.76), (0.75, 31.77)])
def test_polynomial_decode_times_are_the_measured_ones(usage, milliseconds):
    load = StepLoad(decode_sequences=3, decode_kv_tokens=int(usage * 100_000))
    assert load_profile("polynomial").step_s(load, 100_000) * 1000 == pytest.approx(milliseconds, abs=0.01)


def test_instant_takes_no_time():
    assert load_profile("instant").step_s(StepLoad(8192, 8192, 64, 8192), 1000) == 0


def test_own_file_by_path(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text("time_scale = 0.5\n" + GOOD)
    assert load_profile(str(file)).step_s(StepLoad(prefill_tokens=7), 1000) == pytest.approx(0.0005)


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("[prefill_ms]\nconstant = -1", "prefill_ms.constant"),
        ("[prefill_ms]\nper_tokn = 1", "prefill_ms.per_tokn"),
        ("time_scale = 'fast'", "time_scale"),
        ("speed = 2", "speed"),
        ("[decode_ms]\nper_usage = 1\nper_usage_squared = -2", "decode_ms.per_usage_squared"),
        ("[model]\ndtype = 'int8'", "model.dtype"),
        ("[model]\nhead_dim = 0", "model.head_dim"),
    ],
)
def test_bad_file_names_the_field(tmp_path, text, field):
    file = tmp_path / "bad.toml"
    file.write_text(text)
    with pytest.raises(ProfileError) as caught:
        load_profile(str(file))
    assert caught.value.field == f"{file}: {field}"


def test_file_that_is_not_toml_says_so(tmp_path):
    file = tmp_path / "bad.toml"
    file.write_text("a = = 1")
    with pytest.raises(ProfileError, match="not TOML"):
        load_profile(str(file))


def test_unknown_name_lists_what_there_is():
    with pytest.raises(ProfileError, match="instant, polynomial"):
        load_profile("warp")


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ProfileError, match=r"none\.toml"):
        load_profile(str(tmp_path / "none.toml"))
