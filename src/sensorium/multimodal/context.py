"""State that the media of one request share while they are loaded."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from sensorium.config import MediaConfig
from sensorium.errors import MediaTooLargeError, OverloadedError, SensoriumError
from sensorium.multimodal.fetch.budget import ByteBudget, RequestBytes
from sensorium.multimodal.items import Fetched, Modality
from sensorium.multimodal.parse.item_options import ItemOptions
from sensorium.multimodal.shared_memory import NoRoomError
from sensorium.multimodal.workers.decode_worker import NO_ROOM


@dataclass(slots=True)
class LoadContext:
    """State that the items of one request share. Written by ``MediaPipeline`` only.

    Attributes:
        needed: Bytes of the features of each item, as far as they are known.
    """

    options: ItemOptions
    tenant: str
    salt: str
    fetch_slots: asyncio.Semaphore
    received: RequestBytes
    num_items: Counter[Modality] = field(default_factory=Counter)
    pinned: list[bytes] = field(default_factory=list)
    held: list[bytes] = field(default_factory=list)
    needed: dict[Hashable, int] = field(default_factory=dict)

    @classmethod
    def of(
        cls, config: MediaConfig, options: ItemOptions, *, tenant: str, salt: str
    ) -> LoadContext:
        """Return the context of a request that loads nothing yet."""
        return cls(
            options=options,
            tenant=tenant,
            salt=salt,
            fetch_slots=asyncio.Semaphore(config.max_media_fetches_per_request),
            received=RequestBytes(config.max_request_media_bytes, config.max_media_bytes_in_flight),
        )

    def hold(self, fetched: Fetched, budget: ByteBudget) -> None:
        """Count a download in the budget of all, until the request is loaded.

        Raises OverloadedError, and MediaTooLargeError where waiting would not help.
        """
        if fetched.digest not in self.held:
            self.received.add_in_flight(len(fetched.data))
        budget.hold(fetched.digest, len(fetched.data))
        self.held.append(fetched.digest)

    @contextmanager
    def placing(self, item: Hashable) -> Iterator[None]:
        """Raise the error of the request when features find no room within the block."""
        try:
            yield
        except NoRoomError as error:
            self.needed[item] = error.num_bytes
            raise self._no_room(error) from None

    def _no_room(self, error: NoRoomError) -> SensoriumError:
        """Return the error for features that find no room.

        All those of a request must be there at the same time: where they are larger than the file
        system, trying again would not help.
        """
        num_bytes = sum(self.needed.values())
        if num_bytes <= error.total_bytes:
            return OverloadedError(NO_ROOM)
        return MediaTooLargeError(
            f"The media of the request take {num_bytes} bytes when they are decoded; this server "
            f"has {error.total_bytes} bytes of shared memory for them. Send fewer, or smaller ones."
        )
