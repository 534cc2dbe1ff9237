"""Download of CIFAR-10 into the user's cache directory: resumed where it was cut off, checked by SHA-256.

HTTP is the standard library's. Pooch (1.9) was considered: it does not resume by a range request, does not stop at the
published size and accepts one hash only, so that most of this module would be needed as its custom downloader.
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
from alexnet_jax.errors import AlexNetError, program_name, shown, warn

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

_ANSWER_SECONDS = 8.0  # until the headers have come, with looking up the name
_SILENCE_SECONDS = 30.0  # between two pieces
_ATTEMPTS = 5  # in a row that bring less than _PROGRESS_BYTES
_PROGRESS_BYTES = 1024**2
_PAUSE_SECONDS = 1.0  # before the second attempt; doubles
_CHUNK_BYTES = 64 * 1024

_WITHOUT = (
    "give --data-dir with cifar-10-python.tar.gz, or with a folder that holds cifar-10-batches-py or "
    "cifar-10-batches-bin; `python train.py quickstart` needs no data"
)


class _CutOffError(Exception):
    """An attempt failed, and the next may not."""


def cached() -> pathlib.Path | None:
    """The archive that was downloaded before, if there is one; a damaged one is deleted."""
    with contextlib.suppress(OSError):
        for archive in PUBLISHED:
            path = _folder() / archive.name
            if os.path.isfile(path):
                if path.stat().st_size == archive.size and _digest(path).hexdigest() == archive.sha256:
                    return path
                warn(f"{path} is damaged: deleted")
                path.unlink()
    return None


def download(url: str, looked: str) -> pathlib.Path:
    """Downloads one of the `PUBLISHED` archives; several processes at once download it once.

    Args:
      url: where one of them is; its bytes are checked, so that any host will do.
      looked: where CIFAR-10 is not, for the message.

    Raises:
      AlexNetError: it can't be had, or can't be stored. What has arrived is kept for the next attempt unless it is
        known to be wrong.
    """
    folder = _folder()
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
                with _stop_signals(f"stopped; what has arrived is in {partial}, and the same command resumes"):
                    archive = _fetch(url, partial, looked)
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
            f"can't download CIFAR-10 to {folder} ({error.strerror or error}): get {_without_query(url)} by other "
            "means and give --data-dir FILE"
        ) from error
    return folder / archive.name


def _folder() -> pathlib.Path:
    return platformdirs.user_cache_path("alexnet_jax") / "datasets"


def _digest(path: pathlib.Path) -> "hashlib._Hash":
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256")


def _without_query(url: str) -> str:
    """An address as part of a message: a query can hold a password."""
    return shown(url.partition("?")[0], 200)


@contextlib.contextmanager
def _stop_signals(message: str) -> Iterator[None]:
    """Makes signals end the process at once with this message, where `cli.run` has set handlers for them."""
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


def _fetch(url: str, partial: pathlib.Path, looked: str) -> Published:
    """Fills `partial`, in as many attempts as bring it forward."""
    failures, most = 0, 0
    connected = False
    while True:
        have = partial.stat().st_size if partial.exists() else 0
        digest = _digest(partial) if have else hashlib.sha256()
        for archive in PUBLISHED:
            if have == archive.size and digest.hexdigest() == archive.sha256:
                return archive  # ended before it was renamed
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
            reason = f"{error}{_through_proxy(url)}"
            if not connected:
                host = shown(urllib.parse.urlsplit(url).netloc)
                raise AlexNetError(
                    f"CIFAR-10 is not at {looked}, and {host} can't be reached ({reason}): {_WITHOUT}"
                ) from error
            have = partial.stat().st_size if partial.exists() else 0
            failures = 0 if have >= most + _PROGRESS_BYTES else failures + 1
            most = max(most, have)
            if failures == _ATTEMPTS:
                raise AlexNetError(
                    f"{_without_query(url)}: the connection fails again and again ({reason}); {_mb(have)} are in "
                    f"{partial}, and the same command resumes; or {_WITHOUT}"
                ) from error
        time.sleep(_PAUSE_SECONDS * 2**failures / 2)


def _request(url: str, have: int) -> tuple[http.client.HTTPResponse, int, int | None]:
    """Asks for what comes after the first `have` bytes.

    Returns:
      The open response; at which byte it begins, `have` or 0; the size of the file, None if the server doesn't say.
    """
    headers = {"User-Agent": "alexnet_jax"} | ({"Range": f"bytes={have}-"} if have else {})
    answers: queue.SimpleQueue[http.client.HTTPResponse | Exception] = queue.SimpleQueue()
    late = threading.Event()

    def ask() -> None:
        try:
            opener = urllib.request.build_opener()  # urlopen's own would keep the proxies of its first call
            response = opener.open(urllib.request.Request(url, headers=headers), timeout=_SILENCE_SECONDS)
        except Exception as error:
            answers.put(error)
        else:
            answers.put(response)
            if late.is_set():
                response.close()

    # The timeout of a socket doesn't cover looking up the name, which can hang; a daemon thread can be left to that.
    threading.Thread(target=ask, daemon=True).start()
    try:
        answer = answers.get(timeout=_ANSWER_SECONDS)
    except queue.Empty:
        late.set()
        raise _CutOffError(f"no answer in {_ANSWER_SECONDS:g} s") from None
    if isinstance(answer, urllib.error.HTTPError):
        answer.close()  # it is an open response too
    if isinstance(answer, Exception):
        if isinstance(answer, urllib.error.HTTPError) and answer.code == 416 and have:
            return _request(url, 0)
        raise _CutOffError(_reason(answer)) from answer
    length = answer.headers.get("Content-Length", "")
    if answer.status != 206:
        return answer, 0, int(length) if re.fullmatch("[0-9]{1,15}", length) else None
    found = re.fullmatch(r"bytes ([0-9]{1,15})-[0-9]{1,15}/([0-9]{1,15}|\*)", answer.headers.get("Content-Range", ""))
    if not found or int(found[1]) != have or not have:
        answer.close()
        if have:
            return _request(url, 0)
        raise _CutOffError("it answers with a part of the file that was not asked for")
    return answer, have, None if found[2] == "*" else int(found[2])


def _reason(error: BaseException) -> str:
    """What urllib found wrong, in a few words."""
    if isinstance(error, urllib.error.URLError) and not isinstance(error, urllib.error.HTTPError):
        error = error.reason if isinstance(error.reason, BaseException) else error
    text = (isinstance(error, OSError) and error.strerror) or str(error)
    return shown(" ".join(text.split()) or type(error).__name__, 200)


def _through_proxy(url: str) -> str:
    """Which proxy urllib asks for this address, without the password that it can have."""
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
    host = shown(urllib.parse.urlsplit(url).netloc)
    slow = "is slow (about 70 kB/s, 40 minutes)" if url == URL else "can be slow"
    print(
        f"downloading CIFAR-10 ({_mb(size)}{f', {_mb(start)} are there' if start else ''}) to {partial.parent}: {host} "
        f"{slow}: if you have cifar-10-python.tar.gz, stop and give --data-dir FILE; `python train.py quickstart` "
        "needs no data",
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
    """Appends what a response holds to the first `start` bytes, until they are a published archive.

    Of a response that begins at 0 although more is stored, the part that is stored is compared and kept.

    Raises:
      _CutOffError: the response ends before that.
      AlexNetError: its bytes are others; they are deleted.
    """
    have, complete = start, False
    with partial.open("a+b") as file, _bar(start, total) as bar:
        stored = file.seek(0, os.SEEK_END)
        for archive in sorted(PUBLISHED, key=lambda archive: archive.size):
            while have < archive.size and not complete:
                try:
                    data = response.read1(min(_CHUNK_BYTES, archive.size - have))
                except (OSError, http.client.HTTPException) as error:
                    raise _CutOffError(_reason(error)) from error
                if not data:
                    complete = response.chunked and have >= stored  # only if chunked is the end marked as such
                    if not complete:
                        raise _CutOffError(f"cut off after {_mb(have)}")
                    continue
                if have == 0 and data[:1] != b"\x1f":
                    raise AlexNetError(
                        f"{_without_query(url)}: no gzip file (it begins with {shown(repr(data[:20])[2:-1])}): "
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
                file.flush()  # so that nothing is lost when the process is killed
                digest.update(data)
                have += len(data)
                bar.update(len(data))
            if have == archive.size and digest.hexdigest() == archive.sha256:
                bar.leave = True
                file.truncate(have)  # more can be stored
                return archive
            if complete or have == total:
                break
    partial.unlink()
    expected = " or ".join(archive.sha256 for archive in PUBLISHED if total in (archive.size, None))
    raise AlexNetError(
        f"{_without_query(url)}: the download isn't the published archive (SHA-256 {digest.hexdigest()} instead of "
        f"{expected}); it was deleted: start again, or {_WITHOUT}"
    )


def _bar(start: int, total: int | None) -> "tqdm.tqdm[NoReturn]":
    """On a terminal a bar, else a line each half minute."""
    terminal = sys.stderr.isatty()  # there a bar of an attempt that fails is removed
    return tqdm.tqdm(
        desc="CIFAR-10",
        initial=start,
        total=total,
        unit="B",
        unit_scale=True,
        ncols=shutil.get_terminal_size().columns,  # of a terminal that doesn't know, tqdm would take 0
        leave=not terminal,
        mininterval=0.2 if terminal else 30,
        bar_format=None if terminal else "{desc}: {n_fmt} of {total_fmt}, {rate_fmt}, {remaining} left\n",
    )


def _mb(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
