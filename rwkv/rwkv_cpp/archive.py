"""Where the files of a zip archive lie, if nothing in it is compressed (torch.save compresses
nothing), and a writer of such archives.

What torch does not write is refused: compression, encryption, comments, two entries of one name or
place, copies of a number that disagree. So there is one reading of an archive, and none that takes
more memory or time than its own size.
"""

import io
import itertools
import struct
import zipfile
import zlib
from dataclasses import dataclass
from typing import Any, BinaryIO

_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR64 = struct.Struct("<4sLQL")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_FULL16, _FULL32 = 0xFFFF, 0xFFFFFFFF  # "see the zip64 field"
_SIZE_FOLLOWS, _UTF8 = 0x0008, 0x0800  # flags, torch sets both
_PADDING = 0x4246  # extra field "FB"
_ALIGNMENT = 64
_MAX_ENTRIES = 1 << 14
_MAX_DIRECTORY = 1 << 22


@dataclass(frozen=True)
class Extent:
    """A range of bytes of a file, with the CRC-32 that they should have if that is known."""

    offset: int
    nbytes: int
    crc: int | None = None


def read_directory(file: BinaryIO, size: int) -> dict[str, Extent]:
    """Map the names in an archive of `size` bytes to their data; ValueError if it is not sound."""
    start, length, count = _find_directory(file, size)
    file.seek(start)
    directory = io.BytesIO(file.read(length))
    entries: dict[str, Extent] = {}
    regions = []
    for _ in range(count):
        name, header, extent = _read_entry(file, directory, start)
        if name in entries:
            raise ValueError(f"zip entry '{name}' occurs twice")
        entries[name] = extent
        regions.append((header, extent.offset + extent.nbytes))
    if directory.read(1):
        raise ValueError(f"the zip directory is longer than its {count} entries")
    regions.sort()
    for (_, stop), (begin, _) in itertools.pairwise(regions):
        if stop > begin:
            raise ValueError(f"zip entries overlap at offset {begin}")
    return entries


def checksum(file: BinaryIO, extent: Extent) -> int:
    """CRC-32 of a range of a file."""
    file.seek(extent.offset)
    left, crc = extent.nbytes, 0
    while left:
        data = file.read(min(left, 1 << 20))
        if not data:
            raise ValueError("the file became shorter while it was read")
        crc = zlib.crc32(data, crc)
        left -= len(data)
    return crc


def unpack(form: struct.Struct, file: BinaryIO, offset: int) -> tuple[Any, ...]:
    """The numbers at an offset of a file; ValueError where it is too short."""
    data = b""
    if offset >= 0:
        file.seek(offset)
        data = file.read(form.size)
    if len(data) != form.size:
        raise ValueError(f"the file ends where {form.size} bytes are expected at offset {offset}")
    return form.unpack(data)


def _find_directory(file: BinaryIO, size: int) -> tuple[int, int, int]:
    """Offset, length and number of entries of the directory."""
    end = size - _END.size
    signature, disk, first_disk, here, count, length, start, comment = unpack(_END, file, end)
    if signature != b"PK\x05\x06" or (disk, first_disk, comment) != (0, 0, 0) or here != count:
        raise ValueError("the zip archive does not end with its directory (truncated download?)")
    signature, _, end64, _ = unpack(_LOCATOR64, file, end - _LOCATOR64.size)
    if signature == b"PK\x06\x07":  # torch writes it always
        if end64 != end - _LOCATOR64.size - _END64.size:
            raise ValueError(f"the zip64 directory does not end at offset {end64}")
        signature, _, _, _, _, _, here64, *wide = unpack(_END64, file, end64)
        narrow = zip((count, length, start), (_FULL16, _FULL32, _FULL32), wide, strict=True)
        agree = all(number in (full, number64) for number, full, number64 in narrow)
        if signature != b"PK\x06\x06" or here64 != wide[0] or not agree:
            raise ValueError("the zip64 directory and the zip directory disagree")
        count, length, start = wide
        end = end64
    if start + length != end or count > _MAX_ENTRIES or length > _MAX_DIRECTORY:
        raise ValueError(
            f"zip directory of {count} entries in {length} bytes at offset {start}: expected at "
            f"most {_MAX_ENTRIES} entries in {_MAX_DIRECTORY} bytes, up to offset {end}"
        )
    return start, length, count


def _read_entry(file: BinaryIO, directory: io.BytesIO, stop: int) -> tuple[str, int, Extent]:
    """The next entry of a directory: its name, the offset of its own header, its data."""
    central = directory.read(_CENTRAL.size)
    if len(central) != _CENTRAL.size:
        raise ValueError("the zip directory ends too early")
    signature, _, _, flags, method, _, _, crc, packed, nbytes, *rest = _CENTRAL.unpack(central)
    name_length, extra_length, comment_length, _, _, _, header = rest
    name = directory.read(name_length)
    extra = directory.read(extra_length)
    where = f"zip entry {name[:60]!r}"
    whole = (len(name), len(extra)) == (name_length, extra_length)
    if signature != b"PK\x01\x02" or comment_length or not whole:
        raise ValueError(f"{where}: damaged directory")
    text = name.decode("utf-8")
    if not text.isprintable() or "\\" in text or {"", ".", ".."} & set(text.split("/")):
        raise ValueError(f"{where}: not a name that torch writes")
    if method != 0 or flags & ~(_SIZE_FOLLOWS | _UTF8):
        raise ValueError(
            f"{where}: is compressed or encrypted, which torch.save never does; if this is a "
            "TorchScript archive, load it with torch.jit.load and save its state_dict"
        )
    nbytes, packed, header = _wide_numbers(extra, nbytes, packed, header)
    if packed != nbytes:
        raise ValueError(f"{where}: {nbytes} bytes stored in {packed}")

    signature, _, *own = unpack(_LOCAL, file, header)
    own_flags, own_method, _, _, own_crc, own_packed, own_nbytes, *lengths = own
    own_name = file.read(lengths[0])
    known = [(crc, nbytes, nbytes), (crc, _FULL32, _FULL32)]
    if flags & _SIZE_FOLLOWS:
        known += [(0, 0, 0), (0, _FULL32, _FULL32)]
    same = (own_flags, own_method, own_name) == (flags, method, name)
    if signature != b"PK\x03\x04" or not same or (own_crc, own_packed, own_nbytes) not in known:
        raise ValueError(f"{where}: its own header and the directory disagree")
    offset = header + _LOCAL.size + sum(lengths)
    if offset + nbytes > stop:
        raise ValueError(f"{where}: {nbytes} bytes at offset {offset} pass the directory at {stop}")
    return text, header, Extent(offset, nbytes, crc)


def _wide_numbers(extra: bytes, *numbers: int) -> list[int]:
    """Take the numbers that do not fit 32 bits from the zip64 field."""
    wide: list[int] = []
    while extra:
        kind, length = struct.unpack_from("<2H", extra.ljust(4, b"\xff"))
        field, extra = extra[4 : 4 + length], extra[4 + length :]
        if len(field) != length or (kind == 1 and length % 8):
            raise ValueError("damaged extra field in the zip directory")
        if kind == 1:
            wide = [number for (number,) in struct.iter_unpack("<Q", field)]
    result = []
    for number in numbers:
        if number == _FULL32:
            if not wide:
                raise ValueError("a number is missing in the zip64 field of the zip directory")
            number = wide.pop(0)
        result.append(number)
    return result


def write_entry(archive: zipfile.ZipFile, name: str, data: bytes | memoryview) -> None:
    """Append a file whose data begins, as torch has it, at a multiple of 64 bytes."""
    is_wide = len(data) >= 1 << 30  # zipfile wants to know
    info = zipfile.ZipInfo(name)  # of 1980: the same data gives the same bytes
    start = archive.start_dir + _LOCAL.size + len(name.encode()) + 4 + (20 if is_wide else 0)
    padding = -start % _ALIGNMENT
    info.extra = struct.pack("<2H", _PADDING, padding) + bytes(padding)
    with archive.open(info, "w", force_zip64=is_wide) as entry:
        entry.write(data)
