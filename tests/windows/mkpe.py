"""Write a console python.exe of one kilobyte: `int wmain(argc, argv) { return Py_Main(argc, argv); }`.

    mkpe.py python.exe python311.dll

The packages that carry a Windows Python carry its DLLs but no console program that starts it.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable
from pathlib import Path

IMAGE_BASE = 0x140000000
SECTION = 0x1000  # the one section's address in memory ...
RAW = 0x200  # ... and its place in the file
MAIN, GET_ARGS, EXIT = "Py_Main", "__wgetmainargs", "ExitProcess"


class Section(bytearray):
    """The one section: import tables, variables, code."""

    def reserve(self, size: int) -> int:
        """Append zeros; returns where they begin."""
        start = len(self)
        self += bytes(size)
        return start

    def name(self, text: str, prefix: bytes = b"") -> int:
        """Append a name with its final zero, on an even length; returns where it begins."""
        start = len(self)
        self += prefix + text.encode() + b"\0"
        self += bytes(len(self) % 2)
        return start

    def code(self, opcode: str, target: int | None = None) -> None:
        """Append an instruction, with the distance to an offset of this section if it has one."""
        self += bytes.fromhex(opcode)
        if target is not None:
            self += struct.pack("<i", target - (len(self) + 4))


def add_imports(section: Section, imports: dict[str, str]) -> dict[str, int]:
    """The import directory at the section's start, one DLL per function; returns where each address will stand."""
    section.reserve(20 * (len(imports) + 1))
    addresses = {}
    for row, (function, dll) in enumerate(imports.items()):
        lookup, address = section.reserve(16), section.reserve(16)
        dll_name = section.name(dll)
        hint = section.name(function, prefix=b"\0\0")
        for table in (lookup, address):
            struct.pack_into("<Q", section, table, SECTION + hint)
        struct.pack_into("<IIIII", section, 20 * row, SECTION + lookup, 0, 0, SECTION + dll_name, SECTION + address)
        addresses[function] = address
    section.reserve(-len(section) % 16)
    return addresses


def add_main(section: Section, imported: dict[str, int]) -> int:
    """`ExitProcess(Py_Main(argc, argv))`; returns the entry point."""
    argc, argv, environ, startup_info = (section.reserve(8) for _ in range(4))
    entry = len(section)
    section.code("4883ec48")  # sub rsp, 0x48
    section.code("488d0d", argc)  # lea rcx, [argc]
    section.code("488d15", argv)  # lea rdx, [argv]
    section.code("4c8d05", environ)  # lea r8, [environ]
    section.code("4531c9")  # xor r9d, r9d
    section.code("488d05", startup_info)  # lea rax, [startup_info]
    section.code("4889442420")  # mov [rsp+0x20], rax
    section.code("ff15", imported[GET_ARGS])
    section.code("8b0d", argc)  # mov ecx, [argc]
    section.code("488b15", argv)  # mov rdx, [argv]
    section.code("ff15", imported[MAIN])
    section.code("89c1")  # mov ecx, eax
    section.code("ff15", imported[EXIT])
    section.code("cc")
    return entry


def render_exe(imports: dict[str, str], add_code: Callable[[Section, dict[str, int]], int]) -> bytes:
    """The whole file, for 64-bit Windows: functions by their DLLs, and what appends the code that calls them."""
    section = Section()
    imported = add_imports(section, imports)
    directory_size = 20 * (len(imported) + 1)
    entry = add_code(section, imported)
    size = len(section)
    raw_size = (size + 511) & ~511
    image_size = SECTION + (size + 0xFFF & ~0xFFF)
    dos = b"MZ".ljust(0x3C, b"\0") + struct.pack("<I", 0x40)
    coff = struct.pack("<HHIIIHH", 0x8664, 1, 0, 0, 0, 240, 0x22)
    optional = struct.pack("<HBBIIIII", 0x20B, 14, 0, raw_size, 0, 0, SECTION + entry, SECTION)
    optional += struct.pack("<QIIHHHHHHII", IMAGE_BASE, 0x1000, 0x200, 6, 0, 0, 0, 6, 0, 0, image_size)
    optional += struct.pack("<IIHH", 0x200, 0, 3, 0x8100)  # headers' size, no checksum, console, relocation not needed
    optional += struct.pack("<QQQQII", 2_000_000, 0x1000, 0x100000, 0x1000, 0, 16)
    for index in range(16):
        optional += struct.pack("<II", SECTION, directory_size) if index == 1 else bytes(8)
    row = struct.pack("<8sIIIIIIHHI", b".text", size, SECTION, raw_size, RAW, 0, 0, 0, 0, 0xE0000060)
    return (dos + b"PE\0\0" + coff + optional + row).ljust(RAW, b"\0") + section.ljust(raw_size, b"\0")


if __name__ == "__main__":
    needed = {MAIN: sys.argv[2], GET_ARGS: "msvcrt.dll", EXIT: "KERNEL32.dll"}
    Path(sys.argv[1]).write_bytes(render_exe(needed, add_main))
