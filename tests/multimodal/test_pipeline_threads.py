import asyncio
import gc
import pickle
import warnings

from sensorium.config import MediaConfig
from sensorium.multimodal.decode.loaders import prepare
from tests.multimodal.pipelines import url_ref
from tests.multimodal.support import (
    MediaServer,
    encoded,
    media_server,
    picture,
)

# ---------------------------------------------------------------------------------------


def test_several_event_loops_one_pipeline(make) -> None:
    setup = make()

    async def run() -> bytes:
        async with media_server() as server:
            server.serve("/a", encoded(picture()))
            return (await setup.load(url_ref(server.url("/a"))))[0].digest

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len({asyncio.run(run()) for _ in range(3)}) == 1
        gc.collect()
    assert setup.processor.num_calls == 1


def test_what_a_worker_runs_can_be_sent_to_a_process() -> None:
    config = MediaConfig()
    assert pickle.loads(pickle.dumps(prepare)) is prepare
    assert pickle.loads(pickle.dumps(config)) == config


async def test_server_fixture_counts(make) -> None:
    """The traps of these tests would be worthless if the server did not see what reaches it."""
    async with media_server() as server:
        assert isinstance(server, MediaServer)
        server.serve("/a", encoded(picture()))
        await make().load(url_ref(server.url("/a")))
        assert server.paths == ["/a"]
