"""A damaged file is decoded to something sane, or refused as damaged.

It costs no more memory than allowed.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sensorium.multimodal.items import MODALITIES, Modality
from tests.fuzz.corpus import corpus
from tests.fuzz.decoding import MOST_GROWTH, Decoder, Outcome
from tests.fuzz.messages import leak_in
from tests.fuzz.mutation import mutate

REFUSED = {"media_undecodable", "media_too_large", "invalid_request"}
"""The last is the processor's, for pictures of an extreme shape."""
NUM_EXAMPLES = 600
BOUNDED = settings(max_examples=NUM_EXAMPLES, deadline=None, derandomize=True)


@dataclass(frozen=True)
class Damaged:
    """A file of the corpus after ``num`` changes that ``seed`` chooses.

    Its ``repr`` is all that making it takes.
    """

    modality: Modality
    name: str
    seed: int
    num: int

    def data(self) -> bytes:
        """The bytes."""
        files = corpus(self.modality)
        others = [data for m in MODALITIES for data in corpus(m).values()]
        return mutate(files[self.name], random.Random(self.seed), others, self.num)


def damaged(modality: Modality) -> st.SearchStrategy[Damaged]:
    """Damaged files of all formats of a modality."""
    names = st.sampled_from(sorted(corpus(modality)))
    return st.builds(
        Damaged, st.just(modality), names, st.integers(0, (1 << 32) - 1), st.integers(1, 4)
    )


@pytest.fixture(scope="module")
def decoder() -> Iterator[Decoder]:
    decoder = Decoder()
    yield decoder
    decoder.close()


def check(outcome: Outcome, modality: Modality) -> None:
    assert not outcome.fault
    assert outcome.grown <= MOST_GROWTH[modality]
    assert outcome.shape or outcome.code in REFUSED
    assert not leak_in(outcome.message)
    assert bool(outcome.message) == outcome.refused


@pytest.mark.parametrize("modality", MODALITIES)
def test_files_as_they_are(decoder: Decoder, modality: Modality) -> None:
    refused = set()
    for name, data in corpus(modality).items():
        outcome = decoder.decode(modality, data)
        check(outcome, modality)
        if outcome.refused:
            refused.add(name)
    assert refused <= {
        "png 1xN",
        "tiff float",
        "mp4 sound only",
        "wav no samples",
        "wav not finite",
    }


@pytest.mark.slow
@given(damaged("image"))
@BOUNDED
def test_damaged_images(decoder: Decoder, file: Damaged) -> None:
    check(decoder.decode("image", file.data()), "image")


@pytest.mark.slow
@given(damaged("video"))
@BOUNDED
def test_damaged_videos(decoder: Decoder, file: Damaged) -> None:
    check(decoder.decode("video", file.data()), "video")


@pytest.mark.slow
@given(damaged("audio"))
@BOUNDED
def test_damaged_audio(decoder: Decoder, file: Damaged) -> None:
    check(decoder.decode("audio", file.data()), "audio")


@pytest.mark.parametrize("modality", MODALITIES)
def test_files_of_another_kind(decoder: Decoder, modality: Modality) -> None:
    others = [m for m in MODALITIES if m != modality]
    for other in others:
        for data in corpus(other).values():
            check(decoder.decode(modality, data), modality)
    for data in (b"", b"\0", b"\xff" * 100, b"<svg/>", b"%PDF-1.7", b"#EXTM3U\n/etc/passwd\n"):
        outcome = decoder.decode(modality, data)
        check(outcome, modality)
        assert outcome.refused
