#!/usr/bin/env python3
"""Times `candor judge` against a server that takes 200 ms for each reply: scripts/judge-speed.py [ROWS]

Starts the server in this process and CANDOR (default: target/release/candor) beside it; prints the seconds, the most
requests in flight and the connections.
"""

import asyncio
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

ROWS = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
REPLY = json.dumps({"choices": [{"message": {"content": "A"}, "finish_reason": "stop"}]}).encode()
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(REPLY)
seen = {"connections": 0, "in_flight": 0, "most_in_flight": 0}


async def serve(reader, writer):
    seen["connections"] += 1
    while not reader.at_eof():
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except (asyncio.IncompleteReadError, ConnectionResetError):
            return
        lines = head.decode().lower().splitlines()
        length = next(line.split(":")[1] for line in lines if line.startswith("content-length"))
        await reader.readexactly(int(length))
        seen["in_flight"] += 1
        seen["most_in_flight"] = max(seen["most_in_flight"], seen["in_flight"])
        await asyncio.sleep(0.2)
        seen["in_flight"] -= 1
        writer.write(HEAD + REPLY)


async def main():
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        work = pathlib.Path(folder)
        row = {"question": "Which number?", "answer": "1"}
        (work / "answers.jsonl").write_text("".join(json.dumps(row | {"prediction": str(i)}) + "\n" for i in range(ROWS)))
        (work / "judge.toml").write_text(
            'name = "judge"\nmodel.source = "unused"\n[[environment]]\nname = "simpleqa"\nsource = "unused"\n'
            f'[environment.judge]\nkind = "openai"\nbase_url = "http://127.0.0.1:{port}/v1"\nmodel = "m"\n'
            f'cache = "{work}/verdicts.jsonl"\n'
        )
        candor = os.environ.get("CANDOR", "target/release/candor")
        command = [candor, "judge", work / "answers.jsonl", "--config", work / "judge.toml", "--quiet"]
        started = time.monotonic()
        process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.DEVNULL)
        code = await process.wait()
        print(json.dumps({"rows": ROWS, "exit": code, "seconds": round(time.monotonic() - started, 2)} | seen))


asyncio.run(main())
