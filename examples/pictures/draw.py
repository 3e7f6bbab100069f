"""Draw the pictures of README.md: what ckptool shows on a terminal, as SVG that needs nothing from elsewhere.

    python examples/pictures/draw.py

Every picture is a real run in a folder that holds ``examples/`` and ``photos/`` (the validation digits); they are drawn
anew whenever the answer changes.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.text import Text

HERE = Path(__file__).resolve().parent
EXAMPLES = HERE.parent
WIDTH = 100
WRONG = "examples/digits_wrong_strip.pt"
MODEL = "examples/train_digits.py:DigitsNet"
PICTURES: Mapping[str, str] = {
    "inspect.svg": "inspect examples/digits.ckpt",
    "verify.svg": f"verify {WRONG} --as-is --model {MODEL} --data photos/",
}
# A font that would be fetched from elsewhere is none for a picture that stands alone.
ALONE = re.sub(r"@font-face \{\{.*?\}\}\n", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)


def shown_by(command: str, folder: Path) -> str:
    """Run one command of ckptool, and give what a terminal would be sent."""
    words = [sys.executable, "-m", "ckptool", *command.split(), "--color", "always"]
    environment = {**os.environ, "COLUMNS": str(WIDTH), "PYTHONIOENCODING": "utf-8"}
    environment["PYTHONPATH"] = os.pathsep.join([str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(words, cwd=folder, env=environment, stdout=subprocess.PIPE, encoding="utf-8", check=False)
    return done.stdout


def drawn(command: str, shown: str) -> str:
    """Draw what a terminal was sent."""
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere:
        console = Console(record=True, width=WIDTH, file=nowhere, force_terminal=True, color_system="truecolor")
        console.print(Text.from_ansi(shown), soft_wrap=True)
        return console.export_svg(title=f"ckptool {command}", code_format=ALONE)


def main() -> None:
    """Draw every picture beside this script."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "examples").symlink_to(EXAMPLES)
        script = EXAMPLES / "train_digits.py"
        subprocess.run([sys.executable, script, "--pictures", folder / "photos"], check=True)
        for picture, command in PICTURES.items():
            (HERE / picture).write_text(drawn(command, shown_by(command, folder)), encoding="utf-8")


if __name__ == "__main__":
    main()
