"""``KVCacheConfig``: everything that can be set, validated once, never changed.

Every field does something or is refused: what this version lacks is an error that says so, never
silence. Imports no torch: a dtype is kept as its name. Where values come from is
``kvhybrid.config_sources``.
"""

import warnings
from difflib import get_close_matches
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Self, Unpack

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from kvhybrid._core import __version__
from kvhybrid.config_sources import ENV_PREFIX, PRESET_KEY, EnvFileSource, EnvironmentSource, PresetSource
from kvhybrid.errors import ConfigError, UnsupportedError
from kvhybrid.layout import DTYPE_BYTES, MAX_BLOCK_SIZE, as_torch_dtype, dtype_name
from kvhybrid.presets import (
    PRESETS,
    SWITCHES,
    CacheStrategy,
    CompressionScorer,
    ConfigValues,
    PresetName,
)

if TYPE_CHECKING:
    import torch

__all__ = ["CacheStrategy", "KVCacheConfig"]

# What this version does not have yet: of these fields only the default is accepted.
ABSENT: Final = frozenset(
    {
        "enable_persistence",
        "persistence_path",
        "host_memory_mb",
        "disk_gb",
        "shared_url",
    }
)


class Allowed(str):
    """The range of a field in words, where its bounds alone do not tell."""

    __slots__ = ()


def _no_flag(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("a flag is no number")  # noqa: TRY004  # pydantic collects ValueError only
    return value


def _power_of_two(value: int) -> int:
    if value & (value - 1):
        raise ValueError("no power of two")
    return value


def _stored_bits(value: int) -> int:
    if value not in (4, 8, 16):
        raise ValueError("no such width")
    return value


def _lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


def _dtype(value: object) -> str | None:
    return None if value is None else dtype_name(value)


# Of the smallest page that can be quantized: with fewer tokens there are more scales than codes.
LEAST_BLOCK: Final = 16

Number = BeforeValidator(_no_flag)
Budget = Annotated[
    Annotated[float, Number, Field(gt=0, le=2**30)] | None, Allowed(f"above 0 and at most {2**30}, or None")
]


class KVCacheConfig(BaseSettings):
    """What the cache may hold and how it behaves. Keyword-only, frozen.

    Later sources win: defaults, preset, ``.env`` file (in the working directory; another or none with
    ``_env_file=``), environment (``KVHYBRID_MAX_TOKENS=4096`` ...), arguments.

    Raises ``ConfigError`` naming every wrong field with its value and range, and ``UnsupportedError``
    naming every field that asks for what this version does not have.
    """

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        env_prefix=ENV_PREFIX,
        env_file=".env",
        env_file_encoding="utf-8",
        env_ignore_empty=True,
        allow_inf_nan=False,
        validate_default=False,
    )

    max_tokens: Annotated[int, Number, Field(ge=1, le=2**31 - 1)] = 8192
    """Token positions that the device tier may hold, all sequences together; never exceeded."""

    max_memory_mb: Budget = None
    """Cap in MiB on the bytes of the device tier's pages; with ``max_tokens`` the smaller wins. None: no cap.

    What attention gathers into while texts run comes on top: see ``buffer_bytes`` in ``get_stats``."""

    state_memory_mb: Budget = None
    """The part of it for states that layers keep instead of K and V. None: a quarter of ``max_memory_mb``;
    without that, as many bytes as the pages take."""

    cache_strategy: Annotated[CacheStrategy, BeforeValidator(_lower)] = CacheStrategy.LRU
    """Who leaves first when room is needed: what was used least recently (lru, paged), or promises least
    (adaptive). With ``use_quantization`` cold pages step down a ladder before they leave, 8 bits and then 4;
    with lru they go to ``quantization_bits`` at once. Without it paged is lru: every step would lose
    something, and none is taken that nobody asked for."""

    block_size: Annotated[
        int,
        Number,
        Field(ge=1, le=MAX_BLOCK_SIZE),
        AfterValidator(_power_of_two),
        Allowed(f"a power of two from 1 to {MAX_BLOCK_SIZE}"),
    ] = 64
    """Tokens per page."""

    dtype: Annotated[
        str | None,
        BeforeValidator(_dtype),
        Allowed(f"one of {', '.join(DTYPE_BYTES)}, or None for the model's"),
    ] = None
    """Storage dtype of full-precision pages, as a name or a torch dtype. None: the model's own."""

    use_compression: bool = False
    """Keep only part of a session's old context, from the end of its first turn on."""

    compression_ratio: Annotated[float, Number, Field(gt=0, le=1)] = 1.0
    """The fraction to keep of the tokens before the last 32: lower is stronger, 1.0 is off. (kvpress counts
    what is removed.)"""

    compression_scorer: Annotated[
        CompressionScorer, BeforeValidator(_lower), Allowed(f"one of {', '.join(CompressionScorer)}")
    ] = CompressionScorer.KEYDIFF
    """How to tell which those are; snapkv and tova go by queries, which only models that read pages show."""

    use_quantization: bool = False
    """Store cold pages in fewer bits: a quarter of the pages' bytes keeps full precision, for what is new. Of
    a ladder of two steps another quarter is for 8 bits, and half of them for 4."""

    quantization_bits: Annotated[int, Number, AfterValidator(_stored_bits), Allowed("4, 8 or 16")] = 16
    """Stored bits of K and V, on a ladder those of the last step; 16 is off."""

    enable_gc: bool = False
    """Evict cold pages in the background, before room is asked for. The hard cap holds either way."""

    gc_threshold: Annotated[float, Number, Field(gt=0, le=1)] = 0.9
    """The fraction of the budget at which that starts. It goes on down to 0.8 of this threshold."""

    enable_prefetch: bool = False
    """Bring pages up from slower tiers ahead of need. Without a slower tier there is nothing to bring."""

    prefetch_size: Annotated[int, Number, Field(ge=1, le=1024)] = 4
    """Most pages brought up at once."""

    max_pinned_share: Annotated[float, Number, Field(ge=0, le=0.9), Allowed("a number from 0 to 0.9")] = 0.5
    """The fraction of the budget that users may pin, of each kind of pages: the rest is for what runs."""

    pin_memory: bool = False
    """Pinned host buffers. Without CUDA: ignored, with one warning."""

    non_blocking: bool = False
    """Asynchronous copies between host and device. Without CUDA: ignored, with one warning."""

    enable_persistence: bool = False
    """Sessions and pages survive a restart."""

    persistence_path: Path | None = None
    """Where to."""

    reproducible: bool = False
    """Prefill on one fixed grid of chunks, so that warm answers equal cold ones to the bit in every dtype."""

    num_workers: Annotated[int, Number, Field(ge=1, le=128)] = 8
    """Most requests processed at once."""

    host_memory_mb: Budget = None
    """Budget of the host tier in MiB. None: off."""

    disk_gb: Budget = None
    """Budget of the disk tier in GiB. None: off."""

    shared_url: SecretStr | None = None
    """URL of the shared tier, credentials included: never shown. None: off."""

    tenant_isolation: bool = True
    """No page is ever shared between tenants."""

    def __init__(self, *, _env_file: str | Path | None = ".env", **values: Unpack[ConfigValues]) -> None:
        fields: dict[str, Any] = dict(values)
        preset = fields.pop(PRESET_KEY, None)
        _refuse_unknown(fields)
        problem = None
        try:
            super().__init__(_env_file=_env_file, **fields, **({PRESET_KEY: preset} if preset else {}))
        except ValidationError as error:
            problem = _describe(error)
        # Raised here and not in the handler: pydantic's error carries the input, secrets included.
        if problem:
            raise ConfigError(problem)
        self._refuse_absent(preset)
        self._refuse_contradictions()

    @classmethod
    def preset(cls, name: PresetName, **overrides: Unpack[ConfigValues]) -> Self:
        """Return a named configuration with ``overrides`` on top.

        ``high_performance``, ``memory_efficient``, ``balanced``, ``high_traffic``, ``low_latency``,
        ``memory_constrained``. Turning a switch off takes the preset's detail away with it: with
        ``use_compression=False`` no ``compression_ratio`` is left over.
        """
        if name not in PRESETS:
            raise ConfigError(f"preset={name!r}: must be one of {', '.join(PRESETS)}")
        return cls(**overrides, **{PRESET_KEY: name})

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Order the sources, strongest first. Called by pydantic-settings."""
        assert isinstance(init_settings, InitSettingsSource)
        preset = init_settings.init_kwargs.pop(PRESET_KEY, None)
        env_file = getattr(dotenv_settings, "env_file", None)
        return (
            init_settings,
            EnvironmentSource(settings_cls),
            EnvFileSource(settings_cls, env_file=env_file),
            PresetSource(settings_cls, PRESETS[preset] if preset else {}),
        )

    @property
    def torch_dtype(self) -> "torch.dtype | None":
        """The storage dtype as torch's object; imports torch. None: the model's own."""
        return None if self.dtype is None else as_torch_dtype(self.dtype)

    @property
    def ladder(self) -> tuple[int, ...]:
        """Bits of K and V in each class of quantized pages, from the first that a page steps down to."""
        if not self.use_quantization:
            return ()
        goes_by_eight = self.cache_strategy is not CacheStrategy.LRU and self.quantization_bits == 4
        return (8, 4) if goes_by_eight else (self.quantization_bits,)

    def host_copies(self, device_type: str) -> tuple[bool, bool]:
        """Return ``(pin_memory, non_blocking)`` as they apply to a device; both are off without CUDA.

        Warns when something set is ignored: call it once per cache.
        """
        if device_type == "cuda":
            return self.pin_memory, self.non_blocking
        if ignored := [name for name in ("pin_memory", "non_blocking") if getattr(self, name)]:
            verb = "are" if len(ignored) > 1 else "is"
            warnings.warn(f"{' and '.join(ignored)} {verb} ignored on {device_type}: CUDA only", stacklevel=4)
        return False, False

    def to_dict(self) -> dict[str, Any]:
        """Return every field, ready for JSON and for ``KVCacheConfig(**...)``. Secrets are left out."""
        return self.model_dump(mode="json", exclude={"shared_url"})

    def __repr_args__(self) -> list[tuple[str | None, Any]]:
        """The two fields that size the cache, and whatever differs from its default."""
        shown = ("max_tokens", "block_size")
        values = {
            n: getattr(self, n) for n, f in type(self).model_fields.items() if n in shown or self._is_set(n)
        }
        return [(n, v.value if isinstance(v, StrEnum) else v) for n, v in values.items()]

    __str__ = BaseSettings.__repr__

    def _is_set(self, name: str) -> bool:
        return bool(getattr(self, name) != type(self).model_fields[name].default)

    def _refuse_absent(self, preset: PresetName | None) -> None:
        fields = type(self).model_fields
        asked = [name for name in fields if name in ABSENT and self._is_set(name)]
        if not asked:
            return
        details = {detail: switch for switch, detail in SWITCHES.items()}
        without = {
            name: fields[name].default for name in asked if not (preset and details.get(name) in asked)
        }
        start = f"preset {preset!r} asks" if preset else "the configuration asks"
        call = f"KVCacheConfig.preset({preset!r}, " if preset else "KVCacheConfig("
        raise UnsupportedError(
            f"{start} for what kvhybrid {__version__} does not have: {_list(self, asked)}; without it: "
            f"{call}{', '.join(f'{n}={_plain(v)!r}' for n, v in without.items())})"
        )

    def _refuse_contradictions(self) -> None:
        if self.max_tokens < self.block_size:
            raise ConfigError(f"max_tokens={self.max_tokens}: must be at least block_size={self.block_size}")
        if self.use_compression and self.reproducible:
            raise ConfigError(
                "use_compression=True: contradicts reproducible=True, which promises a whole text's answers"
            )
        for switch, detail in SWITCHES.items():
            if self._is_set(detail) and not getattr(self, switch):
                raise ConfigError(f"{_list(self, [detail])}: says nothing without {switch}=True")
        if self.use_quantization:
            self._check_quantization()

    def _check_quantization(self) -> None:
        if self.quantization_bits == 16:
            raise ConfigError("use_quantization=True: says nothing with quantization_bits=16; must be 4 or 8")
        if self.block_size < LEAST_BLOCK:
            raise ConfigError(
                f"block_size={self.block_size}: must be at least {LEAST_BLOCK} with use_quantization=True"
            )
        if self.reproducible:
            raise ConfigError(
                "reproducible=True: not with use_quantization=True, warm answers would not equal cold ones"
            )


def _plain(value: object) -> object:
    return value.value if isinstance(value, StrEnum) else value


def _list(config: KVCacheConfig, names: list[str]) -> str:
    return ", ".join(f"{name}={_plain(getattr(config, name))!r}" for name in names)


def _refuse_unknown(fields: dict[str, Any]) -> None:
    known = KVCacheConfig.model_fields
    for name in fields:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            raise ConfigError(f"{name}: no such field" + (f"; did you mean {near[0]}?" if near else ""))


def _allowed(name: str) -> str:
    """The range of a field, in words."""
    field = KVCacheConfig.model_fields[name]
    for item in field.metadata:
        if isinstance(item, Allowed):
            return str(item)
    bounds = {
        bound: getattr(m, bound) for m in field.metadata for bound in ("gt", "ge", "le") if hasattr(m, bound)
    }
    if "ge" in bounds:
        return f"a whole number from {bounds['ge']} to {bounds['le']}"
    if "gt" in bounds:
        return f"above {bounds['gt']} and at most {bounds['le']}"
    if name == "cache_strategy":
        return f"one of {', '.join(CacheStrategy)}"
    return "true or false" if field.annotation is bool else "text"


def _describe(error: ValidationError) -> str:
    found = []
    for item in error.errors(include_url=False, include_context=False):
        name = str(item["loc"][0])
        secret = "Secret" in repr(KVCacheConfig.model_fields[name].annotation)
        value = "<hidden>" if secret else repr(item["input"])[:80]
        found.append(f"{name}={value}: must be {_allowed(name)}")
    return "; ".join(dict.fromkeys(found))
