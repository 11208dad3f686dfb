"""Pages of one file that open offline, are mailed, and need no server: a template, with all pictures in it."""

from __future__ import annotations

import base64
import contextlib
import importlib.metadata
import io
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from clcnet.data.images import ImageSet
from clcnet.files import atomic_path

MOST_CLASSES = 40
MOST_THUMBNAILS = 24  # half of them of each kind
_SIDE = 96  # pixels of a thumbnail


def write_page(path: Path, template: str, **values: Any) -> None:
    """Fill in a template of this folder."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    values |= {"most_classes": MOST_CLASSES, "version": "from its repository"}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        values["version"] = importlib.metadata.version("clcnet")
    with atomic_path(path) as temporary:
        text = environment.get_template(template).render(values)
        temporary.write_bytes(text.encode("utf-8", "replace"))  # names of files may be no text


def class_rows(names: NDArray[Any], **figures: NDArray[Any]) -> list[dict[str, Any]]:
    """A row a class: the number of its images, means of the shares and sums of the counts, most deferred first.

    Args:
        names: (N,) of the images' classes.
        figures: `deferred` (N,) among them; means in percent of those that are floating, sums of all others.
    """
    frame = pd.DataFrame(figures).groupby(np.asarray(names, dtype=object))
    rows = frame.size().to_frame("images")
    for name, figure in figures.items():
        rows[name] = 100 * frame[name].mean() if figure.dtype.kind == "f" else frame[name].sum()
    rows = rows.rename_axis("name").reset_index().sort_values(["deferred", "name"], ascending=[False, True])
    return [{str(key): value for key, value in row.items()} for row in rows.to_dict("records")]


def thumbnails(images: ImageSet, places: NDArray[Any]) -> list[tuple[str, str]]:
    """Name and data address of some of these images, evenly spread over them; those that cannot be read are not."""
    from clcnet.classifiers.decoding import read_image  # timm takes seconds, and tables need none of it

    found = []
    some = np.linspace(0, len(places) - 1, min(len(places), MOST_THUMBNAILS // 2)).astype(int)
    for place in places[some]:
        with contextlib.suppress(Exception):  # PIL's decoders raise nearly everything
            picture = read_image(images.open(place), "RGB", (3, _SIDE, _SIDE))
            picture.thumbnail((_SIDE, _SIDE))
            buffer = io.BytesIO()
            picture.save(buffer, "JPEG", quality=75)
            found.append(
                (images.names[place], "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode())
            )
    return found
