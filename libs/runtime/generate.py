"""Generate src/baton_runtime/etcd/etcd_pb2.py and .pyi from etcd.proto.

Run with an interpreter that has grpcio-tools 1.71, as proto/generate.py does.
--check compares with what is committed and changes nothing.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from grpc_tools import protoc  # type: ignore

ROOT = Path(__file__).parent / "src"
# The path is part of the descriptor's name: a bare etcd.proto could clash with somebody else's.
PROTO = Path("baton_runtime/etcd/etcd.proto")
MADE = (PROTO.with_name("etcd_pb2.py"), PROTO.with_name("etcd_pb2.pyi"))


def generate(out: Path) -> None:
    """Write the stubs below out."""
    if protoc.main(["protoc", f"-I{ROOT}", f"--python_out={out}", f"--pyi_out={out}", str(PROTO)]) != 0:
        sys.exit("protoc failed")


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description="Generate the stubs of etcd.proto.")
    parser.add_argument("--check", action="store_true", help="compare with what is committed, change nothing")
    if not parser.parse_args().check:
        generate(ROOT)
        return
    with tempfile.TemporaryDirectory() as tmp:
        generate(Path(tmp))
        stale = [str(name) for name in MADE if (Path(tmp) / name).read_bytes() != (ROOT / name).read_bytes()]
    if stale:
        sys.exit(f"stale: {stale}; run this without --check")


if __name__ == "__main__":
    main()
