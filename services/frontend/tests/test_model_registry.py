"""A model is loaded once, whoever asks; a folder that cannot be read is a refusal, not a crash."""

import asyncio
import dataclasses
import json
from pathlib import Path

import pytest
from baton_frontend.model_registry import ModelRegistry, read_model
from baton_frontend.testing_models import byte_level_tokenizer, metaspace_tokenizer, model_info, write_model
from baton_frontend.token_text import TokenTable
from baton_frontend.tokenizer import WorkPool
from baton_runtime.errors import Unavailable


async def test_many_callers_get_one_model(model_folder: Path) -> None:
    with WorkPool(num_threads=1, limit=1) as pool:
        registry = ModelRegistry(pool)
        info = model_info(model_folder)
        assert registry.find(info) is None
        models = await asyncio.gather(*[registry.load(info) for _ in range(5)])
        assert all(model is models[0] for model in models)
        assert registry.find(info) is models[0]


async def test_a_cancelled_first_caller_does_not_harm_the_next(model_folder: Path) -> None:
    with WorkPool(num_threads=1) as pool:
        registry = ModelRegistry(pool)
        async with asyncio.TaskGroup() as group:
            first = group.create_task(registry.load(model_info(model_folder)))
            second = group.create_task(registry.load(model_info(model_folder)))
            await asyncio.sleep(0)
            first.cancel()
        assert isinstance(second.result().text, TokenTable)


async def test_what_is_served_is_loaded_before_anyone_asks(model_folder: Path, tmp_path: Path) -> None:
    info = model_info(model_folder)
    missing = dataclasses.replace(info, path=str(tmp_path / "none"))
    with WorkPool(num_threads=1) as pool:
        registry = ModelRegistry(pool)
        async with asyncio.TaskGroup() as group:
            keeping = group.create_task(registry.keep_loaded(lambda: [missing, info]))
            async with asyncio.timeout(5):
                while registry.find(info) is None:
                    await asyncio.sleep(0.005)
            keeping.cancel()


async def test_a_folder_without_tokenizer_is_unavailable(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", byte_level_tokenizer(), eos_token="<|end|>")
    info = model_info(folder)
    (folder / "tokenizer.json").unlink()
    with WorkPool(num_threads=1) as pool, pytest.raises(Unavailable, match="tokenizer"):
        await ModelRegistry(pool).load(info)


async def test_a_load_that_takes_too_long_is_unavailable(model_folder: Path) -> None:
    with WorkPool(num_threads=1) as pool, pytest.raises(Unavailable):
        await ModelRegistry(pool, load_timeout_s=0.0).load(model_info(model_folder))


def test_the_demonstration_kind_of_model_gets_a_table(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", metaspace_tokenizer(), eos_token="<eos>")
    with WorkPool(num_threads=1) as pool:
        model, no_table = read_model(folder, 20, pool)
    assert no_table == ""
    stream = model.text.open(())
    assert "".join([stream.push([token]) for token in (11, 8, 1)]) == "4 1"


@pytest.mark.parametrize(("content", "expected"), [([3, 4], {3, 4}), (7, {7}), (None, {1})])
def test_generation_config_names_the_end_tokens(tmp_path: Path, content: object, expected: set[int]) -> None:
    folder = write_model(tmp_path / "m", byte_level_tokenizer(), eos_token="<|end|>")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": content}))
    with WorkPool(num_threads=1) as pool:
        assert read_model(folder, 500, pool)[0].eos_token_ids == expected


def test_without_configs_the_tokenizer_names_the_end_token(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", byte_level_tokenizer(), eos_token="<|end|>")
    (folder / "config.json").unlink()
    with WorkPool(num_threads=1) as pool:
        assert read_model(folder, 500, pool)[0].eos_token_ids == {byte_level_tokenizer().token_to_id("<|end|>")}
