"""Turns between clients for what few may do at a time."""

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class ClientTurns:
    """So many calls have a place at a time; the others wait.

    A client may take half of the places that other clients leave, and always one if there is one.
    Clients that wait take turns.
    """

    def __init__(self, places: int) -> None:
        self._free = places
        self._held: Counter[str] = Counter()
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}  # by client, the next one first

    @asynccontextmanager
    async def place(self, client: str) -> AsyncIterator[None]:
        """Waits for a client's place; a context in which it has one."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(client, deque()).append(turn)
        self._let_in()
        try:
            await turn
            yield
        finally:
            if turn.done() and not turn.cancelled():
                self._give_back(client)
            else:
                self._forget(client, turn)

    def _fits(self, client: str) -> bool:
        held = self._held[client]
        return held < max(1, (self._free + held) // 2)

    def _let_in(self) -> None:
        # While a place is free, only clients that hold some wait: few are asked.
        while self._free and (client := next(filter(self._fits, self._waiting), None)) is not None:
            turns = self._waiting.pop(client)
            turn = turns.popleft()
            if turns:
                self._waiting[client] = turns  # behind the others
            if not turn.cancelled():  # else its caller has not run yet to forget it
                turn.set_result(None)
                self._held[client] += 1
                self._free -= 1

    def _give_back(self, client: str) -> None:
        self._free += 1
        self._held[client] -= 1
        if not self._held[client]:
            del self._held[client]
        self._let_in()

    def _forget(self, client: str, turn: asyncio.Future[None]) -> None:
        turns = self._waiting.get(client, deque())
        if turn in turns:
            turns.remove(turn)
            if not turns:
                del self._waiting[client]
