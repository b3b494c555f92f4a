"""A small local page on which a person goes through the suspects, and says who is poison.

It listens on the loopback address alone, and answers only to who knows the token in its address;
a page of somebody else that finds the port is not told anything.
"""

from __future__ import annotations

import io
import logging
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from csc_gpu import clean, run, sources
from csc_gpu.clean import FINE, POISON
from csc_gpu.errors import ConfigError, CorpusError, OutputError
from csc_gpu.harmless import printable
from csc_gpu.report.findings import Findings, read

if TYPE_CHECKING:
    from flask import Flask, Response

LOOPBACK = "127.0.0.1"
HOSTS = (LOOPBACK, "localhost")
"""What a browser here may call this machine; a name that leads here from outside is refused."""
SIDE = 96
"""Longest side of an image that is shown, in pixels."""
TOKEN_BYTES = 24


@dataclass(frozen=True)
class Group:
    """Suspects of one label in one cluster."""

    label: str
    name: str  # of the cluster
    rows: list[int]  # places in the run


def groups(suspects: run.Suspects) -> list[Group]:
    """The suspects by label and cluster, the largest first."""
    found: dict[tuple[str, str], list[int]] = {}
    for row in np.flatnonzero(suspects.suspect).tolist():
        found.setdefault((suspects.labels[row], suspects.group[row]), []).append(row)
    of_label: dict[str, int] = {}
    listed = []
    for (label, _), rows in sorted(found.items(), key=lambda item: -len(item[1])):
        of_label[label] = of_label.get(label, 0) + 1
        listed.append(Group(label, f"cluster {of_label[label]}", rows))
    return listed


class Session:
    """The page of one run, on an address of its own; `serve` answers until Ctrl-C.

    Raises ConfigError without Flask, CorpusError for a run whose images are gone or that suspects
    nobody, OutputError for a port that is taken.
    """

    def __init__(self, folder: Path, port: int = 0) -> None:
        try:
            from werkzeug.serving import make_server
        except ImportError as fault:
            raise ConfigError(
                "Flask is not installed: pip install 'csc-gpu[review]'; or list rows in files for "
                "csc-gpu clean --keep and --drop"
            ) from fault
        token = secrets.token_urlsafe(TOKEN_BYTES)
        self.file = folder / run.REVIEW
        app = application(folder, token)
        logging.getLogger("werkzeug").setLevel(logging.ERROR)  # its lines would show the token
        try:
            self._server = make_server(LOOPBACK, port, app, threaded=True)
        except (OSError, SystemExit) as fault:
            raise OutputError(f"port {port} is taken; choose another with --port") from fault
        self.url = f"http://{LOOPBACK}:{self._server.server_port}/{token}/"

    def serve(self) -> str:
        """Answer until Ctrl-C; where the review is."""
        try:
            self._server.serve_forever()
        except KeyboardInterrupt:
            pass
        finally:
            self._server.server_close()
        return f"review: {self.file}" if self.file.exists() else "nothing was saved"

    def close(self) -> None:
        """End `serve`, called from another thread."""
        self._server.shutdown()


def application(folder: Path, token: str) -> Flask:
    """The pages of a run's review; all of them begin with the token."""
    from flask import Flask, Response, abort, render_template, request

    found = read(folder)
    suspects = found.suspects
    if suspects is None or not suspects.suspect.any() or found.size is None:
        raise CorpusError(f"{folder} suspects no images, so there is nothing to review")
    pictures = pictures_of(found, suspects)
    said = clean.load_review(folder / run.REVIEW) if (folder / run.REVIEW).exists() else {}
    app = Flask("csc_gpu.review", static_folder=None, template_folder=str(Path(__file__).parent))
    nonce = secrets.token_urlsafe(TOKEN_BYTES)

    @app.before_request
    def only_here() -> None:
        host = request.host.rpartition(":")[0] or request.host
        given = request.path.split("/")[1]
        if host not in HOSTS or not secrets.compare_digest(given.encode(), token.encode()):
            abort(403)

    @app.after_request
    def closed(response: Response) -> Response:
        response.headers["Content-Security-Policy"] = (
            "default-src 'none'; img-src 'self' data:; connect-src 'self'; "
            f"style-src 'nonce-{nonce}'; "
            f"script-src 'nonce-{nonce}'; base-uri 'none'; form-action 'none'; "
            "frame-ancestors 'none'"
        )
        response.headers["Referrer-Policy"] = "no-referrer"
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Cache-Control"] = "no-store"
        return response

    @app.get("/<token>/")
    def page(token: str) -> str:
        told = {row: said[suspects.paths[row]] for row in pictures if suspects.paths[row] in said}
        return render_template(
            "page.html",
            nonce=nonce,
            name=printable(found.folder.name),
            groups=groups(suspects),
            paths={row: printable(suspects.paths[row]) for row in pictures},
            printable=printable,
            said=told,
        )

    @app.get("/<token>/image/<int:row>.png")
    def image(token: str, row: int) -> Response:
        if row not in pictures:
            abort(404)
        return Response(png(pictures[row]), mimetype="image/png")

    @app.post("/<token>/review")
    def save(token: str) -> dict[str, Any]:
        given = request.get_json()
        if not is_review(given, pictures):
            abort(400)
        for row in pictures:  # those that are not spoken of any more are open again
            said.pop(suspects.paths[row], None)
        said.update({suspects.paths[int(row)]: word for row, word in given.items()})
        with run.writing(folder / run.REVIEW):
            clean.save_review(folder / run.REVIEW, suspects, said)
        return {"saved": len(given)}

    return app


def is_review(given: object, pictures: Mapping[int, Any]) -> bool:
    """Whether it says of suspects, by their number, that they are poison or fine."""
    known = set(map(str, pictures))
    return isinstance(given, dict) and all(
        row in known and word in (POISON, FINE) for row, word in given.items()
    )


def pictures_of(found: Findings, suspects: run.Suspects) -> dict[int, NDArray[np.uint8]]:
    """The image of every suspect, by its place in the run. (H, W, 3) each"""
    assert found.size is not None
    source, settings = found.summary["source"], found.settings.data
    album = sources.album(source, settings, suspects.paths, found.size)
    rows = np.flatnonzero(suspects.suspect)
    return dict(zip(rows.tolist(), album.images(rows, SIDE), strict=True))


def png(image: NDArray[np.uint8]) -> bytes:
    """The image (H, W, 3) as a PNG."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()
