"""The version that is installed."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("oncelm")
except PackageNotFoundError:  # a source tree on the path that nobody installed
    __version__ = "unknown"
