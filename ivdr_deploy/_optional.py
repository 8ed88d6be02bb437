"""Import of optional packages, with an error that says how to get them."""

from __future__ import annotations

import importlib
from types import ModuleType

from ivdr_deploy.errors import MissingDependencyError


def require(module: str, *, extra: str) -> ModuleType:
    """Import ``module``, or say which extra installs it.

    Raises:
        MissingDependencyError: if the module, or something it needs, cannot be imported. The cause is in the message,
            since a broken installation looks the same as an absent one otherwise.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingDependencyError(
            f"the package {module!r} cannot be imported ({error})",
            hint=f"install it with: pip install 'ivdr-deploy[{extra}]'",
        ) from error
