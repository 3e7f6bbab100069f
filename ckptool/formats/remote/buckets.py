"""Files in buckets (``s3://``, ``gs://``), through the libraries that know how to sign in there."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError
from typing import Any

from ckptool.errors import UnreadableCheckpoint
from ckptool.formats.remote.ranges import Piece, changed

_LIBRARIES = {"s3": "s3fs", "gs": "gcsfs"}
# What tells one version of an object from another, as S3 and Google name it.
_VERSION_FIELDS = ("ETag", "VersionId", "LastModified", "etag", "generation", "md5Hash")


class BucketRanges:
    """Ask for ranges of one object; credentials are found where the library looks for them."""

    def __init__(self, address: str) -> None:
        scheme = address.partition(":")[0].lower()
        address = scheme + address[len(scheme) :]
        self._errors, self._system = _open_system(scheme)
        self._path = self._system._strip_protocol(address)
        self._state: tuple[int, tuple[str, ...]] | None = None

    def close(self) -> None:
        """Do nothing: the library keeps its connections for others."""

    def fetch(self, start: int, stop: int) -> Piece:
        """Give the bytes from ``start`` to ``stop``, as ``Ranges.fetch`` says."""
        try:
            before = self._state or self._look()
            end = min(stop, before[0])
            data = self._system.cat_file(self._path, start=start, end=end) if start < end else b""
            self._state = self._look()
        except self._errors as error:
            raise UnreadableCheckpoint(_reason(error)) from error
        if self._state != before:
            raise changed()
        return Piece(data, *before)

    def _look(self) -> tuple[int, tuple[str, ...]]:
        found: Mapping[str, Any] = self._system.info(self._path)
        if found.get("type") != "file":
            raise FileNotFoundError(self._path)
        return int(found["size"]), tuple(str(found.get(name, "")) for name in _VERSION_FIELDS)


def _open_system(scheme: str) -> tuple[tuple[type[Exception], ...], Any]:
    try:
        import fsspec
        from aiohttp import ClientError

        errors = _FOREIGN_ERRORS[scheme]()
        system = fsspec.filesystem(scheme, use_listings_cache=False, skip_instance_cache=True)
    except (ImportError, PackageNotFoundError) as error:
        raise UnreadableCheckpoint(
            f"{scheme}:// is read with {_LIBRARIES[scheme]}, which is not installed; pip install 'ckptool[remote]'"
        ) from error
    return (OSError, ValueError, RuntimeError, ClientError, *errors), system


def _amazon_errors() -> tuple[type[Exception], ...]:
    from botocore.exceptions import BotoCoreError, ClientError

    return BotoCoreError, ClientError


def _google_errors() -> tuple[type[Exception], ...]:
    from gcsfs.retry import HttpError
    from google.auth.exceptions import GoogleAuthError

    return HttpError, GoogleAuthError


_FOREIGN_ERRORS = {"s3": _amazon_errors, "gs": _google_errors}


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "there is no such object in the bucket; check the address"
    if isinstance(error, PermissionError) or "redential" in type(error).__name__ + str(error):
        return f"the bucket refuses it ({error!s:.200}); sign in, or ask for the right to read it"
    return f"the bucket cannot be read ({type(error).__name__}: {error!s:.200}); try again later"
