"""From a URL that a user wrote to the store behind it, or to an error that says what is wrong with it.

Nothing is sent to a remote service here: a wrong bucket or a missing right shows at the first read or write.
"""

import os
from urllib.parse import unquote, urlsplit

from resilient.checkpoint.levels.files import FileStore
from resilient.checkpoint.levels.remote import RemoteStore
from resilient.checkpoint.levels.store import Store
from resilient.errors import NotACheckpoint, PolicyError

_EXTRAS = {"s3": "s3", "s3a": "s3"}  # protocol -> the extra of this distribution that brings its package


def open_store(url: str, *, retries: int = 5) -> Store:
    """The store for a folder's path, a file:// URL, or any URL that fsspec has a package for.

    The folder need not exist yet. Raises PolicyError for a URL that cannot work as it is (unknown protocol, missing
    package) and NotACheckpoint if there is a file in its place.
    """
    protocol, separator, _ = url.partition("://")
    if not url.strip():
        raise PolicyError("the URL of a level is empty; give a folder or a URL such as s3://bucket/run")
    if not separator:
        return _folder(os.path.expanduser(url))
    if protocol in ("file", "local"):
        return _folder(_path_of(url))
    return _remote(url, retries)


def _path_of(url: str) -> str:
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost"):
        raise PolicyError(
            f"{url} names the host {parts.netloc!r}; a local folder is written with three slashes: file:///folder"
        )
    return unquote(parts.path)


def _folder(path: str) -> FileStore:
    if os.path.lexists(path) and not os.path.isdir(path):
        raise NotACheckpoint(f"{path} is a file, not a folder with checkpoints; give the folder")
    return FileStore(path)


def _remote(url: str, retries: int) -> RemoteStore:
    try:
        return RemoteStore(url, retries=retries)
    except (ImportError, ValueError) as error:
        raise not_opened(url, error) from error


def not_opened(url: str, error: ImportError | ValueError) -> PolicyError:
    """What to tell the user when fsspec does not open a URL: a package is missing, or the protocol is unknown."""
    if isinstance(error, ImportError):
        extra = _EXTRAS.get(url.partition("://")[0])
        how = f"pip install 'torch-resilient[{extra}]'" if extra else str(error)
        return PolicyError(f"{url} needs a package that is not installed ({error}): {how}")
    return PolicyError(
        f"{url} cannot be opened ({error}); give a folder, or a URL whose protocol fsspec knows, such as s3://bucket/run"
    )
