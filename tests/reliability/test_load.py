"""Bad media among good requests under load: no good one fails, and nothing is used up."""

from __future__ import annotations

import base64
import concurrent.futures
import io
from typing import Any

from PIL import Image, ImageDraw

from tests.fuzz.memory import family, resident
from tests.multimodal.clips import make_clip
from tests.reliability.asking import Service, image, text, until, video
from tests.reliability.media import data_url, encoded, picture
from tests.reliability.test_bombs import PICTURES
from tests.reliability.test_embeddings import embeds, part, saved

NUM_CLIENTS = 32
COLOURS = ("red", "green", "blue", "yellow", "purple", "black")
QUESTION = text("What color is the circle?")
CORRUPT: tuple[dict[str, Any], ...] = (
    image(data_url(b"hello")),
    image(data_url(encoded(picture(300, 200), "JPEG")[:3000])),
    image(data_url(PICTURES["PNG"]())),
    image("http://127.0.0.1:1/x.png"),
    image(None, uuid="nobody's"),
    video(data_url(make_clip("mp4", 12)[:900], "video/mp4")),
    video("data:video/jpeg;base64,AAAA"),
    part(saved(embeds(4, 3))),
    part(base64.b64encode(b"hello").decode()),
    {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
)


def circle(colour: str, size: int) -> str:
    """A picture about which the demo model is never wrong; of another ``size`` it is another item."""
    found = Image.new("RGB", (200, 160), "white")
    ImageDraw.Draw(found).ellipse((60, 40, 60 + size, 40 + size), fill=colour)
    file = io.BytesIO()
    found.save(file, "PNG")
    return data_url(file.getvalue())


def own_bytes(service: Service) -> tuple[int, int]:
    """Memory of the processes that load media and answer, and of the engine's."""
    processes = family(service.server.process.pid)
    engine = processes.pop("engine")
    assert len(engine) == 1
    return sum(map(resident, processes.values())), resident(engine)


def crowd(service: Service, first: int, num_requests: int) -> tuple[int, int]:
    """Send requests from many clients at once, every tenth with corrupt media.

    How many were good and bad.
    """

    def one(number: int) -> bool:
        if number % 10 == 9:
            bad = CORRUPT[number // 10 % len(CORRUPT)]
            answer = service.ask(bad, QUESTION)
            assert answer.status != 200
            answer.is_discreet()
            return False
        colour = COLOURS[number % len(COLOURS)]
        answer = service.ask(image(circle(colour, 60 + number % 40)), QUESTION, max_tokens=3)
        assert answer.text == colour, (number, answer.body)
        return True

    with concurrent.futures.ThreadPoolExecutor(NUM_CLIENTS) as pool:
        outcomes = list(pool.map(one, range(first, first + num_requests)))
    return outcomes.count(True), outcomes.count(False)


def test_a_tenth_of_corrupt_media_harms_no_other_request(tight: Service) -> None:
    """vLLM issue 55546: one bad item brought the whole engine down.

    Of 32 clients' requests a tenth is corrupt, in ten ways: each good one gets the answer about its
    own picture, each bad one its error, and afterwards memory and open files are those of before.
    """
    for first in (0, 200):  # until all threads have had work: on a busy machine that takes longer
        assert crowd(tight, first, 200) == (180, 20)
    memory = own_bytes(tight)
    files = tight.server.num_descriptors()
    assert crowd(tight, 400, 200) == (180, 20)
    grown = [now - before for now, before in zip(own_bytes(tight), memory, strict=True)]
    assert grown[0] < 48 << 20  # what the heaps of a few threads may keep by chance
    # The engine's kernels of matrix products are compiled, and kept, for each number of tokens in a
    # step.
    assert grown[1] < 128 << 20
    # The server closes the connections of clients that have gone; each corrupt request may have
    # cost one file.
    until(
        lambda: tight.server.num_descriptors() <= files + 8,
        lambda: str((files, tight.server.num_descriptors())),
    )
    tight.is_well()
