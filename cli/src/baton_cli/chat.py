"""`baton chat`: a conversation over the OpenAI-compatible API, streamed."""

import asyncio
import sys

import aiohttp
import click
import msgspec

_LIMITS = aiohttp.ClientTimeout(total=None, sock_connect=5, sock_read=120)  # a stream may be silent while a prompt is read


class _Delta(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta


class _Failure(msgspec.Struct):
    message: str


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    error: _Failure | None = None


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


async def run(url: str, model: str, message: str | None, max_tokens: int | None, temperature: float) -> None:
    """Answer one message, or read messages from the terminal until it ends.

    Raises: click.ClickException with the server's own words if it refuses.
    """
    try:
        async with aiohttp.ClientSession(timeout=_LIMITS) as session:
            model = model or await _first_model(session, url)
            settings: dict[str, object] = {"model": model, "stream": True, "temperature": temperature}
            if max_tokens is not None:
                settings["max_tokens"] = max_tokens
            if message is not None:
                await _answer(session, url, settings, [{"role": "user", "content": message}])
                return
            await _converse(session, url, settings)
    except aiohttp.ClientError as error:
        raise click.ClickException(f"{url}: {error}") from error


async def _converse(session: aiohttp.ClientSession, url: str, settings: dict[str, object]) -> None:
    click.echo(f"talking to {settings['model']}; Ctrl-D ends", err=True)
    messages: list[dict[str, str]] = []
    while True:
        try:
            messages.append({"role": "user", "content": await asyncio.to_thread(input, "> ")})
        except EOFError:
            return
        text = await _answer(session, url, settings, messages)
        messages.append({"role": "assistant", "content": text})


async def _first_model(session: aiohttp.ClientSession, url: str) -> str:
    async with session.get(f"{url}/v1/models") as response:
        models = msgspec.json.decode(await response.read(), type=_Models).data
    if not models:
        raise click.ClickException(f"{url} serves no model yet; see: baton status")
    return models[0].id


async def _answer(session: aiohttp.ClientSession, url: str, settings: dict[str, object], messages: list[dict[str, str]]) -> str:
    """Print the answer as it comes; returns all of it."""
    parts: list[str] = []
    async with session.post(f"{url}/v1/chat/completions", json={**settings, "messages": messages}) as response:
        if response.status != 200:
            failure = msgspec.json.decode(await response.read(), type=_Chunk).error
            raise click.ClickException(f"{response.status}: {failure.message if failure else response.reason}")
        async for line in response.content:
            data = line.strip().removeprefix(b"data: ")
            if not line.startswith(b"data: ") or data == b"[DONE]":
                continue
            chunk = msgspec.json.decode(data, type=_Chunk)
            if chunk.error is not None:
                raise click.ClickException(chunk.error.message)
            for choice in chunk.choices:
                parts.append(choice.delta.content or "")
                sys.stdout.write(parts[-1])
                sys.stdout.flush()
    sys.stdout.write("\n")
    return "".join(parts)
