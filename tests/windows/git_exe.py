"""Write a git.exe of ten kilobytes that asks a server of 127.0.0.1 to run the command, as `Windows.git` does.

No package holds a Windows git, and a program that Wine starts outside of itself gives no exit code. A script of cmd.exe
and Python would do too, but takes Wine five times as long for each of some hundred commands.

It sends its command line, folder and environment, each string in UTF-16 with a final zero, and gets frames: the number
of a standard handle, a length, and so many bytes for that handle; with the number 0, the length is the exit code.
"""

from __future__ import annotations

import socket
import struct

from tests.windows.mkpe import Section, render_exe

BUFFER_BYTES = 0x2000
FOLDER_LETTERS = 0x1000
LOST = 127  # the exit code where the server has gone
IMPORTS = {
    "WSAStartup": "ws2_32.dll",
    "socket": "ws2_32.dll",
    "connect": "ws2_32.dll",
    "send": "ws2_32.dll",
    "recv": "ws2_32.dll",
    "shutdown": "ws2_32.dll",
    "GetCommandLineW": "KERNEL32.dll",
    "GetCurrentDirectoryW": "KERNEL32.dll",
    "GetEnvironmentStringsW": "KERNEL32.dll",
    "lstrlenW": "KERNEL32.dll",
    "GetStdHandle": "KERNEL32.dll",
    "WriteFile": "KERNEL32.dll",
    "ExitProcess": "KERNEL32.dll",
}


class Code:
    """The program's parts, in the order in which they are laid: each jumps only to what stands before it."""

    def __init__(self, section: Section, imported: dict[str, int], port: int) -> None:
        self.section, self.code, self.imported = section, section.code, imported
        self.address = section.reserve(16)
        there = struct.pack("<H", socket.AF_INET) + struct.pack(">H", port) + socket.inet_aton("127.0.0.1")
        section[self.address : self.address + len(there)] = there
        self.frame, self.written = section.reserve(8), section.reserve(8)
        self.buffer = section.reserve(BUFFER_BYTES)
        self.leave()
        self.answer()
        self.entry = len(section)
        self.ask()

    def call(self, function: str) -> None:
        self.code("ff15", self.imported[function])

    def number(self, opcode: str, value: int) -> None:
        self.code(opcode + struct.pack("<i", value).hex())

    def leave(self) -> None:
        """`ExitProcess(edi)`, or with what says that the server has gone."""
        self.lost = len(self.section)
        self.number("bf", LOST)  # mov edi, LOST
        self.exit = len(self.section)
        self.code("89f9")  # mov ecx, edi
        self.call("ExitProcess")

    def answer(self) -> None:
        """Read frames from the socket in rbx, and hand on what they hold."""
        self.next_frame = len(self.section)
        self.code("4889d9")  # mov rcx, rbx
        self.code("488d15", self.frame)  # lea rdx, [frame]
        self.number("41b8", 8)  # mov r8d, 8
        self.number("41b9", 8)  # mov r9d, MSG_WAITALL
        self.call("recv")
        self.code("83f808")  # cmp eax, 8
        self.code("0f85", self.lost)  # jne lost
        self.code("8b3d", self.frame + 4)  # mov edi, [frame + 4]
        self.code("8b0d", self.frame)  # mov ecx, [frame]
        self.code("85c9")  # test ecx, ecx
        self.code("0f84", self.exit)  # jz exit
        self.call("GetStdHandle")
        self.code("4889c6")  # mov rsi, rax
        more = len(self.section)
        self.code("85ff")  # test edi, edi
        self.code("0f84", self.next_frame)  # jz next_frame
        self.code("4889d9")  # mov rcx, rbx
        self.code("488d15", self.buffer)  # lea rdx, [buffer]
        self.number("41b8", BUFFER_BYTES)  # mov r8d, BUFFER_BYTES
        self.code("4139f8")  # cmp r8d, edi
        self.code("440f4fc7")  # cmovg r8d, edi
        self.code("4531c9")  # xor r9d, r9d
        self.call("recv")
        self.code("85c0")  # test eax, eax
        self.code("0f8e", self.lost)  # jle lost
        self.code("29c7")  # sub edi, eax
        self.code("4889f1")  # mov rcx, rsi
        self.code("488d15", self.buffer)  # lea rdx, [buffer]
        self.code("4189c0")  # mov r8d, eax
        self.code("4c8d0d", self.written)  # lea r9, [written]
        self.code("48c744242000000000")  # mov qword [rsp+0x20], 0
        self.call("WriteFile")
        self.code("e9", more)  # jmp more

    def ask(self) -> None:
        """The beginning: connect, and send what this process was told."""
        self.code("4883ec48")  # sub rsp, 0x48
        self.number("b9", 0x202)  # mov ecx, 2.2
        self.code("488d15", self.buffer)  # lea rdx, [buffer]
        self.call("WSAStartup")
        self.number("b9", socket.AF_INET)  # mov ecx, AF_INET
        self.number("ba", socket.SOCK_STREAM)  # mov edx, SOCK_STREAM
        self.code("4531c0")  # xor r8d, r8d
        self.call("socket")
        self.code("4889c3")  # mov rbx, rax
        self.code("4889d9")  # mov rcx, rbx
        self.code("488d15", self.address)  # lea rdx, [address]
        self.number("41b8", 16)  # mov r8d, 16
        self.call("connect")
        self.call("GetCommandLineW")
        self.code("4889c6")  # mov rsi, rax
        self.code("4889c1")  # mov rcx, rax
        self.call("lstrlenW")
        self.send_letters()
        self.number("b9", FOLDER_LETTERS)  # mov ecx, FOLDER_LETTERS
        self.code("488d15", self.buffer)  # lea rdx, [buffer]
        self.call("GetCurrentDirectoryW")
        self.code("488d35", self.buffer)  # lea rsi, [buffer]
        self.send_letters()
        self.call("GetEnvironmentStringsW")
        self.code("4889c6")  # mov rsi, rax
        self.code("4889c7")  # mov rdi, rax
        next_string = len(self.section)
        self.code("4889f9")  # mov rcx, rdi
        self.call("lstrlenW")
        self.code("488d7c4702")  # lea rdi, [rdi + rax * 2 + 2]
        self.code("66833f00")  # cmp word [rdi], 0
        self.code("0f85", next_string)  # jne next_string
        self.code("4889f8")  # mov rax, rdi
        self.code("4829f0")  # sub rax, rsi
        self.code("48d1e8")  # shr rax, 1
        self.send_letters()
        self.code("4889d9")  # mov rcx, rbx
        self.number("ba", 1)  # mov edx, SD_SEND
        self.call("shutdown")
        self.code("e9", self.next_frame)  # jmp next_frame

    def send_letters(self) -> None:
        """Send the eax letters at rsi, and their final zero."""
        self.code("4889d9")  # mov rcx, rbx
        self.code("4889f2")  # mov rdx, rsi
        self.code("448d044502000000")  # lea r8d, [rax * 2 + 2]
        self.code("4531c9")  # xor r9d, r9d
        self.call("send")


def render_git(port: int) -> bytes:
    """The program that asks a port of 127.0.0.1."""
    return render_exe(IMPORTS, lambda section, imported: Code(section, imported, port).entry)
