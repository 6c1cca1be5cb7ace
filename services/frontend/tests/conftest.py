"""Small model folders and a real HTTP server on port 0 over a FakeGenerator."""

import asyncio
from asyncio import AbstractEventLoop
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import uvloop
from baton_frontend.admission import Admission, AdmissionLimits
from baton_frontend.connections import ConnectionLimits
from baton_frontend.http_server import HttpServer
from baton_frontend.model_registry import ModelRegistry
from baton_frontend.openai_http import HttpRecord, HttpSettings, OpenAIHandlers
from baton_frontend.testing import FakeGenerator
from baton_frontend.testing_models import byte_level_tokenizer, model_info, write_model
from baton_frontend.tokenizer import WorkPool
from tokenizers import Tokenizer


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level model."""
    return write_model(tmp_path_factory.mktemp("models") / "bytes", byte_level_tokenizer(), eos_token="<|end|>")


@pytest.fixture(scope="session")
def tokenizer(model_folder: Path) -> Tokenizer:
    """Its tokenizer."""
    return Tokenizer.from_file(str(model_folder / "tokenizer.json"))


def pytest_asyncio_loop_factories(item: pytest.Item) -> dict[str, Callable[[], AbstractEventLoop]]:
    """The tests of HTTP run on the loop of production: it differs where it hurts (writes on a closed transport raise)."""
    is_http = item.path.stem.removeprefix("test_").startswith(("event_writer", "http", "openai"))
    return {"uvloop": uvloop.new_event_loop} if is_http else {"asyncio": asyncio.new_event_loop}


class Records(list[HttpRecord]):
    """An observer that keeps everything."""

    def on_call_end(self, record: HttpRecord) -> None:
        """Keep it."""
        self.append(record)


@dataclass
class Served:
    """A running server."""

    address: str
    generator: FakeGenerator
    records: Records
    pool: WorkPool
    admission: Admission
    server: HttpServer

    @property
    def url(self) -> str:
        """Base URL."""
        return f"http://{self.address}"


Serve = Callable[..., AbstractAsyncContextManager[Served]]


@pytest.fixture
def serve(model_folder: Path) -> Serve:
    """Starts a server; keyword arguments go to FakeGenerator, `settings` and `limits` to the handlers,
    `connections` to the server, `folder` and `max_model_tokens` to the model."""

    @asynccontextmanager
    async def start(
        *,
        settings: HttpSettings | None = None,
        limits: AdmissionLimits | None = None,
        connections: ConnectionLimits | None = None,
        folder: Path | None = None,
        max_model_tokens: int = 256,
        is_served: bool = True,
        exposition: bytes = b"up 1\n",
        **options: Any,
    ) -> AsyncIterator[Served]:
        settings = settings or HttpSettings()
        infos = [model_info(folder or model_folder, max_model_tokens=max_model_tokens)] if is_served else []
        generator, records, admission = FakeGenerator(infos, **options), Records(), Admission(limits)
        with WorkPool(num_threads=1) as pool:
            handlers = OpenAIHandlers(generator, ModelRegistry(pool), settings, admission=admission, observer=records)
            server = HttpServer(handlers, connections, metrics=lambda: exposition, close_timeout_s=1.0)
            address = await server.start("127.0.0.1:0")
            try:
                yield Served(address, generator, records, pool, admission, server)
            finally:
                await server.close()

    return start
