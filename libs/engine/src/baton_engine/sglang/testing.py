"""Stands for an SGLang server in tests of what talks to one: the same command line, the same HTTP, and ways to make it misbehave.

    python -m baton_engine.sglang.testing --model-path ... --port ...

Token t + 1 follows token t. A prefill server answers, and a decode server begins to draw, when the room was met.

    POST /fake/meet {"room"}     both engines are there; --meet-at-once: they always are
    POST /fake/leak {"tokens"}   it says that so much KV is held
    POST /fake/fail {"rid"}      that request ends with an error of its own
    POST /fake/hang              it answers nothing any more, but /fake/
    GET  /fake/seen              the bodies of all requests so far
"""

import argparse
import asyncio
import json
import os
from array import array
from typing import Any

import msgspec
import zmq
import zmq.asyncio
from aiohttp import web

DRAW_S = 0.002
VOCAB = 512


class FakeServer:
    """State: requests by rid (how each is to end, once that is known), rooms that were met, and what it was told to pretend."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.ends: dict[str, dict[str, Any]] = {}
        self.met: dict[int, asyncio.Event] = {}
        self.seen: list[dict[str, Any]] = []
        self.leaked_tokens = 0
        self.healthy = asyncio.Event()
        self.healthy.set()
        self.publisher: zmq.asyncio.Socket | None = None
        self.published = 0
        config = json.loads(options.kv_events_config) if options.kv_events_config else None
        if config is not None:
            self.publisher = zmq.asyncio.Context.instance().socket(zmq.PUB)
            self.publisher.bind(config["endpoint"])

    def app(self) -> web.Application:
        """Everything it answers."""
        app = web.Application(middlewares=[self._guard], client_max_size=64 << 20)
        app.add_routes(
            [
                web.get("/health", self._health),
                web.get("/server_info", self._server_info),
                web.get("/v1/loads", self._loads),
                web.post("/generate", self._generate),
                web.post("/abort_request", self._abort),
                web.post("/fake/meet", self._meet),
                web.post("/fake/leak", self._leak),
                web.post("/fake/hang", self._hang),
                web.post("/fake/fail", self._fail),
                web.get("/fake/seen", self._seen),
            ]
        )
        return app

    @web.middleware
    async def _guard(self, request: web.Request, handler: Any) -> web.StreamResponse:
        if request.path != "/health" and request.headers.get("Authorization") != f"Bearer {self.options.api_key}":
            return web.Response(status=401)
        if not request.path.startswith("/fake/"):
            await self.healthy.wait()
        response: web.StreamResponse = await handler(request)
        return response

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response()

    async def _server_info(self, request: web.Request) -> web.Response:
        return web.json_response(
            {
                "version": "0.5.23",
                "max_total_num_tokens": self.options.max_total_tokens,
                "max_req_input_len": 1018,
                "page_size": self.options.page_size,
                "max_running_requests": self.options.max_running_requests,
                "dtype": "float32",
                "kv_cache_dtype": "auto",
                "skip_tokenizer_init": self.options.skip_tokenizer_init,
                "disaggregation_transfer_backend": "nixl",
            }
        )

    async def _loads(self, request: web.Request) -> web.Response:
        load = {"num_running_reqs": len(self.ends), "num_waiting_reqs": 0, "num_used_tokens": self.leaked_tokens}
        return web.json_response({"loads": [load]})

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.seen.append(body)
        if len(body["input_ids"]) > 1018:
            return web.json_response({"error": {"message": "too long"}}, status=400)
        rid, sampling = body["rid"], body["sampling_params"]
        self.ends[rid] = {}
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        try:
            await response.prepare(request)
            await self._answer(response, body, rid, sampling)
        finally:
            del self.ends[rid]
        return response

    async def _answer(self, response: web.StreamResponse, body: dict[str, Any], rid: str, sampling: dict[str, Any]) -> None:
        drawn, stops = 0, set(sampling.get("stop_token_ids", ()))
        room = body.get("bootstrap_room")
        while room is not None and not (self.options.meet_at_once or self._room(room).is_set()):
            if self.ends[rid]:
                return await self._say(response, [], body, self.ends[rid] | {"type": "abort"})
            await asyncio.sleep(DRAW_S)
        await self._publish(body)
        if self.options.disaggregation_mode == "prefill":
            return await self._say(response, [body["input_ids"][-1] + 1], body, {"type": "length", "length": 0})
        finish: dict[str, Any] | None = None
        while finish is None:
            if self.ends[rid]:
                return await self._say(response, [], body, self.ends[rid] | {"type": "abort"})
            drawn += 1
            token = (body["input_ids"][-1] + drawn) % VOCAB
            if token in stops and not sampling["ignore_eos"]:
                finish = {"type": "stop", "matched": token}
            elif drawn == sampling["max_new_tokens"]:
                finish = {"type": "length", "length": drawn}
            await self._say(response, [token], body, finish)
            await asyncio.sleep(DRAW_S)

    async def _say(self, response: web.StreamResponse, tokens: list[int], body: dict[str, Any], finish: dict[str, Any] | None) -> None:
        meta: dict[str, Any] = {"finish_reason": finish, "cached_tokens": 0}
        if body.get("return_logprob"):
            meta["output_token_logprobs"] = [[-0.5, token, None] for token in tokens]
            meta["output_top_logprobs"] = [[[-0.5 - n, token + n, None] for n in range(body["top_logprobs_num"])] for token in tokens]
        piece = {"output_ids": tokens, "meta_info": meta}
        await response.write(f"data: {json.dumps(piece)}\n\n".encode() + (b"data: [DONE]\n\n" if finish else b""))

    async def _publish(self, body: dict[str, Any]) -> None:
        size, tokens = self.options.page_size, body["input_ids"]
        pages = [tokens[i : i + size] for i in range(0, len(tokens) - size + 1, size)]
        if self.publisher is None or not pages:
            return
        hashes = [hash(tuple(array("I", tokens[: (i + 1) * size]))) for i in range(len(pages))]
        event = {"type": "BlockStored", "block_hashes": hashes, "parent_block_hash": None, "token_ids": [t for page in pages for t in page]}
        event |= {"block_size": size, "lora_id": None, "medium": "GPU", "cache_salt": body.get("cache_salt")}
        payload = msgspec.msgpack.encode([0.0, [event], 0])
        await self.publisher.send_multipart([b"kv", self.published.to_bytes(8, "big"), payload])
        self.published += 1

    async def _abort(self, request: web.Request) -> web.Response:
        rid = (await request.json())["rid"]
        if rid in self.ends:
            self.ends[rid] = {"message": "Aborted"}
        return web.Response()

    async def _fail(self, request: web.Request) -> web.Response:
        self.ends[(await request.json())["rid"]] = {"message": "transfer failed", "status_code": 500}
        return web.Response()

    async def _meet(self, request: web.Request) -> web.Response:
        self._room((await request.json())["room"]).set()
        return web.Response()

    async def _leak(self, request: web.Request) -> web.Response:
        self.leaked_tokens = (await request.json())["tokens"]
        return web.Response()

    async def _hang(self, request: web.Request) -> web.Response:
        self.healthy.clear()
        return web.Response()

    async def _seen(self, request: web.Request) -> web.Response:
        return web.json_response(self.seen)

    def _room(self, room: int) -> asyncio.Event:
        return self.met.setdefault(room, asyncio.Event())


def main() -> None:
    """Serve until killed; flags that are not known here are ignored, as long as SGLang has them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--api-key", default="")
    parser.add_argument("--disaggregation-mode", default="null")
    parser.add_argument("--kv-events-config", default="")
    parser.add_argument("--skip-tokenizer-init", action="store_true")
    parser.add_argument("--max-total-tokens", type=int, default=4096)
    parser.add_argument("--max-running-requests", type=int, default=4)
    parser.add_argument("--meet-at-once", action="store_true")
    parser.add_argument("--exit-at-start", type=int, default=0)
    options, _ = parser.parse_known_args()
    if options.exit_at_start:
        os._exit(options.exit_at_start)
    asyncio.run(_serve(options))


async def _serve(options: argparse.Namespace) -> None:
    runner = web.AppRunner(FakeServer(options).app())
    await runner.setup()
    await web.TCPSite(runner, options.host, options.port).start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    main()
