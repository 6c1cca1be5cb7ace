"""Asks whether a service serves, for health checks of containers: exit 0 if it does, else 1 and one line on stderr that says why.

python -m baton_runtime.probe 127.0.0.1:7000                        grpc.health.v1 of the whole server
python -m baton_runtime.probe --tls /certificates 127.0.0.1:7000    the same over TLS, with the service's own certificate
python -m baton_runtime.probe http://127.0.0.1:8000/ready           a status of 200
"""

import argparse
import asyncio
import http.client
import sys
import urllib.error
import urllib.request
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from baton_runtime import tls
from baton_runtime.errors import ConfigError


def why_not(target: str, limit_s: float) -> str:
    """What speaks against target (host:port of a gRPC server, or a URL) serving; empty: it does. Returns within limit_s or soon after."""
    return _why_not_http(target, limit_s) if target.startswith("http") else _why_not_grpc(target, limit_s)


def _why_not_http(url: str, limit_s: float) -> str:
    # Not through a proxy that the environment names: who is asked is in this container.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=limit_s):
            return ""
    except urllib.error.HTTPError as error:
        error.close()
        return f"status {error.code}"
    except (OSError, http.client.HTTPException) as error:
        return str(error) or type(error).__name__


def _why_not_grpc(address: str, limit_s: float) -> str:
    try:
        answer = asyncio.run(_check(address, limit_s))
    except grpc.aio.AioRpcError as error:
        return f"{error.code().name}: {error.details()}"
    status = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    return "" if answer.status == health_pb2.HealthCheckResponse.SERVING else status


async def _check(address: str, limit_s: float) -> health_pb2.HealthCheckResponse:
    async with tls.channel(address, [("grpc.enable_http_proxy", 0)], tls.ANY_SERVICE) as channel:
        return await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=limit_s)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m baton_runtime.probe", description="Asks whether a service serves.")
    parser.add_argument("target", help="host:port of a gRPC server, or a URL")
    parser.add_argument("--limit", type=float, default=4.0, metavar="S", help="seconds to wait for the answer (default: 4)")
    parser.add_argument("--tls", type=Path, metavar="DIR", help="with ca.pem, certificate.pem and key.pem (docs/security.md)")
    arguments = parser.parse_args()
    if arguments.tls is not None:
        try:
            tls.use(tls.TlsFiles(arguments.tls / "ca.pem", arguments.tls / "certificate.pem", arguments.tls / "key.pem"))
        except ConfigError as error:
            sys.exit(error.message)
    if why := why_not(arguments.target, arguments.limit):
        sys.exit(f"{arguments.target}: {why}")


if __name__ == "__main__":
    main()
