"""Lives that have something of theirs on a real S3 server, behind a proxy."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tests.faults.life import Life
from tests.faults.scene import Scene, Shape
from tests.servers.faults import FAULTS, HOLE, FaultProxy, fault_proxy


@contextmanager
def on_s3(scene: Scene, name: str, shape: Shape, seed: int) -> Iterator[tuple[Life, FaultProxy]]:
    """A life that has nothing but its checkpoints on disk, behind a proxy that breaks two requests of five."""
    bucket = scene.s3.bucket("faults")

    def weather(n: int, method: str, path: str) -> str | None:
        dice = random.Random(f"{seed}/{n}")
        share = dice.random()
        return dice.choice(FAULTS) if share < 0.4 else HOLE if share < 0.403 else None

    with fault_proxy(scene.s3.endpoint_url) as proxy:
        life = scene.life(
            name,
            shape,
            f"data.path={scene.s3.upload(scene.lake, bucket, 'lake')}/",
            f"data.endpoint_url={proxy.endpoint_url}",
            f"model.path={scene.s3.upload(scene.tiny, bucket, 'base')}",
            f"model.cache_path={scene.folder / name / 'models'}",
            f"checkpoint.mirror=s3://{bucket}/mirror",
            "checkpoint.save_every=1",
            f"output.path=s3://{bucket}/out",
        )
        life.env, life.output = {**scene.s3.env, "AWS_MAX_ATTEMPTS": "10"}, scene.s3.root / bucket / "out"
        life.uploading = watch_uploads(proxy, weather)
        yield life, proxy


@contextmanager
def mirrored(scene: Scene, name: str, shape: Shape, *, on: bool) -> Iterator[Life]:
    """A life on disk, `on`: with a mirror, whose proxy breaks nothing and knows when a copy is under way."""
    if not on:
        yield scene.life(name, shape)
        return
    with fault_proxy(scene.s3.endpoint_url) as proxy:
        mirror = f"checkpoint.mirror=s3://{scene.s3.bucket('faults')}/mirror"
        life = scene.life(name, shape, mirror, f"data.endpoint_url={proxy.endpoint_url}")
        life.env, life.uploading = scene.s3.env, watch_uploads(proxy, lambda n, method, path: None)
        yield life


def watch_uploads(proxy: FaultProxy, plan: Callable[[int, str, str], str | None]) -> Callable[[], bool]:
    """Whether a checkpoint's copy has begun and its manifest was not sent yet; faults come by `plan`."""
    under_way = [False]

    def watch(n: int, method: str, path: str) -> str | None:
        if method in ("PUT", "POST") and "/mirror/step-" in path:
            under_way[0] = not path.endswith("/manifest.json")
        return plan(n, method, path)

    proxy.plan = watch
    return lambda: under_way[0]
