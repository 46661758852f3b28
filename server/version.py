"""The installed version."""

from importlib.metadata import PackageNotFoundError, version

try:
    VERSION = version("sp-serve")
except PackageNotFoundError:  # run from a checkout
    VERSION = "0+unknown"
