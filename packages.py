"""Packages that not every user needs: requirements-extra.txt has them."""

import importlib.util

from utils import InputError


def need(*packages: str) -> None:
    """Raise InputError if a package is not installed."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise InputError(f"{package} is needed: pip install -r requirements-extra.txt")
