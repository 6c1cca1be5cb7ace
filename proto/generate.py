"""Generate the Python stubs from proto/baton into proto/src/baton_contracts.

Run with the interpreter of an environment that has grpcio-tools 1.71 (`make proto` builds it): stubs made by 1.71 run on
protobuf 5.29 to 7.36, those of later releases tie the runtime to their own protobuf.

protoc derives Python module names from proto paths, which would put everything into a top-level package `baton`; the
imports are rewritten so that the distribution owns one import name, `baton_contracts`.
"""

import argparse
import re
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc  # type: ignore[import-untyped]

ROOT = Path(__file__).parent


def generate(out: Path) -> None:
    """Write `baton_contracts/<service>/v1/*_pb2*.py` and the descriptor image below out."""
    protos = sorted(p.relative_to(ROOT) for p in (ROOT / "baton").rglob("*.proto"))
    package = out / "baton_contracts"
    with tempfile.TemporaryDirectory() as tmp:
        well_known = str(files("grpc_tools") / "_proto")
        args = ["protoc", f"-I{ROOT}", f"-I{well_known}", f"--python_out={tmp}", f"--pyi_out={tmp}", f"--grpc_python_out={tmp}"]
        args += map(str, protos)
        if protoc.main(args) != 0:
            sys.exit("protoc failed")
        for made in sorted((Path(tmp) / "baton").rglob("*_pb2*.py*")):
            target = package / made.relative_to(Path(tmp) / "baton")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(re.sub(r"^from baton\.", "from baton_contracts.", made.read_text(), flags=re.M))
            for folder in (target.parent, target.parent.parent):
                (folder / "__init__.py").touch()


def differences(made: Path, committed: Path) -> list[str]:
    """Names of generated files that are missing or differ between the two trees."""
    names = {p.relative_to(made) for p in made.rglob("*") if p.is_file()}
    names |= {p.relative_to(committed) for p in committed.rglob("*_pb2*") if p.suffix in (".py", ".pyi")}
    return sorted(
        str(n)
        for n in names
        if n.name != "__init__.py"
        and not ((made / n).is_file() and (committed / n).is_file() and (made / n).read_bytes() == (committed / n).read_bytes())
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="compare with what is committed, change nothing")
    if not parser.parse_args().check:
        generate(ROOT / "src")
        return
    with tempfile.TemporaryDirectory() as tmp:
        generate(Path(tmp))
        changed = differences(Path(tmp), ROOT / "src")
    if changed:
        sys.exit("stubs differ from proto/baton; run `make proto`:\n  " + "\n  ".join(changed))


if __name__ == "__main__":
    main()
