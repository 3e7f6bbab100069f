"""Photos that scikit-image and scikit-learn bring along, read where they lie: nothing is imported or fetched."""

from __future__ import annotations

import importlib.util
from pathlib import Path

# Photographs and textures; drawings and test charts are left out, the battery has enough of those.
_PHOTOS = {
    ("sklearn", "datasets/images"): ("china.jpg", "flower.jpg"),
    ("skimage", "data"): (
        *("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png", "ihc.png", "retina.jpg"),
        *("hubble_deep_field.jpg", "coins.png", "camera.png", "brick.png", "grass.png", "gravel.png", "moon.png"),
        *("page.png", "text.png", "cell.png", "horse.png", "clock_motion.png", "microaneurysms.png", "color.png"),
        *("logo.png", "phantom.png"),
    ),
}


def sample_photos() -> tuple[Path, ...]:
    """List the sample photos of this machine; empty where neither package, or no Pillow to read them, is installed."""
    if importlib.util.find_spec("PIL") is None:
        return ()
    found = (_folder(package) / below / name for (package, below), names in _PHOTOS.items() for name in names)
    return tuple(path for path in found if path.is_file())


def _folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    places = spec.submodule_search_locations if spec else None
    return Path(next(iter(places or ()), ""))
