"""The official MCP client, of the era whose package is on PYTHONPATH, against `mcp`: one conversation, told as JSON.

    PYTHONPATH=FOLDER python mcp_client.py MODE BRANCH COMMAND...

MODE: `initialize` (both packages), or `auto` (2.x: asks `server/discover` first); with `confirm-` before it, a person
who is asked says no, then nothing, then yes.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import AsyncIterator
from typing import Any

import mcp  # type: ignore[import-not-found,unused-ignore]
from mcp.client.stdio import StdioServerParameters, stdio_client  # type: ignore[import-not-found,unused-ignore]


@contextlib.asynccontextmanager
async def connect(mode: str, command: list[str], ask: Any = None) -> AsyncIterator[Any]:
    """A client that has agreed on a revision; `ask` puts questions to a person."""
    server = StdioServerParameters(command=command[0], args=command[1:], env=dict(os.environ))
    if hasattr(mcp, "Client"):
        era = {"initialize": "legacy"}.get(mode, mode)
        async with mcp.Client(server, mode=era, elicitation_callback=ask) as client:
            yield client if ask else client.session
    else:
        async with (
            stdio_client(server) as streams,
            mcp.ClientSession(*streams, elicitation_callback=ask) as session,
        ):
            await session.initialize()
            yield session


def plain(result: Any) -> dict[str, Any]:
    """A result as it was on the wire."""
    data: dict[str, Any] = result.model_dump(by_alias=True, mode="json", exclude_none=True)
    return data


async def talk(mode: str, branch: str, command: list[str]) -> dict[str, Any]:
    said: dict[str, Any] = {}
    progress: list[str] = []

    async def on_progress(_: float, __: float | None, message: str | None) -> None:
        progress.append(message or "")

    async with connect(mode, command) as session:
        said["tools"] = plain(await session.list_tools())["tools"]

        async def call(tool: str, **arguments: Any) -> dict[str, Any]:
            return plain(await session.call_tool(tool, arguments))

        deploy = {"target": "all", "branch": branch, "idempotency_key": f"{mode}-{branch}"}
        said["plan"] = await call("plan", target="all", branch=branch)
        said["update"] = plain(await session.call_tool("update", deploy, progress_callback=on_progress))
        said["again"] = await call("update", **deploy)
        said["progress"] = progress
        run = said["update"]["structuredContent"]["run"]
        said["logs"] = [await call("logs", run=run, max_bytes=1000)]
        while len(said["logs"]) < 50 and any(
            row["bytes"] > json.loads(said["logs"][-1]["structuredContent"]["cursor"])[row["host"]]
            for row in said["logs"][-1]["structuredContent"]["hosts"]
        ):
            cursor = said["logs"][-1]["structuredContent"]["cursor"]
            said["logs"].append(await call("logs", run=run, cursor=cursor, max_bytes=1000))
        said["status"] = await call("status")
        said["history"] = await call("history", count=1)
        said["wrong"] = [
            await call("update", target="all"),
            await call("update", target=3, branch="master"),
            await call("update", target="nobody", branch="master"),
            await call("update", target="all", branch="--upload-pack=x"),
            await call("logs", run="20261122-210501-7f3a"),
            await call("logs", run="../../etc"),
            await call("logs", run=run, cursor="x"),
            await call("logs", run=run, cursor="[]"),
            await call("cancel", run="20261122-210501-7f3a"),
        ]
        try:
            said["unknown"] = plain(await session.call_tool("no-such-tool", {}))
        except Exception as problem:
            said["unknown"] = str(problem)
    return said


async def ask_a_person(mode: str, branch: str, command: list[str]) -> dict[str, Any]:
    import mcp.types as types  # type: ignore[import-not-found,unused-ignore]

    replies = iter([("decline", None), ("accept", {"confirm": False}), ("accept", {"confirm": True})])
    asked: list[str] = []

    async def ask(_: Any, params: Any) -> Any:
        asked.append(params.message)
        action, content = next(replies)
        return types.ElicitResult(action=action, content=content)

    deploy = {"target": "all", "branch": branch}
    async with connect(mode, command, ask) as session:
        results = [plain(await session.call_tool("update", deploy)) for _ in range(3)]
    async with connect(mode, command) as session:
        mute = plain(await session.call_tool("update", deploy))
    return {"asked": asked, "refused": results[:2], "agreed": results[2], "mute": mute}


if __name__ == "__main__":
    wanted = sys.argv[1].removeprefix("confirm-")
    conversation = talk if wanted == sys.argv[1] else ask_a_person
    json.dump(asyncio.run(conversation(wanted, sys.argv[2], sys.argv[3:])), sys.stdout)
