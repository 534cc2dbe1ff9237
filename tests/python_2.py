"""Pickles as Python 2 wrote them: text and bytes are one type."""

import io
import pickle
import struct
from typing import ClassVar


class _Pickler(pickle._Pickler):
    def save_string(self, value):
        data = value.encode("latin-1") if isinstance(value, str) else value
        self.write(b"T" + struct.pack("<i", len(data)) + data)

    dispatch: ClassVar = {**pickle._Pickler.dispatch, str: save_string, bytes: save_string}


def dumps(value: object) -> bytes:
    file = io.BytesIO()
    _Pickler(file, 2).dump(value)
    return file.getvalue()
