"""Checking Hugging Face folders without torch."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from baton_runtime.model_folder import ModelFolderError, inspect_model_folder, kv_token_bytes, weights_bytes

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 3,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "vocab_size": 100,
    "eos_token_id": 7,
    "dtype": "bfloat16",
}


def safetensors(shape: list[int], dtype: str = "BF16", size: int = 2) -> bytes:
    end = size * shape[0] * shape[1]
    header = json.dumps({"__metadata__": {}, "weight": {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(end)


def write(folder: Path, config: dict[str, Any] | None = None, **files: str) -> Path:
    """A complete folder; `files` (dots written as __) are added, config fields overridden, None removes one."""
    folder.mkdir(exist_ok=True)
    merged = {k: v for k, v in (CONFIG | (config or {})).items() if v is not None}
    (folder / "config.json").write_text(json.dumps(merged))
    (folder / "model.safetensors").write_bytes(safetensors([10, 64]))
    (folder / "tokenizer.json").write_text("{}")
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def test_an_engine_that_is_not_ours_may_run_what_ours_cannot(tmp_path: Path) -> None:
    odd = {"architectures": ["GptOssForCausalLM"], "quantization_config": {"quant_method": "mxfp4"}, "dtype": None}
    odd |= {"layer_types": ["sliding_attention", "full_attention"]}
    folder = write(tmp_path, odd)
    with pytest.raises(ModelFolderError, match="GptOssForCausalLM"):
        inspect_model_folder(folder)
    assert inspect_model_folder(folder, any_architecture=True).architecture == "GptOssForCausalLM"


def test_of_a_model_with_several_parts_the_text_part_counts(tmp_path: Path) -> None:
    text = {
        name: CONFIG[name] for name in ("num_hidden_layers", "hidden_size", "num_attention_heads", "max_position_embeddings", "vocab_size")
    }
    outer: dict[str, Any] = dict.fromkeys(text) | {"architectures": ["SomeVisionModel"], "text_config": text}
    model = inspect_model_folder(write(tmp_path, outer), any_architecture=True)
    assert (model.architecture, model.num_layers, model.vocab_size) == ("SomeVisionModel", CONFIG["num_hidden_layers"], 100)


def test_folder_tells_the_layout(tmp_path: Path) -> None:
    model = inspect_model_folder(write(tmp_path))
    assert (model.num_layers, model.num_kv_heads, model.head_dim, model.dtype) == (3, 2, 16, "bfloat16")
    assert (model.max_model_tokens, model.vocab_size, model.eos_token_ids) == (512, 100, {7})
    assert model.num_parameters == 640
    assert weights_bytes(model, "float32") == 2560
    assert kv_token_bytes(model, "float32") == 3 * 2 * 2 * 16 * 4
    assert len(bytes.fromhex(model.fingerprint)) == 8


def test_defaults_of_older_configs_are_understood(tmp_path: Path) -> None:
    config = {"num_key_value_heads": None, "dtype": None, "torch_dtype": "float16", "head_dim": 32}
    model = inspect_model_folder(write(tmp_path, config))
    assert (model.num_kv_heads, model.head_dim, model.dtype) == (4, 32, "float16")
    assert inspect_model_folder(write(tmp_path, {"dtype": None})).dtype == "bfloat16"  # as the weights are stored


@pytest.mark.parametrize("name", ["MistralForCausalLM", "Qwen3MoeForCausalLM", "T5ForConditionalGeneration"])
def test_other_architectures_are_refused_with_what_is_supported(tmp_path: Path, name: str) -> None:
    with pytest.raises(
        ModelFolderError, match=f"{name} is not supported; supported are LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM"
    ):
        inspect_model_folder(write(tmp_path, {"architectures": [name]}))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quantization_config": {"quant_method": "awq"}}, "awq"),
        ({"use_sliding_window": True}, "sliding"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope type dynamic"),
        ({"dtype": "float8_e4m3fn"}, "float8"),
        ({"architectures": []}, "none"),
        ({"hidden_size": "big"}, "hidden_size"),
        ({"vocab_size": None}, "vocab_size"),
    ],
)
def test_unsupported_features_are_refused_by_name(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelFolderError, match=message):
        inspect_model_folder(write(tmp_path, config))


def test_every_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match=r"missing config\.json, tokenizer\.json, model\.safetensors"):
        inspect_model_folder(tmp_path)
    with pytest.raises(ModelFolderError, match="no such folder"):
        inspect_model_folder(tmp_path / "nowhere")


def test_missing_shard_is_named(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "model-1.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelFolderError, match=r"missing model-2\.safetensors$"):
        inspect_model_folder(tmp_path)
    (tmp_path / "model-2.safetensors").write_bytes(safetensors([5, 4]))
    assert inspect_model_folder(tmp_path).num_parameters == 660


def test_pickled_damaged_and_short_weights_are_refused(tmp_path: Path) -> None:
    weights = write(tmp_path) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ModelFolderError, match="cut short"):
        inspect_model_folder(tmp_path)
    weights.write_bytes(b"version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ModelFolderError, match="not a safetensors file"):
        inspect_model_folder(tmp_path)
    weights.rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelFolderError, match="safetensors only"):
        inspect_model_folder(tmp_path)


@pytest.mark.parametrize(("value", "want"), [("5", {5}), ("[5, 6]", {5, 6}), ("null", {7})])
def test_end_tokens_come_from_the_generation_config_first(tmp_path: Path, value: str, want: set[int]) -> None:
    folder = write(tmp_path, generation_config__json=f'{{"eos_token_id": {value}}}')
    assert inspect_model_folder(folder).eos_token_ids == want


def test_chat_template_and_special_tokens(tmp_path: Path) -> None:
    assert inspect_model_folder(write(tmp_path)).chat_template is None
    several = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    about = {"chat_template": several, "bos_token": {"content": "<s>"}, "eos_token": "</s>", "pad_token": None}
    model = inspect_model_folder(write(tmp_path, tokenizer_config__json=json.dumps(about)))
    assert model.chat_template == "D"
    assert model.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    assert inspect_model_folder(write(tmp_path, chat_template__jinja="J")).chat_template == "J"


def test_fingerprint_tells_models_apart_and_folders_alike(tmp_path: Path) -> None:
    first, copy = write(tmp_path / "a"), write(tmp_path / "b")
    assert inspect_model_folder(first).fingerprint == inspect_model_folder(copy).fingerprint
    write(copy, {"rms_norm_eps": 1e-5})
    assert inspect_model_folder(first).fingerprint != inspect_model_folder(copy).fingerprint


def test_fingerprint_tells_trainings_of_the_same_size_apart(tmp_path: Path) -> None:
    folder = write(tmp_path)
    before = inspect_model_folder(folder).fingerprint
    with (folder / "model.safetensors").open("r+b") as weights:
        weights.seek(-100, os.SEEK_END)
        weights.write(b"\1")
    assert inspect_model_folder(folder).fingerprint != before


def test_torch_is_not_imported() -> None:
    code = "import sys, baton_runtime.model_folder; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=15).returncode == 0
