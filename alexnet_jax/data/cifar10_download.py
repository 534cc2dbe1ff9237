"""Download of CIFAR-10 to the user's cache directory, resumed after an interruption and checked by SHA-256.

It uses the standard library's HTTP. Pooch (1.9) does not resume with a range request, does not stop at the published
size and accepts only one hash: most of this module would remain, as a custom downloader.
"""

import contextlib
import dataclasses
import hashlib
import http.client
import math
import os
import pathlib
import queue
import re
import shutil
import signal
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from typing import NoReturn

import platformdirs
import tqdm

from alexnet_jax import files, signals
from alexnet_jax.errors import AlexNetError, command, program_name, reason, shown, warn

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"


@dataclasses.dataclass(frozen=True)
class Published:
    """An archive that the authors publish."""

    name: str
    size: int
    sha256: str


# The first as TFDS registers it (url_checksums/cifar10.txt), the second as Keras does (keras/datasets/cifar10.py).
PUBLISHED = (
    Published(
        "cifar-10-binary.tar.gz", 170_052_171, "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
    ),
    Published(
        "cifar-10-python.tar.gz", 170_498_071, "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"
    ),
)

ANSWER_SECONDS = 8.0  # for the headers, including the look-up of the name
_SILENCE_SECONDS = 30.0  # between two pieces
ATTEMPTS = 5  # in a row that add less than PROGRESS_BYTES
PROGRESS_BYTES = 1024**2
PAUSE_SECONDS = 1.0  # before the second attempt; doubles
_CHUNK_BYTES = 64 * 1024

_WITHOUT = (
    "give --data-dir with cifar-10-python.tar.gz, or with a folder that contains cifar-10-batches-py or "
    f"cifar-10-batches-bin; `{command('train')} quickstart` needs no data"
)


class _CutOffError(Exception):
    """An attempt failed, but the next one can succeed."""


def cached() -> pathlib.Path | None:
    """The archive downloaded earlier, if any; a damaged one is deleted."""
    with contextlib.suppress(OSError):
        for archive in PUBLISHED:
            path = cache_folder() / archive.name
            if os.path.isfile(path):
                if path.stat().st_size == archive.size and _digest(path).hexdigest() == archive.sha256:
                    return path
                warn(f"{path} is damaged: deleted")
                path.unlink()
    return None


def download(url: str, searched: str) -> pathlib.Path:
    """Downloads one of the `PUBLISHED` archives, once even if several processes call this at the same time.

    Args:
      url: its address, on any host, since the bytes are checked.
      searched: the places where CIFAR-10 was not found, for messages.

    Raises:
      AlexNetError: it can't be downloaded or stored. The bytes that have arrived are kept for the next attempt unless
        they are known to be wrong.
    """
    folder = cache_folder()
    # Named by the address, so that parts of different files are never mixed.
    partial = folder / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}.part"
    try:
        if not folder.is_absolute():
            raise OSError("there is no home directory")
        folder.mkdir(parents=True, exist_ok=True)
        waiting = "another process is downloading CIFAR-10: waiting for it"
        with files.locked(folder / "download.lock", "is downloading CIFAR-10", math.inf, waiting):
            if path := cached():
                return path
            try:
                with _stop_signals(f"stopped; the downloaded part is in {partial}, and the same command resumes"):
                    archive = _fetch(url, partial, searched)
            finally:
                if partial.exists() and not partial.stat().st_size:
                    partial.unlink()
            files.sync(partial)
            partial.replace(folder / archive.name)
            for part in folder.glob("*.part"):  # of other addresses
                part.unlink()
            files.sync(folder)
    except OSError as error:
        raise AlexNetError(
            f"can't download CIFAR-10 to {folder} ({reason(error)}): get {_without_query(url)} by other means and give "
            "--data-dir FILE"
        ) from error
    return folder / archive.name


def cache_folder() -> pathlib.Path:
    """Where downloads are stored."""
    return platformdirs.user_cache_path("alexnet_jax") / "datasets"


def _digest(path: pathlib.Path) -> "hashlib._Hash":
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256")


def _without_query(url: str) -> str:
    """An address for a message: a query can hold a password."""
    return shown(url.partition("?")[0], 200)


@contextlib.contextmanager
def _stop_signals(message: str) -> Iterator[None]:
    """Makes signals end the process at once with a message, if `cli.run` has set handlers for them."""
    below_the_bar = "\n" if sys.stderr.isatty() else ""
    stop = signals.leave_at_once(below_the_bar + program_name(), message)
    before = {}
    if threading.current_thread() is threading.main_thread():
        handlers = {number: signal.getsignal(number) for number in signals.handled()}
        before = {n: h for n, h in handlers.items() if callable(h) and h is not signal.default_int_handler}
    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _fetch(url: str, partial: pathlib.Path, searched: str) -> Published:
    """Completes `partial`, in as many attempts as it takes while they make progress."""
    failures, most = 0, 0
    connected = False
    while True:
        have = partial.stat().st_size if partial.exists() else 0
        digest = _digest(partial) if have else hashlib.sha256()
        for archive in PUBLISHED:
            if have == archive.size and digest.hexdigest() == archive.sha256:
                return archive  # the process ended before it was renamed
        if have >= max(archive.size for archive in PUBLISHED):
            partial.unlink()
            continue
        try:
            response, start, total = _request(url, have)
            with response:
                if start == 0:
                    digest = hashlib.sha256()
                _check_size(url, total)
                if not connected:
                    _announce(url, partial, start, total)
                connected = True
                return _receive(url, response, partial, digest, start, total)
        except _CutOffError as error:
            fault = f"{error}{_through_proxy(url)}"
            if not connected:
                raise AlexNetError(
                    f"CIFAR-10 is not at {searched}, and {_host(url)} can't be reached ({fault}): {_WITHOUT}"
                ) from error
            have = partial.stat().st_size if partial.exists() else 0
            failures = 0 if have >= most + PROGRESS_BYTES else failures + 1
            most = max(most, have)
            if failures == ATTEMPTS:
                raise AlexNetError(
                    f"{_without_query(url)}: the connection keeps failing ({fault}); {_mb(have)} are in "
                    f"{partial}, and the same command resumes; or {_WITHOUT}"
                ) from error
        time.sleep(PAUSE_SECONDS * 2**failures / 2)


def _request(url: str, have: int) -> tuple[http.client.HTTPResponse, int, int | None]:
    """Requests the bytes after the first `have`.

    Returns:
      The open response; the byte at which it begins, `have` or 0; the size of the file, None if the server doesn't say.
    """
    headers = {"User-Agent": "alexnet_jax"} | ({"Range": f"bytes={have}-"} if have else {})
    try:
        response = _open(urllib.request.Request(url, headers=headers))
    except urllib.error.HTTPError as error:
        error.close()  # it is an open response
        if error.code == 416 and have:
            return _request(url, 0)
        raise _CutOffError(reason(error)) from error
    except urllib.error.URLError as error:
        cause = error.reason
        raise _CutOffError(reason(cause) if isinstance(cause, BaseException) else shown(cause, 200)) from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise _CutOffError(reason(error)) from error
    if response.status != 206:
        length = response.headers.get("Content-Length", "")
        return response, 0, int(length) if re.fullmatch("[0-9]{1,15}", length) else None
    sent = response.headers.get("Content-Range", "")
    found = re.fullmatch(r"bytes ([0-9]{1,15})-[0-9]{1,15}/([0-9]{1,15}|\*)", sent)
    if found and have and int(found[1]) == have:
        return response, have, None if found[2] == "*" else int(found[2])
    response.close()
    if have:
        return _request(url, 0)
    raise _CutOffError("the server sent a part of the file that was not requested")


def _open(request: urllib.request.Request) -> http.client.HTTPResponse:
    """Sends a request and waits ANSWER_SECONDS for the headers of the response.

    A socket's timeout doesn't cover the look-up of the name. If the look-up hangs, its thread is abandoned.
    """
    answers: queue.SimpleQueue[http.client.HTTPResponse | Exception] = queue.SimpleQueue()
    late = threading.Event()

    def ask() -> None:
        try:
            opener = urllib.request.build_opener()  # urlopen's own would keep the proxies of its first call
            response = opener.open(request, timeout=_SILENCE_SECONDS)
        except Exception as error:
            answers.put(error)
        else:
            answers.put(response)
            if late.is_set():
                response.close()

    threading.Thread(target=ask, daemon=True).start()
    try:
        answer = answers.get(timeout=ANSWER_SECONDS)
    except queue.Empty:
        late.set()
        raise _CutOffError(f"no answer in {ANSWER_SECONDS:g} s") from None
    if isinstance(answer, Exception):
        raise answer
    return answer


def _through_proxy(url: str) -> str:
    """The proxy that urllib uses for an address, without its password, as the end of a message."""
    parts = urllib.parse.urlsplit(url)
    proxy = urllib.request.getproxies().get(parts.scheme)
    if not proxy or urllib.request.proxy_bypass(parts.netloc):
        return ""
    return f", through the proxy {shown(proxy.rpartition('@')[2].rpartition('//')[2])}"


def _check_size(url: str, total: int | None) -> None:
    if total is not None and total not in {archive.size for archive in PUBLISHED}:
        sizes = " or ".join(f"{archive.size:,} ({archive.name})" for archive in PUBLISHED)
        raise AlexNetError(
            f"{_without_query(url)}: {total:,} bytes instead of {sizes}: this is not CIFAR-10 as published"
        )


def _announce(url: str, partial: pathlib.Path, start: int, total: int | None) -> None:
    size = total or PUBLISHED[0].size
    free = shutil.disk_usage(partial.parent).free
    if free < size - start:
        raise OSError(f"{_mb(size - start)} are needed, {_mb(free)} are free")
    slow = "is slow (about 70 kB/s, 40 minutes)" if url == URL else "can be slow"
    print(
        f"downloading CIFAR-10 ({_mb(size)}{f', {_mb(start)} are there' if start else ''}) to {partial.parent}: "
        f"{_host(url)} {slow}: if you have cifar-10-python.tar.gz, stop and use --data-dir FILE; "
        f"`{command('train')} quickstart` needs no data",
        file=sys.stderr,
        flush=True,
    )


def _receive(
    url: str,
    response: http.client.HTTPResponse,
    partial: pathlib.Path,
    digest: "hashlib._Hash",
    start: int,
    total: int | None,
) -> Published:
    """Appends a response to the first `start` bytes until they are a published archive.

    If the response begins at 0 although bytes are stored already, these are compared with it, and kept if equal.

    Raises:
      _CutOffError: the response ends too early.
      AlexNetError: the bytes are not a published archive's; they are deleted.
    """
    have, complete = start, False
    with partial.open("a+b") as file, _bar(start, total) as bar:
        stored = file.seek(0, os.SEEK_END)
        for archive in sorted(PUBLISHED, key=lambda archive: archive.size):
            while have < archive.size and not complete:
                try:
                    data = response.read1(min(_CHUNK_BYTES, archive.size - have))
                except (OSError, http.client.HTTPException) as error:
                    raise _CutOffError(reason(error)) from error
                if not data:
                    complete = response.chunked and have >= stored  # only a chunked response marks its end
                    if not complete:
                        raise _CutOffError(f"cut off after {_mb(have)}")
                    continue
                if have == 0 and data[:1] != b"\x1f":
                    raise AlexNetError(
                        f"{_without_query(url)}: not a gzip file (it begins with {shown(repr(data[:20])[2:-1])}): "
                        "give the address of a published archive"
                    )
                new = data
                if have < stored:
                    file.seek(have)
                    old = file.read(len(data))
                    if data.startswith(old):
                        new = data[len(old) :]
                    else:
                        stored = file.truncate(have)
                file.write(new)
                file.flush()  # nothing is lost if the process is killed
                digest.update(data)
                have += len(data)
                bar.update(len(data))
            if have == archive.size and digest.hexdigest() == archive.sha256:
                bar.leave = True
                file.truncate(have)  # a longer partial file was stored
                return archive
            if complete or have == total:
                break
    partial.unlink()
    expected = " or ".join(archive.sha256 for archive in PUBLISHED if total in (archive.size, None))
    raise AlexNetError(
        f"{_without_query(url)}: the download isn't the published archive (SHA-256 {digest.hexdigest()} instead of "
        f"{expected}); it was deleted: try again, or {_WITHOUT}"
    )


def _bar(start: int, total: int | None) -> "tqdm.tqdm[NoReturn]":
    """A progress bar on a terminal, else a line every half minute."""
    terminal = sys.stderr.isatty()  # the bar of an attempt that fails is removed
    return tqdm.tqdm(
        desc="CIFAR-10",
        initial=start,
        total=total,
        unit="B",
        unit_scale=True,
        ncols=shutil.get_terminal_size().columns,  # tqdm would take 0 from a terminal that doesn't report its width
        leave=not terminal,
        mininterval=0.2 if terminal else 30,
        bar_format=None if terminal else "{desc}: {n_fmt} of {total_fmt}, {rate_fmt}, {remaining} left\n",
    )


def _host(url: str) -> str:
    return shown(urllib.parse.urlsplit(url).netloc)


def _mb(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
