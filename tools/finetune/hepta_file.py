"""Reads .hepta files (and plain GGUF) with NumPy alone, and writes changed ones.

A packed matrix is read as the integers and scales that the engine computes with, bit by bit:
docs/CODE.md defines the code, docs/FORMAT.md the file, docs/NUMERICS.md the rotation. What can be
changed keeps its place in the file: row scales, vectors, codes of the same rate.
"""

import functools
import hashlib
import os
import struct
from pathlib import Path

import numpy as np

TABLES = Path(__file__).resolve().parent.parent / "search" / "tables"
ALIGNMENT = 64  # of a .hepta file
INT8 = 16  # half bits of a matrix of int8
BFLOAT16 = 30
FLOATS = {0: np.dtype("<f4"), 1: np.dtype("<f2"), BFLOAT16: np.dtype("<u2")}  # by GGUF type
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9


# ---- The code -------------------------------------------------------------


@functools.lru_cache(maxsize=None)
def table(half_bits):
    """The value minus 64 of each of the 65536 windows."""
    text = (TABLES / f"rate{half_bits}.txt").read_text().splitlines()
    columns, high, low = ([int(x) for x in line.split()] for line in text[1:4])
    window = np.arange(1 << 16)
    hashed = window & 255
    for j, column in enumerate(columns):
        hashed ^= np.where(window >> (8 + j) & 1, column, 0)
    return (np.array(high)[hashed >> 4] + np.array(low)[hashed & 15]).astype(np.int8)


def decode_rows(half_bits, rows):
    """Integers (n_rows, n) of rows of bytes (n_rows, n / 16 * half_bits), n a multiple of 16."""
    if half_bits == INT8:
        return rows.view(np.int8).copy()
    n_rows, n_bytes = rows.shape
    k = np.arange(n_bytes // half_bits * 16)
    end = half_bits * (k // 2) + np.where(k % 2 == 0, (half_bits + 1) // 2, half_bits)
    padded = np.zeros((n_rows, n_bytes + 3), dtype=np.uint32)
    padded[:, 2 : 2 + n_bytes] = rows  # 16 zero bits stand before the row: window k starts at end_k
    at = end // 8
    words = padded[:, at] | padded[:, at + 1] << 8 | padded[:, at + 2] << 16
    return table(half_bits)[words >> (end % 8).astype(np.uint32) & 0xFFFF]


def unpack(half_bits, n_rows, n_cols, data):
    """Bytes of the rows of a packed matrix, (n_rows, blocks * half_bits), from the file's order."""
    strips, blocks = -(-n_rows // 16), -(-n_cols // 16)
    rows = np.empty((strips, 16, blocks, half_bits), dtype=np.uint8)
    data = data[: strips * 16 * blocks * half_bits].reshape(strips, -1)
    for first in range(0, blocks, 4):
        n = min(4, blocks - first)
        group = data[:, first * 16 * half_bits : (first + n) * 16 * half_bits]
        planes = group.reshape(strips, half_bits, 16, n)
        rows[:, :, first : first + n] = planes.transpose(0, 2, 3, 1)
    return rows.reshape(strips * 16, blocks * half_bits)[:n_rows]


def bfloat16_to_float(bits):
    return (np.asarray(bits).astype("<u4") << 16).view("<f4")


def float_to_bfloat16(x):
    """Rounded to nearest, ties to even; finite numbers."""
    bits = np.ascontiguousarray(x, dtype="<f4").view("<u4")
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2")


# ---- The rotation ---------------------------------------------------------


def splitmix64(seed, n):
    """The first n numbers of the generator."""
    with np.errstate(over="ignore"):
        z = np.uint64(seed) + np.arange(1, n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ z >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ z >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
        return z ^ z >> np.uint64(31)


class Rotation:
    """H = (Hartley_m (x) Hadamard_p) D of rows of n = m p items, operation by operation as in
    src/kernels/ref.c."""

    def __init__(self, n, seed):
        self.p = n & -n
        self.m = n // self.p
        words = splitmix64(seed, -(-n // 64))
        bits = np.unpackbits(words.view(np.uint8), bitorder="little")[:n]
        self.signs = np.where(bits == 1, np.float32(-1), np.float32(1))
        i = np.arange(self.m)
        angle = 2 * np.pi * (np.outer(i, i) % self.m) / self.m
        self.hartley = ((np.cos(angle) + np.sin(angle)) / np.sqrt(self.m)).astype(np.float32)
        self.hadamard_scale = np.float32(1 / np.sqrt(self.p))

    def _core(self, x):
        shape = x.shape
        h = 1
        while h < self.p:
            x = x.reshape(-1, 2, h)
            x = np.stack((x[:, 0] + x[:, 1], x[:, 0] - x[:, 1]), axis=1)
            h *= 2
        x = x.reshape(-1, self.m, self.p) * self.hadamard_scale
        if self.m > 1:
            y = np.zeros_like(x)
            for a in range(self.m):
                y += self.hartley[a][:, None] * x[:, a, None, :]
            x = y
        return x.reshape(shape)

    def rotate(self, x):
        """Rows (..., n) of float32, without the padding to a multiple of 16."""
        return self._core(np.asarray(x, dtype=np.float32) * self.signs)

    def rotate_inverse(self, x):
        return self._core(np.asarray(x, dtype=np.float32)) * self.signs


# ---- Files ----------------------------------------------------------------


class Tensor:
    """Where a tensor lies. half_bits: 0 for one stored as its GGUF type."""

    def __init__(self, name, shape, kind, offset):
        self.name, self.shape, self.kind, self.offset = name, shape, kind, offset
        self.half_bits = 0


class HeptaFile:
    """A .hepta or GGUF file: `metadata` and `tensors` by name. Shapes are (rows, columns)."""

    def __init__(self, path):
        self._parse(bytearray(Path(path).read_bytes()), path)

    def _parse(self, data, path):
        self.data = data
        self._at, self._strings, self._digits = 0, {}, {}
        magic, version, n_tensors, n_keys = self._take("<4sIQQ")
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError(f"{path}: no GGUF file of version 2 or 3")
        self.metadata = {}
        for _ in range(n_keys):
            key = self._string()
            (kind,) = self._take("<I")
            self._strings[key] = self._at + (0 if kind == STRING else 12)
            self.metadata[key] = self._value(kind)
        infos = [self._info() for _ in range(n_tensors)]
        self._infos_end = self._at
        alignment = self.metadata.get("general.alignment", 32)
        self.start = -(-self._at // alignment) * alignment
        self.tensors = {t.name: t for t in infos}
        self.is_hepta = "hepta.version" in self.metadata
        if self.is_hepta:
            self._describe(infos)

    def _take(self, form):
        values = struct.unpack_from(form, self.data, self._at)
        self._at += struct.calcsize(form)
        return values

    def _string(self):
        (n,) = self._take("<Q")
        self._at += n
        return self.data[self._at - n : self._at].decode("utf-8", "surrogateescape")

    def _value(self, kind):
        if kind == STRING:
            return self._string()
        if kind != ARRAY:
            return self._take("<" + SCALARS[kind])[0]
        kind, n = self._take("<IQ")
        if kind == STRING:
            return [self._string() for _ in range(n)]
        items = np.frombuffer(self.data, "<" + SCALARS[kind], n, self._at).copy()
        self._at += items.nbytes
        return items

    def _info(self):
        name = self._string()
        (n,) = self._take("<I")
        shape = self._take(f"<{n}Q")[::-1]
        kind, offset = self._take("<IQ")
        return Tensor(name, shape, kind, offset)

    def _describe(self, infos):
        """Shapes and rates of packed matrices, from the tables; where the checksums stand."""
        self._digits[None] = self._strings["hepta.file.sha256"] + 8
        parts = [self.metadata[f"hepta.tensor.{x}"] for x in ("half_bits", "rows", "cols")]
        for i, (t, half_bits, rows, cols) in enumerate(zip(infos, *parts)):
            self._digits[t.name] = self._strings["hepta.tensor.sha256"] + 8 + 72 * i
            if half_bits != 0:
                t.half_bits, t.shape = int(half_bits), (int(rows), int(cols))

    def _bytes(self, t):
        """A view of the tensor's bytes."""
        if t.half_bits:
            rows, cols = (-(-n // 16) * 16 for n in t.shape)
            n = rows * cols * t.half_bits // 16 + 2 * rows
        else:
            n = int(np.prod(t.shape)) * FLOATS[t.kind].itemsize
        return np.frombuffer(self.data, np.uint8, n, self.start + t.offset)

    def values(self, name):
        """An F32, F16 or BF16 tensor as float32."""
        t = self.tensors[name]
        x = self._bytes(t).view(FLOATS[t.kind]).reshape(t.shape)
        return bfloat16_to_float(x) if t.kind == BFLOAT16 else x.astype(np.float32)

    def packed(self, name):
        """Integers (rows, columns padded to 16), rotated, and the scales (rows)."""
        t = self.tensors[name]
        rows = unpack(t.half_bits, *t.shape, self._bytes(t))
        step = max(1, (1 << 22) // (rows.shape[1] or 1))
        parts = [decode_rows(t.half_bits, rows[i : i + step]) for i in range(0, len(rows), step)]
        return np.concatenate(parts), bfloat16_to_float(self._scales(t))

    def _scales(self, t):
        n = -(-t.shape[0] // 16) * 16
        return self._bytes(t)[-2 * n :].view("<u2")[: t.shape[0]]

    def rotation(self, n):
        return Rotation(n, self.metadata["hepta.rotation.seed"])

    def weights(self, name):
        """Any tensor as float32, the rotation undone."""
        t = self.tensors[name]
        if not t.half_bits:
            return self.values(name)
        integers, scale = self.packed(name)
        rotated = integers[:, : t.shape[1]].astype(np.float32) * scale[:, None]
        return self.rotation(t.shape[1]).rotate_inverse(rotated)

    def set_scales(self, name, scale):
        """Row scales of a packed matrix, rounded to bfloat16."""
        self._scales(self.tensors[name])[:] = float_to_bfloat16(scale)

    def set_values(self, name, x):
        """An F32 tensor."""
        t = self.tensors[name]
        if FLOATS.get(t.kind) != FLOATS[0] or t.half_bits or np.shape(x) != tuple(t.shape):
            raise ValueError(f"{name} is no F32 tensor of shape {np.shape(x)}")
        self._bytes(t)[:] = np.ascontiguousarray(x, dtype="<f4").reshape(-1).view(np.uint8)

    def set_string(self, key, text):
        """The value of a metadata key that is a string."""
        at, text = self._strings[key], text.encode()
        (n,) = struct.unpack_from("<Q", self.data, at)
        header = self.data[:at] + struct.pack("<Q", len(text)) + text
        header += self.data[at + 8 + n : self._infos_end]
        header += bytes(-len(header) % ALIGNMENT)
        self._parse(header + self.data[self.start :], key)

    def copy_matrix(self, name, other):
        """Codes and scales of a packed matrix from another file, where it has the same rate."""
        t, source = self.tensors[name], other.tensors[name]
        if not t.half_bits or (t.shape, t.half_bits) != (source.shape, source.half_bits):
            raise ValueError(f"{name}: {t.half_bits} half bits here, {source.half_bits} there")
        self._bytes(t)[:] = other._bytes(source)

    def save(self, path):
        """Writes the .hepta file with its checksums computed anew; whole or not at all."""
        for name, t in self.tensors.items():
            self._put_digits(name, self._bytes(t))
        at = self._digits[None]
        self.data[at : at + 64] = b"0" * 64
        self._put_digits(None, self.data[: self.start])
        temporary = f"{path}.tmp"
        with open(temporary, "wb") as f:
            f.write(self.data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)

    def _put_digits(self, name, data):
        at = self._digits[name]
        self.data[at : at + 64] = hashlib.sha256(data).hexdigest().encode()
