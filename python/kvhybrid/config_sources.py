"""Where configuration values come from besides arguments: environment, ``.env`` file, preset.

Reads and merges; what a value may be is ``kvhybrid.config``'s to judge.
"""

from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Final

from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    DotEnvSettingsSource,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
)

from kvhybrid.errors import ConfigError
from kvhybrid.presets import SWITCHES, ConfigValues

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["ENV_PREFIX", "PRESET_KEY", "EnvFileSource", "EnvironmentSource", "PresetSource"]

ENV_PREFIX: Final = "KVHYBRID_"
PRESET_KEY: Final = "preset name"  # no identifier, so that no argument can be called that by mistake


class EnvironmentSource(EnvSettingsSource):
    """Variables ``KVHYBRID_<FIELD>``; one that names no field is refused."""

    origin = "environment"

    def __call__(self) -> dict[str, Any]:
        """Return the fields that are set."""
        self.refuse_unknown()
        return EnvSettingsSource.__call__(self)

    def refuse_unknown(self) -> None:
        """Raise ``ConfigError`` for a variable with our prefix that names no field."""
        prefix, known = ENV_PREFIX.lower(), self.settings_cls.model_fields
        for variable in self.env_vars:
            name = variable.lower().removeprefix(prefix)
            if variable.lower().startswith(prefix) and name not in known:
                near = get_close_matches(name, known, n=1)
                hint = f"; did you mean {ENV_PREFIX}{near[0].upper()}?" if near else ""
                raise ConfigError(f"{ENV_PREFIX}{name.upper()} ({self.origin}): no such field{hint}")


class EnvFileSource(EnvironmentSource, DotEnvSettingsSource):
    """The same out of a ``.env`` file, which may well hold other programs' variables too."""

    origin = ".env file"


class PresetSource(PydanticBaseSettingsSource):
    """The values of a preset, less what belongs to a switch that a stronger source turned off."""

    def __init__(self, settings_cls: type[BaseSettings], values: ConfigValues) -> None:
        super().__init__(settings_cls)
        self._values: Mapping[str, Any] = dict(values)

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        """Return one field's value. Called by pydantic-settings."""
        return self._values.get(field_name), field_name, False

    def __call__(self) -> dict[str, Any]:
        """Return the preset's fields."""
        off = {detail for switch, detail in SWITCHES.items() if _is_off(self.current_state.get(switch))}
        return {name: value for name, value in self._values.items() if name not in off}


def _is_off(value: object) -> bool:
    try:
        return value is not None and not TypeAdapter(bool).validate_python(value)
    except ValidationError:
        return False
