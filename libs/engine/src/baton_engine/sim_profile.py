"""Timing profiles of the sim engine: TOML files, some of them shipped as package data (profiles/*.toml)."""

import re
from importlib import resources
from pathlib import Path
from typing import Annotated

import msgspec

from baton_engine.errors import ProfileError
from baton_engine.runner import StepLoad

_AtLeastZero = Annotated[float, msgspec.Meta(ge=0)]
_Count = Annotated[int, msgspec.Meta(ge=1)]


class PrefillTime(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Milliseconds of a step that computes n prompt tokens: constant + per_token n + per_token_squared n^2; 0 if n is 0."""

    constant: _AtLeastZero = 0.0
    per_token: _AtLeastZero = 0.0
    per_token_squared: _AtLeastZero = 0.0


class DecodeTime(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Milliseconds of a step that decodes: constant + per_usage p + per_usage_squared p^2; 0 if nothing decodes.

    p: KV tokens attended to / KV tokens the pool holds, in [0, 1].
    """

    constant: _AtLeastZero = 0.0
    per_usage: _AtLeastZero = 0.0
    per_usage_squared: float = 0.0


class SimModel(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The pretended model. A model folder, where one is given, overrides vocab_size and max_model_tokens."""

    vocab_size: Annotated[int, msgspec.Meta(ge=2)] = 32000
    max_model_tokens: Annotated[int, msgspec.Meta(ge=2)] = 131072
    num_layers: _Count = 2
    num_kv_heads: _Count = 4
    head_dim: _Count = 2
    dtype: Annotated[str, msgspec.Meta(pattern="^(float32|float16|bfloat16)$")] = "float32"


class SimProfile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How long steps take. source: where the numbers come from. time_scale: factor on all times.

    tokens_per_step: tokens a decoding sequence gets in one step, as with speculative decoding whose guesses all hold.
    """

    description: str = ""
    source: str = ""
    time_scale: _AtLeastZero = 1.0
    tokens_per_step: Annotated[int, msgspec.Meta(ge=1, le=64)] = 1
    prefill_ms: PrefillTime = PrefillTime()
    decode_ms: DecodeTime = DecodeTime()
    model: SimModel = SimModel()

    def step_s(self, load: StepLoad, pool_tokens: int) -> float:
        """Length of a step in seconds in a pool of pool_tokens."""
        milliseconds = 0.0
        if n := load.prefill_tokens:
            milliseconds += self.prefill_ms.constant + self.prefill_ms.per_token * n + self.prefill_ms.per_token_squared * n * n
        if load.decode_sequences:
            usage = min(1.0, load.decode_kv_tokens / max(1, pool_tokens))
            milliseconds += self.decode_ms.constant + self.decode_ms.per_usage * usage + self.decode_ms.per_usage_squared * usage**2
        return milliseconds * self.time_scale / 1000


def profile_names() -> list[str]:
    """Names of the shipped profiles."""
    return sorted(file.name.removesuffix(".toml") for file in _shipped().iterdir() if file.name.endswith(".toml"))


def load_profile(name: str) -> SimProfile:
    """A shipped profile by name, or one of your own by path (a name with a slash, or ending in .toml).

    Raises: ProfileError naming the file's field that is wrong, or the profiles there are.
    """
    text = _read(name)
    try:
        profile = msgspec.toml.decode(text, type=SimProfile)
    except msgspec.ValidationError as error:
        raise ProfileError(*_field_and_problem(name, str(error))) from error
    except msgspec.DecodeError as error:
        raise ProfileError(name, f"not TOML: {error}") from error
    if profile.decode_ms.per_usage + 2 * profile.decode_ms.per_usage_squared < 0:
        raise ProfileError(f"{name}: decode_ms.per_usage_squared", "the time must not fall as the pool fills up (p up to 1)")
    return profile


def _shipped() -> resources.abc.Traversable:
    return resources.files("baton_engine") / "profiles"


def _read(name: str) -> str:
    is_path = "/" in name or name.endswith(".toml")
    try:
        return Path(name).read_text(encoding="utf-8") if is_path else (_shipped() / f"{name}.toml").read_text(encoding="utf-8")
    except OSError as error:
        known = ", ".join(profile_names())
        problem = f"{error.strerror or error}" if is_path else f"no such profile; there are {known}, or give the path of a .toml file"
        raise ProfileError(name, problem) from error
    except UnicodeDecodeError as error:
        raise ProfileError(name, "not UTF-8") from error


def _field_and_problem(name: str, message: str) -> tuple[str, str]:
    """msgspec says: Expected `float` - at `$.prefill_ms.constant`; or: Object contains unknown field `x` - at `$.prefill_ms`."""
    problem, _, path = message.partition(" - at ")
    field = path.strip("`").removeprefix("$").removeprefix(".")
    unknown = re.search(r"unknown field `(.*)`", problem)
    if unknown:
        field = f"{field}.{unknown[1]}".removeprefix(".")
    return f"{name}: {field}", problem
