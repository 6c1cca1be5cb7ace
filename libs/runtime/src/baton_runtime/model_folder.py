"""What a Hugging Face model folder holds, read without torch or transformers, so that every service can check it.

A folder is refused with the name of what is missing or unsupported, before anything large is loaded.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from baton_runtime.errors import ConfigError

SUPPORTED_ARCHITECTURES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
DTYPE_BYTES: Mapping[str, int] = {"float32": 4, "float16": 2, "bfloat16": 2}

_SAFETENSORS_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_MAX_HEADER_BYTES = 100_000_000  # the safetensors format's own limit
_HASH_WHOLE_BYTES = 64 << 20
_SAMPLE_BYTES = 64 << 10
_NUM_SAMPLES = 256


_T = TypeVar("_T")


class ModelFolderError(ConfigError):
    """A model folder cannot be served; the message names the folder and what is wrong with it."""

    def __init__(self, message: str) -> None:
        super().__init__("model", message)


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """Facts of a folder that was checked.

    num_kv_heads and head_dim are those of one layer, unsplit. dtype is the type the weights are stored in.
    """

    path: Path
    architecture: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    max_model_tokens: int
    vocab_size: int
    eos_token_ids: frozenset[int]
    fingerprint: str  # 16 hex digits: same digits, same weights
    num_parameters: int
    weight_files: tuple[Path, ...]
    tokenizer_file: Path
    chat_template: str | None  # Jinja source; None: the model answers completions only
    special_tokens: Mapping[str, str] = field(default_factory=dict)  # bos_token, eos_token, ... as templates name them


class _Config(msgspec.Struct):
    """The fields of config.json that matter here."""

    architectures: list[str]
    num_hidden_layers: int
    hidden_size: int
    num_attention_heads: int
    max_position_embeddings: int
    vocab_size: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    dtype: str | None = None
    torch_dtype: str | None = None
    eos_token_id: int | list[int] | None = None
    use_sliding_window: bool | None = None
    quantization_config: dict[str, Any] | None = None
    layer_types: list[str] | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None


class _GenerationConfig(msgspec.Struct):
    eos_token_id: int | list[int] | None = None


class _WeightIndex(msgspec.Struct):
    weight_map: dict[str, str]


def inspect_model_folder(path: Path | str, *, any_architecture: bool = False) -> ModelFolder:
    """Check a folder and tell what is in it. Reads small files, safetensors headers and at most 80 MiB of weights per file.

    any_architecture: for an engine that is not ours, and judges itself what it can run.
    Raises: ModelFolderError naming every missing file, or the unsupported feature, with what is supported.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ModelFolderError(f"{folder}: no such folder")
    weight_files = _weight_files(folder)
    missing = [name for name in ("config.json", "tokenizer.json") if not (folder / name).is_file()]
    missing += [file.name for file in weight_files if not file.is_file()] or ([] if weight_files else ["model.safetensors"])
    if missing:
        raise ModelFolderError(f"{folder}: missing {', '.join(missing)}")
    config = _model_config(folder)
    if not any_architecture:
        _refuse_unsupported(folder, config)
    stored_dtype, num_parameters = _stored_weights(weight_files)
    dtype = config.dtype or config.torch_dtype or stored_dtype
    tokenizer_config = _tokenizer_config(folder)
    return ModelFolder(
        path=folder,
        architecture=config.architectures[0] if config.architectures else "",
        num_layers=config.num_hidden_layers,
        num_kv_heads=config.num_key_value_heads or config.num_attention_heads,
        head_dim=config.head_dim or config.hidden_size // config.num_attention_heads,
        dtype=dtype if any_architecture else _checked_dtype(folder, dtype),
        max_model_tokens=config.max_position_embeddings,
        vocab_size=config.vocab_size,
        eos_token_ids=_eos_token_ids(folder, config),
        fingerprint=_fingerprint(folder, weight_files),
        num_parameters=num_parameters,
        weight_files=weight_files,
        tokenizer_file=folder / "tokenizer.json",
        chat_template=_chat_template(folder, tokenizer_config),
        special_tokens=_special_tokens(tokenizer_config),
    )


def weights_bytes(folder: ModelFolder, dtype: str) -> int:
    """Memory of the weights when held in dtype."""
    return folder.num_parameters * DTYPE_BYTES[dtype]


def kv_token_bytes(folder: ModelFolder, dtype: str) -> int:
    """Memory of the keys and values of one token, all layers."""
    return folder.num_layers * 2 * folder.num_kv_heads * folder.head_dim * DTYPE_BYTES[dtype]


def _decode(file: Path, kind: type[_T]) -> _T:
    try:
        return msgspec.json.decode(file.read_bytes(), type=kind)
    except msgspec.DecodeError as error:
        raise ModelFolderError(f"{file}: {error}") from error


def _model_config(folder: Path) -> _Config:
    """config.json; of a model with several parts, that of its text part."""
    raw = _decode(folder / "config.json", dict[str, Any])
    own_names = {name: raw[name] for name in ("architectures", "dtype", "torch_dtype") if raw.get(name)}
    try:
        return msgspec.convert(raw | (raw.get("text_config") or {}) | own_names, _Config)
    except msgspec.ValidationError as error:
        raise ModelFolderError(f"{folder / 'config.json'}: {error}") from error


def _weight_files(folder: Path) -> tuple[Path, ...]:
    """The safetensors files a folder needs, whether or not they exist; empty if it names none."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return tuple(folder / name for name in sorted(set(_decode(index, _WeightIndex).weight_map.values())))
    single = folder / "model.safetensors"
    if single.is_file():
        return (single,)
    if any(folder.glob("*.bin")) or any(folder.glob("*.pth")):
        raise ModelFolderError(f"{folder}: weights are supported as safetensors only, found pickled ones (.bin or .pth)")
    return ()


def _refuse_unsupported(folder: Path, config: _Config) -> None:
    name = config.architectures[0] if config.architectures else "(none)"
    if name not in SUPPORTED_ARCHITECTURES:
        raise ModelFolderError(f"{folder}: architecture {name} is not supported; supported are {', '.join(SUPPORTED_ARCHITECTURES)}")
    if config.quantization_config is not None:
        method = config.quantization_config.get("quant_method", "unknown method")
        raise ModelFolderError(f"{folder}: quantized weights ({method}) are not supported; supported are {', '.join(DTYPE_BYTES)}")
    if config.use_sliding_window or any(kind != "full_attention" for kind in config.layer_types or ()):
        raise ModelFolderError(f"{folder}: only full attention is supported, no sliding windows")
    rope = config.rope_parameters or config.rope_scaling or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind in ("dynamic", "longrope"):
        # Rotations that change with the length of the sequence make stored keys wrong for every other length.
        raise ModelFolderError(f"{folder}: rope type {kind} is not supported, its keys depend on the length of the sequence")


def _stored_weights(files: tuple[Path, ...]) -> tuple[str, int]:
    """Type of the first floating-point tensor and number of values, from the headers of safetensors files."""
    dtype, num_parameters = "", 0
    for file in files:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > _MAX_HEADER_BYTES:
                raise ModelFolderError(f"{file}: not a safetensors file")
            try:
                header = json.loads(stream.read(length))
            except ValueError as error:
                raise ModelFolderError(f"{file}: not a safetensors file") from error
        tensors = [value for name, value in header.items() if name != "__metadata__"]
        end = 8 + length + max((tensor["data_offsets"][1] for tensor in tensors), default=0)
        if file.stat().st_size < end:
            raise ModelFolderError(f"{file}: cut short, {file.stat().st_size} of {end} bytes")
        num_parameters += sum(prod(tensor["shape"]) for tensor in tensors)
        dtype = dtype or next((tensor["dtype"] for tensor in tensors), "")
    return _SAFETENSORS_DTYPES.get(dtype, dtype), num_parameters


def _checked_dtype(folder: Path, dtype: str) -> str:
    if dtype not in DTYPE_BYTES:
        raise ModelFolderError(f"{folder}: dtype {dtype} is not supported; supported are {', '.join(DTYPE_BYTES)}")
    return dtype


def _eos_token_ids(folder: Path, config: _Config) -> frozenset[int]:
    """As transformers decides: generation_config.json first, else config.json; one id or a list."""
    file = folder / "generation_config.json"
    value = _decode(file, _GenerationConfig).eos_token_id if file.is_file() else None
    if value is None:
        value = config.eos_token_id
    return frozenset([value] if isinstance(value, int) else value or ())


def _tokenizer_config(folder: Path) -> dict[str, Any]:
    file = folder / "tokenizer_config.json"
    try:
        return msgspec.json.decode(file.read_bytes(), type=dict[str, Any]) if file.is_file() else {}
    except msgspec.DecodeError as error:
        raise ModelFolderError(f"{file}: {error}") from error


def _chat_template(folder: Path, tokenizer_config: Mapping[str, Any]) -> str | None:
    """chat_template.jinja, else the template (of several: the default) in tokenizer_config.json."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = tokenizer_config.get("chat_template")
    if isinstance(template, list):
        template = next((entry.get("template") for entry in template if entry.get("name") == "default"), None)
    return template if isinstance(template, str) else None


def _special_tokens(tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    tokens = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        value = tokenizer_config.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            tokens[name] = text
    return tokens


def _fingerprint(folder: Path, weight_files: tuple[Path, ...]) -> str:
    """SHA-256 over config.json and the weight files' names, sizes and contents, first 16 hex digits.

    Names and sizes alone are the same for every fine-tuning of a model. Large files are sampled evenly: 16 MiB read per
    file, enough to tell two trainings apart, not two files somebody made to agree.
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in weight_files:
        size = file.stat().st_size
        digest.update(f"\0{file.name}\0{size}\0".encode())
        with file.open("rb") as stream:
            if size <= _HASH_WHOLE_BYTES:
                digest.update(stream.read())
                continue
            for sample in range(_NUM_SAMPLES):
                stream.seek((size - _SAMPLE_BYTES) * sample // (_NUM_SAMPLES - 1))
                digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:16]
