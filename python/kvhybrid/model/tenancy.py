"""``Tenancy``: where the pages of one session are found, and whether the model still computes them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from kvhybrid.cache.kv_cache import KVCache
    from kvhybrid.model.weights import ModelState, StateName


class ModelNamespaces:
    """The namespaces of one model in one cache. ``model``: its number among the models of the process."""

    def __init__(self, state: ModelState, cache: KVCache, model: int) -> None:
        self.state = state
        self._cache = cache
        self._model = str(model)
        self._epoch = 0

    def number(self, tenant: str, name: StateName, *parts: str) -> int:
        """Return the number of a tenant's namespace for the model under ``name``.

        Namespaces of earlier weights are dropped: no one can find their pages any more.
        """
        if name.epoch < self._epoch:
            return self.private()  # another thread has seen newer weights since
        if self._epoch != name.epoch:
            self._epoch = name.epoch
            mine, epoch = ("model", self._model), str(name.epoch)
            self._cache.drop_namespaces(lambda known: known[2:4] == mine and known[4:5] != (epoch,))
        return self._cache.tenant_namespace(tenant, "model", self._model, *name.parts, *parts)

    def private(self) -> int:
        """Return the number of a namespace that no one else is ever given."""
        return self._cache.private_namespace()


class Tenancy:
    """One text's tenant, and the model's name as of when the text was opened (``name``)."""

    def __init__(self, namespaces: ModelNamespaces, tenant: str) -> None:
        self._namespaces = namespaces
        self._tenant = tenant
        self.name: StateName | None = None
        self.may_share = False
        """False while the model drops out at random, or could not be looked at: nothing is shared."""

    def namespace(self, *parts: str, texts: Sequence[npt.NDArray[np.uint32]] = ()) -> int:
        """Look at the model and return the namespace of ``texts`` under its present name.

        ``parts`` keep apart what was computed in another way.
        """
        tokens = np.concatenate(texts).astype(np.int64) if len(texts) else None
        self.name = self._namespaces.state.look(tokens)
        self.may_share = self.name is not None and not self._namespaces.state.drops_out
        if self.name is None:
            return self._namespaces.private()
        return self._namespaces.number(self._tenant, self.name, *parts)

    def latest(self) -> int:
        """Return the tenant's namespace under the name that the model had when it was last looked at."""
        return self._namespaces.number(self._tenant, self._namespaces.state.latest)

    def follow(self, other: Self) -> None:
        """Take over the name under which ``other`` was opened, together with its pages."""
        self.name, self.may_share = other.name, other.may_share

    def is_stale(self) -> bool:
        """Return whether the model computes something else than when ``namespace`` was last asked."""
        return not self.check(self._namespaces.state.look())

    def check(self, name: StateName | None) -> bool:
        """Return whether the model, called ``name`` now, has been the same since the text was opened."""
        if name is not None and self.name is not None and name.is_unchanged_since(self.name):
            return True
        self._namespaces.state.suspect()
        return False
