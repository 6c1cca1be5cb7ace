"""`baton-frontend`: reads the settings and runs the service. Wiring is in service.py."""

from importlib.metadata import version
from typing import NoReturn

from baton_runtime.config import config_file, load
from baton_runtime.lifecycle import run

from baton_frontend.config import FrontendConfig
from baton_frontend.service import FrontendService


def main() -> NoReturn:
    """Entry point."""
    file = config_file("frontend", version=version("baton-frontend"))
    run(lambda: FrontendService(load(FrontendConfig, "frontend", file)))


if __name__ == "__main__":
    main()
