"""Serve a digit classifier over HTTP from whatever checkpoint training left behind.

The checkpoint may be wrapped by torch.compile, DDP or Lightning, and may hold a pickled ``TrainingConfig`` of a module
that this machine does not have: ``torch.load`` refuses it with ``weights_only=True`` and fails to import the class
without. ckptool reads such a file as data: weights go into the model, the fields of the configuration are plain values.

    pip install lightning scikit-learn  # for the network alone, which lies in the script that trained it
    python examples/web_demo.py examples/digits.ckpt --port 8000
    curl -d '[[0, 0, 5, 13, 9, 1, 0, 0], ...]' http://localhost:8000
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import torch
from torch import nn
from train_digits import DigitsNet

import ckptool

MAX_BODY = 1 << 16


def read_settings(path: Path) -> Mapping[str, Any]:
    """Give the hyperparameters as one mapping, also those in the fields of an object whose class is missing here."""
    with ckptool.open(path) as checkpoint:
        found = checkpoint.hyper_parameters
    return {**found, **{key: value for part in found.values() if isinstance(part, dict) for key, value in part.items()}}


def load_model(path: Path) -> nn.Module:
    """Build the network as the checkpoint's settings say, and fill all of it; raises where a tensor does not fit."""
    settings = read_settings(path)
    model = DigitsNet(tuple(settings.get("widths", (16, 32))), int(settings.get("classes", 10)))
    ckptool.load_into(model, path)
    return model.eval()


def predict(model: nn.Module, pixels: Any) -> dict[str, Any]:
    """Say which digit an image of 8 rows of 8 numbers from 0 to 16 shows, and how likely that is."""
    image = torch.tensor(pixels, dtype=torch.float32)
    if image.shape != (8, 8):
        raise ValueError(f"8 rows of 8 numbers are wanted, not {list(image.shape)}")
    with torch.no_grad():
        likely = model(image[None, None] / 16).softmax(dim=1)[0]
    return {"digit": int(likely.argmax()), "probability": round(likely.max().item(), 4)}


class Demo(BaseHTTPRequestHandler):
    """Answer a posted image with a digit; ``model`` belongs to the server."""

    def do_POST(self) -> None:
        """Read JSON, write JSON; what is no image is the sender's mistake."""
        try:
            body = self.rfile.read(min(int(self.headers.get("Content-Length", 0)), MAX_BODY))
            status, answer = 200, predict(self.server.model, json.loads(body))
        except (ValueError, TypeError) as error:
            status, answer = 400, {"error": str(error)}
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())


def main() -> None:
    """Load, then serve until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    arguments = parser.parse_args()
    with HTTPServer(("127.0.0.1", arguments.port), Demo) as server:
        server.model = load_model(arguments.checkpoint)
        print(f"http://127.0.0.1:{server.server_port}", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
