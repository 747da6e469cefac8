"""Large arguments, results and volume blocks, over HTTP."""

from __future__ import annotations

import hashlib
from pathlib import Path

from aiohttp import web

from .state import ControlPlane

CHUNK = 1 << 20


async def _receive(request: web.Request, path: Path, algorithm: str) -> str:
    digest = hashlib.new(algorithm)
    temporary = path.with_name(f"{path.name}.part")
    with temporary.open("wb") as file:
        async for chunk in request.content.iter_chunked(CHUNK):
            digest.update(chunk)
            file.write(chunk)
    temporary.replace(path)
    return digest.hexdigest()


def routes(plane: ControlPlane) -> list[web.RouteDef]:
    """Return the addresses that answers of BlobCreate, BlobGet and the volumes point to."""

    def blob(request: web.Request) -> Path:
        return plane.cas / f"blob-{request.match_info['id']}"

    async def put_blob(request: web.Request) -> web.Response:
        md5 = await _receive(request, blob(request), "md5")
        return web.Response(headers={"ETag": f'"{md5}"'})

    async def get_blob(request: web.Request) -> web.StreamResponse:
        if not blob(request).exists():
            return web.Response(status=404)
        return web.FileResponse(blob(request))

    async def put_block(request: web.Request) -> web.Response:
        name = request.match_info["sha"]
        sha = await _receive(request, plane.cas / name, "sha256")
        if sha != name:
            (plane.cas / name).unlink()
            return web.Response(status=400, text="the block has another hash")
        return web.Response(body=sha.encode())

    async def get_volume(request: web.Request) -> web.Response:
        match = request.match_info
        volume = plane.volumes.get(match["volume"])
        if volume is None or not volume.path(match["path"]).is_file():
            return web.Response(status=404)
        with volume.path(match["path"]).open("rb") as file:
            file.seek(int(match["start"]))
            return web.Response(body=file.read(int(match["length"])))

    return [
        web.put("/blob/{id}", put_blob),
        web.get("/blob/{id}", get_blob),
        web.put("/block/{sha}", put_block),
        web.get("/volume/{volume}/{start}/{length}/{path:.*}", get_volume),
    ]
