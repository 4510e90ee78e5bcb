"""Caches of a simulated engine: prefixes by pieces, and items of media."""

from __future__ import annotations

from collections import OrderedDict

from benchmarks.fleet.traces import Request

BLOCK = 16


class _Piece:
    __slots__ = ("ready", "refs", "tokens")

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.refs = 0
        self.ready = False


class PrefixCache:
    """Pieces of prompts within a number of tokens, the least recently used evicted first.

    Like ``core.kv_cache``: what sequences use stays, and the ends of prefixes go before their
    beginnings. A piece can be evicted in part.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.used = 0
        self._idle: OrderedDict[int, _Piece] = OrderedDict()
        self._num_idle = 0
        self._pieces: dict[int, _Piece] = {}

    def match(self, request: Request) -> tuple[int, bool]:
        """Return the tokens of the cached prefix; True if another sequence computes what follows."""
        cached = 0
        for number, tokens in request.prompt:
            piece = self._pieces.get(number)
            if piece is None:
                break
            if not piece.ready:
                return cached, True
            cached += piece.tokens
            if piece.tokens < tokens:
                break
        return min(cached, request.num_tokens - 1) // BLOCK * BLOCK, False

    def pin(self, request: Request) -> None:
        """Keep the pieces of a prompt; those that are not there are being computed."""
        for number, tokens in request.prompt:
            piece = self._pieces.get(number)
            if piece is None:
                piece = self._pieces[number] = _Piece(tokens)
                self.used += tokens
            elif piece.refs == 0:
                del self._idle[number]
                self._num_idle -= piece.tokens
                piece.ready = piece.tokens == tokens
                piece.tokens = tokens
                self.used += tokens
            piece.refs += 1
        self._evict()

    def computed(self, request: Request) -> None:
        """Let others use the prompt, which has been computed."""
        for number, _ in request.prompt:
            self._pieces[number].ready = True

    def grow(self, tokens: int) -> None:
        """Count tokens that sequences have generated."""
        self.used += tokens
        self._evict()

    def release(self, request: Request) -> None:
        """Let go of a prompt and its answer, whose generated tokens have been counted."""
        self.used -= request.answer_tokens
        if request.answer not in self._pieces:
            answer = self._pieces[request.answer] = _Piece(request.answer_tokens)
            answer.ready = True
            self._keep(request.answer, answer)
        for number, _ in reversed(request.prompt):
            piece = self._pieces[number]
            piece.refs -= 1
            if piece.refs == 0:
                self.used -= piece.tokens
                self._keep(number, piece)
        self._evict()

    def _keep(self, number: int, piece: _Piece) -> None:
        self._idle[number] = piece
        self._num_idle += piece.tokens

    def _evict(self) -> None:
        excess = self.used + self._num_idle - self.capacity
        while excess > 0 and self._idle:
            number, piece = next(iter(self._idle.items()))
            gone = min(piece.tokens, -(-excess // BLOCK) * BLOCK)
            piece.tokens -= gone
            self._num_idle -= gone
            excess -= gone
            if piece.tokens == 0:
                del self._idle[number], self._pieces[number]


class ItemCache:
    """Encoded items within a number of embeddings, the least recently used evicted first."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.num_evictions = 0
        self._sizes: OrderedDict[int, int] = OrderedDict()
        self._total = 0

    def __len__(self) -> int:
        return len(self._sizes)

    def use(self, number: int, size: int) -> bool:
        """Return True for an item that is there; else it is encoded."""
        if number in self._sizes:
            self._sizes.move_to_end(number)
            return True
        self._sizes[number] = size
        self._total += size
        while self._total > self.capacity and len(self._sizes) > 1:
            self._total -= self._sizes.popitem(last=False)[1]
            self.num_evictions += 1
        return False
