"""Names to factories: what `config.backbone.name`, `config.localizer.name` and `config.data.name` choose from."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from re2tal_jax.errors import ConfigError, did_you_mean


class Registry(Mapping[str, Callable[..., Any]]):
    """A read-only mapping of names to factories whose missing keys name the nearest match."""

    def __init__(self, kind: str, *groups: Mapping[str, Callable[..., Any]]):
        self.kind = kind
        self._factories: dict[str, Callable[..., Any]] = {}
        for group in groups:
            for name, factory in group.items():
                if name in self._factories:
                    raise ValueError(f"two {kind}s are called {name!r}")
                self._factories[name] = factory

    def __getitem__(self, name: str) -> Callable[..., Any]:
        if name not in self._factories:
            raise ConfigError(f"Unknown {self.kind} {name!r}. {did_you_mean(str(name), self._factories)}")
        return self._factories[name]

    def __contains__(self, name: object) -> bool:
        return name in self._factories

    def __iter__(self) -> Iterator[str]:
        return iter(self._factories)

    def __len__(self) -> int:
        return len(self._factories)
