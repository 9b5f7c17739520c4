"""``userllm serve``: answers over HTTP."""

from __future__ import annotations

import argparse
import socket
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

from userllm.cli.arguments import add_command, model_folder
from userllm.errors import UserError

NOTE = """\
  userllm embed runs/demo --out stores/demo
  userllm serve runs/demo --store stores/demo
  curl --json '{"user": "8", "k": 3}' localhost:8000/recommend
  curl --json '{"history": [{"item": "Heat (1995)", "rating": 5}]}' localhost:8000/recommend

It asks nobody who they are, and whoever reaches it may ask about every user of the store: so it listens to this machine
alone unless --host says otherwise. Put a gateway that knows your users before it.
"""
LOCAL = ("localhost", "127.0.0.1", "::1", "[::1]")
STOPPING = 30
"""Seconds that requests under way are given when it is told to stop."""


def add_parser(commands: Any) -> None:
    """Add this command."""
    parser = add_command(commands, "serve", "answer over HTTP", NOTE)
    parser.add_argument(
        "folder", type=Path, metavar="FOLDER", help="a run folder (runs/demo) or a saved model"
    )
    parser.add_argument("--store", type=Path, metavar="STORE", help="users that `userllm embed` computed")
    parser.add_argument("--lm", metavar="NAME", help="where the language model is, if not where it was")
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen at (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="(default: 8000; 0: any that is free)")
    parser.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> None:
    """Until it is told to stop."""
    folder = model_folder(arguments.folder)
    from userllm.serving.store import UserStore

    try:
        import fastapi  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise UserError("serve needs an extra of userllm: in the clone, pip install -e '.[serve]'") from error
    if arguments.store is not None:
        UserStore.read(arguments.store)  # what is no store is told before a model is loaded
    with _listening(arguments.host, arguments.port) as listener:
        from userllm import processes
        from userllm.model import UserLLM
        from userllm.service import Service, build_app

        model = UserLLM.from_pretrained(folder, arguments.lm).to(processes.device())
        service = Service(model, arguments.store)
        host, port = listener.getsockname()[:2]
        where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        users = "no store of users" if service.store is None else f"{len(service.store):,} users"
        print(f"{folder}, {users}: http://{where}", flush=True)
        # of what is unknown in a history its answer tells; the log would be written by whoever asks
        warnings.filterwarnings("ignore", category=UserWarning, module="userllm")
        # a web page in this machine's browser reaches it under a name of its own
        app = build_app(service, LOCAL if arguments.host in LOCAL else ("*",))
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=STOPPING)
        with suppress(KeyboardInterrupt):  # it has ended what was under way
            uvicorn.Server(config).run(sockets=[listener])


def _listening(host: str, port: int) -> socket.socket:
    """Before a model is loaded for minutes. Raises UserError where it cannot be."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError, UnicodeError) as error:
        raise UserError(f"--host {host} --port {port}: cannot be listened at ({error})") from error
