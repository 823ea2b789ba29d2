"""What routing did so far. One object records it; the policies read it."""

from collections.abc import Mapping

from fiddler.cache.keys import Key, Rows
from fiddler.cache.saved import counts


class History:
    """Raw facts per layer and expert: nothing here is aged or weighed.

    Every layer has its own token clock, because waves stand at different layers at the same time.
    """

    def __init__(self, n_experts: tuple[int, ...]) -> None:
        self.n_experts = n_experts
        self.n_visits = 0
        """Layers visited so far, by all waves: the clock of `last_visit`."""
        self._layer_tokens = [0] * len(n_experts)
        self._layer_visits = [0] * len(n_experts)
        self._rows = [[0] * n for n in n_experts]
        self._last_visit = [[0] * n for n in n_experts]
        self._last_token = [[0] * n for n in n_experts]

    def observe(self, layer: int, rows: Rows, n_tokens: int) -> None:
        """Record one visit: `n_tokens` tokens passed `layer`. ValueError where none did."""
        if n_tokens < 1:
            raise ValueError(f"a visit carries at least one token, not {n_tokens}")
        self.n_visits += 1
        self._layer_visits[layer] += 1
        self._layer_tokens[layer] += n_tokens
        clock, visit = self._layer_tokens[layer], self.n_visits
        total, last_visit, last_token = self._rows[layer], self._last_visit[layer], self._last_token[layer]
        for expert, n_rows in rows:
            total[expert] += n_rows
            last_visit[expert] = visit
            last_token[expert] = clock

    @property
    def n_tokens(self) -> int:
        """Tokens seen by the layer that has seen most."""
        return max(self._layer_tokens, default=0)

    def layer_tokens(self, layer: int) -> int:
        """The layer's clock: tokens that passed it."""
        return self._layer_tokens[layer]

    def layer_visits(self, layer: int) -> int:
        """Visits to the layer."""
        return self._layer_visits[layer]

    def n_rows(self, key: Key) -> int:
        """Rows that visited the expert since the beginning."""
        return self._rows[key[0]][key[1]]

    def last_visit(self, key: Key) -> int:
        """`n_visits` at the expert's last touch; 0 if it was never touched."""
        return self._last_visit[key[0]][key[1]]

    def last_token(self, key: Key) -> int:
        """Its layer's clock at the expert's last touch; 0 if it was never touched."""
        return self._last_token[key[0]][key[1]]

    def state(self) -> dict[str, object]:
        """All of it, JSON-able."""
        return {
            "n_visits": [[self.n_visits]],
            "layers": [list(self._layer_tokens), list(self._layer_visits)],
            "rows": [list(row) for row in self._rows],
            "last_visit": [list(row) for row in self._last_visit],
            "last_token": [list(row) for row in self._last_token],
        }

    def restore(self, state: Mapping[str, object]) -> None:
        """Go on from a saved state; ValueError, and nothing changed, where it is not of this shape."""
        n_layers, shape = len(self.n_experts), self.n_experts
        ((n_visits,),) = counts(state, "n_visits", [1])
        layer_tokens, layer_visits = counts(state, "layers", [n_layers, n_layers])
        facts = [counts(state, field, shape) for field in ("rows", "last_visit", "last_token")]
        for visits, tokens, clock in zip(facts[1], facts[2], layer_tokens, strict=True):
            if max(visits, default=0) > n_visits or max(tokens, default=0) > clock:
                raise ValueError("saved touches lie in the future")
        self.n_visits, self._layer_tokens, self._layer_visits = n_visits, layer_tokens, layer_visits
        self._rows, self._last_visit, self._last_token = facts
