"""Who may import whom: the rules are in .importlinter, this runs them."""

from importlinter.cli import EXIT_STATUS_SUCCESS, lint_imports


def test_services_import_contracts_and_libraries_only() -> None:
    """A service importing another one, or a library importing a service, breaks independent versions."""
    assert lint_imports(config_filename=".importlinter", no_cache=True) == EXIT_STATUS_SUCCESS
